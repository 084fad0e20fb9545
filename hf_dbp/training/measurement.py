"""The cost of training: seconds, kWh and CO2-equivalent of training alone, and the time of a step.

The clock runs from the start of training, stops while anything else happens (evaluation, checkpoints, logging of
pictures), and continues after a resume from the time of the checkpoint. codecarbon measures energy, offline:

    kWh  = sum over training segments of what the tracker measured or estimated
    CO2e = kWh * carbon intensity of the country's grid

One tracker per node measures the whole node: processors, memory, and the GPUs in use. Without power counters codecarbon
estimates from load and nominal power; `EnergyMeter.description` says what was estimated.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from hf_dbp.errors import UserError

__all__ = ["EnergyMeter", "Meter", "StepTimer", "TrainingClock", "check_country", "gpus_in_use"]

SEGMENT_SECONDS = 60.0  # maximum length of a segment, because processors' counters wrap around within minutes


class Meter(Protocol):
    """Measures energy, segment by segment."""

    def start(self) -> None: ...
    def stop(self) -> float:
        """The kWh since the start."""


class EnergyMeter:
    """codecarbon's offline tracker as a meter of separate segments.

    Args:
        country: ISO code of the country whose grid supplies the power, such as ``NLD``; None for the world average.
        gpus: UUIDs of the GPUs in use; no other GPU is counted.

    Attributes:
        carbon_intensity: g CO2e per kWh.
        description: how each part was measured or estimated, country, carbon intensity, codecarbon's version.

    Raises:
        UserError: codecarbon does not know the country.
    """

    def __init__(self, country: str | None = None, gpus: Sequence[str] = ()) -> None:
        check_country(country)
        logging.getLogger("codecarbon").setLevel(
            logging.ERROR
        )  # before its own setting takes effect, because it logs while it starts
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.core.cpu import is_rapl_available

        has_counters = sys.platform != "linux" or is_rapl_available()
        self.tracker = OfflineEmissionsTracker(
            country_iso_code=country,
            gpu_ids=list(gpus),
            tracking_mode="machine",
            force_mode_cpu_load=not has_counters,
            allow_multiple_runs=True,
            output_methods=[],
            log_level="error",
            **({} if country else {"force_carbon_intensity_g_co2e_kwh": world_average()}),
        )
        self.segments = 0
        self.start()  # detects the hardware, once and outside every measured segment
        first = self._stop_task()
        self.carbon_intensity = round(1000 * first.emissions / first.energy_consumed, 3)
        self.description = {
            "country": country or "world average",
            "carbon_intensity_g_per_kwh": self.carbon_intensity,
            "cpu": "power counters" if has_counters else "estimated from load and nominal power",
            "cpu_model": first.cpu_model,
            "ram": "estimated from size",
            "gpu": f"power counters of {len(gpus)}" if gpus else "none in use",
            "scope": "the whole machine, other programs included, and the GPUs in use",
            "codecarbon": first.codecarbon_version,
        }

    def start(self) -> None:
        """Begin a segment."""
        self.segments += 1
        self.tracker.start_task(f"segment {self.segments}")

    def stop(self) -> float:
        """End the segment and return its kWh."""
        return float(self._stop_task().energy_consumed)

    def _stop_task(self) -> Any:
        return self.tracker.stop_task(f"segment {self.segments}")


def check_country(country: str | None) -> None:
    """Raise a UserError for a country whose carbon intensity codecarbon does not know."""
    from codecarbon.input import DataSource

    known = DataSource().get_global_energy_mix_data()
    if country is not None and country not in known:
        raise UserError(f"no carbon intensity for {country!r}; give a three-letter ISO code such as NLD, DEU or USA")


def world_average() -> float:
    """The world's average carbon intensity in g CO2e per kWh, from codecarbon."""
    from codecarbon.input import DataSource

    return float(DataSource().get_carbon_intensity_per_source_data()["world_average"])


def gpus_in_use(count: int) -> list[str]:
    """UUIDs of the first ``count`` visible GPUs, which this node's processes use."""
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]


class TrainingClock:
    """Seconds and kWh of training, except for what runs inside `paused()`; each stop waits for work queued on a GPU.

    Args:
        meter: measures energy; None if another process of the node does, or to measure only seconds.
    """

    def __init__(self, meter: Meter | None = None) -> None:
        self.meter = meter
        self._seconds, self._kwh = 0.0, 0.0
        self._since: float | None = None
        self._segment_since = 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @property
    def running(self) -> bool:
        """Whether the clock is running."""
        return self._since is not None

    @property
    def kwh(self) -> float:
        """kWh of the finished segments; complete while the clock is stopped."""
        return self._kwh

    def preset(self, seconds: float, kwh: float) -> None:
        """Continue from the seconds and kWh of the resumed run."""
        self._seconds, self._kwh = seconds, kwh

    def start(self) -> None:
        """Start or continue; does nothing if the clock is running."""
        if self._since is None:
            if self.meter is not None:
                self.meter.start()
            self._since = self._segment_since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds, self._since = self.seconds, None
            if self.meter is not None:
                self._kwh += self.meter.stop()

    def tick(self) -> None:
        """Start a new energy segment if the current one has lasted a minute; call it at every step."""
        if self.meter is None or self._since is None or time.perf_counter() - self._segment_since < SEGMENT_SECONDS:
            return
        self._kwh += self.meter.stop()
        self.meter.start()
        self._segment_since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock for something that is not training; may be nested and used before the start."""
        was_running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self.start()


class StepTimer:
    """Durations of optimizer steps, from receiving the batch to the updated weights; on a GPU measured by CUDA
    events."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._pairs: list[tuple[Any, Any]] = []
        self._begun: Any = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def begin(self) -> None:
        self._begun = self._now()

    def end(self) -> None:
        self._pairs.append((self._begun, self._now()))

    def median(self) -> float | None:
        """Median seconds of the steps since the last call; None if there were none."""
        pairs, self._pairs = self._pairs, []
        if not pairs:
            return None
        if self._on_gpu:
            torch.cuda.synchronize()
            return float(statistics.median(begin.elapsed_time(end) / 1000 for begin, end in pairs))
        return float(statistics.median(end - begin for begin, end in pairs))
