"""The runs of a comparison: what each is to do, what it left behind, and which setting of a variant was best."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_dbp.comparison.heads import EVALUATION, HEADS
from hf_dbp.errors import UserError
from hf_dbp.natures import natures
from hf_dbp.records import RECORD, RunRecord
from hf_dbp.training import arguments as pretraining

__all__ = [
    "PROBE_FILE",
    "PlannedRun",
    "Run",
    "RunsBySeed",
    "best_settings",
    "collect_runs",
    "read_run",
    "settings",
    "variant_of",
    "varied_flags",
]

PROBE_FILE = "probe.json"  # written by a probe


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan.

    Args:
        variant: what is compared, such as ``dbp+adamw``.
        searched: values of the searched flags.
        seed: seed of everything random in the run.
        arguments: flags of the pre-training script except the output folder.
        length: steps of its complete schedule, if they differ from those of the plan's other runs.
    """

    variant: str
    searched: tuple[tuple[str, str], ...]
    seed: int
    arguments: tuple[str, ...] = ()
    length: int | None = None

    @property
    def setting(self) -> str:
        """The searched values in words; empty if nothing was searched."""
        return ", ".join(f"{name} {value}" for name, value in self.searched)

    @property
    def name(self) -> str:
        """Variant, searched values and seed in words."""
        length = f"{self.length} steps" if self.length else ""
        return ", ".join(part for part in (self.variant, length, self.setting, f"seed {self.seed}") if part)

    @property
    def folder(self) -> Path:
        """The run's folder below the comparison's ``runs``."""
        settings = [*([("max_steps", self.length)] if self.length else []), *self.searched]
        return Path(slug(self.variant), *(slug(f"{name}={value}") for name, value in settings), f"seed{self.seed}")


@dataclass
class Run:
    """The result of a planned run: its record, the evaluations of its encoder (each head, probe), and in ``notes`` why
    any are missing."""

    planned: PlannedRun
    record: RunRecord | None = None
    error: str | None = None
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)
    probe: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        """Whether a loss is not finite, or the validation loss ended above its start."""
        if self.record is None or not self.record.rows:
            return False
        losses = [row[key] for row in self.record.rows for key in ("eval_loss", "train_loss") if key in row]
        first, last = self.record.rows[0]["eval_loss"], self.record.rows[-1]["eval_loss"]
        return not all(map(math.isfinite, losses)) or last > first

    @property
    def best_loss(self) -> float | None:
        """Lowest validation loss."""
        best = None if self.record is None else self.record.best
        return None if best is None else float(best["eval_loss"])


RunsBySeed = dict[int, Run]


def slug(text: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", text)


def best_settings(runs: Iterable[Run]) -> dict[str, tuple[tuple[str, str], ...]]:
    """Each variant's searched values with the lowest best validation loss; diverged runs only if there are no others.

    A setting is judged by its mean over the seeds that all settings of the variant have. In a plan that is the first
    seed, both before and after the chosen setting's other seeds have run, so these cannot reverse the choice. Settings
    without a common seed are judged by their own. A variant without a finished run is absent; runs of other lengths do
    not count.
    """
    scores: dict[str, dict[tuple[tuple[str, str], ...], dict[int, tuple[bool, float]]]] = {}
    for run in runs:
        if run.best_loss is not None and run.planned.length is None:
            settings = scores.setdefault(run.planned.variant, {})
            settings.setdefault(run.planned.searched, {})[run.planned.seed] = (run.diverged, run.best_loss)

    def order(by_seed: dict[int, tuple[bool, float]], seeds: set[int]) -> tuple[bool, float]:
        counted = [by_seed[seed] for seed in seeds or by_seed]
        return any(diverged for diverged, _ in counted), sum(loss for _, loss in counted) / len(counted)

    best = {}
    for variant, settings in scores.items():
        shared = set.intersection(*map(set, settings.values()))
        best[variant] = min(settings, key=lambda s: order(settings[s], shared))
    return best


def read_run(planned: PlannedRun, folder: Path) -> Run | None:
    """The run in that folder if it has finished, else None."""
    if not (folder / RECORD).is_file():
        return None
    record = RunRecord.read(folder / RECORD)
    if not record.results.get("finished"):
        return None
    files = {head: folder / head / EVALUATION for head in HEADS} | {"probe": folder / "probe" / PROBE_FILE}
    found = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    return Run(planned, record, probe=found.pop("probe", None), heads=found)


def variant_of(record: RunRecord) -> str:
    """The name of a run's method: adamw, muon, dbp+adamw, stock+adamw, ..."""
    return record.optimizer if record.method == "bp" else f"{record.method}+{record.optimizer}"


def collect_runs(folders: Sequence[str]) -> list[Run]:
    """Finished runs made by other means, as if planned: variants by method, settings by flags that differ.

    Only flags that affect a result and differ between runs of one variant make a setting.

    Raises:
        UserError: a folder holds no finished run, or two runs have the same variant, setting and seed.
    """
    records = []
    for folder in folders:
        if not (Path(folder) / RECORD).is_file():
            raise UserError(f"{folder} holds no {RECORD}; name output folders of run_dbp_mae.py")
        records.append(RunRecord.read(Path(folder) / RECORD))
    varied = varied_flags(records)
    runs: dict[PlannedRun, Run] = {}
    places: dict[PlannedRun, str] = {}
    for folder, record in zip(folders, records, strict=True):
        searched = tuple((flag, str(record.arguments.get(flag))) for flag in varied)
        planned = PlannedRun(variant_of(record), searched, record.seed)
        if planned in places:
            raise UserError(f"{places[planned]} and {folder} are both {planned.name}; name one of them")
        run = read_run(planned, Path(folder))
        if run is None:
            raise UserError(f"the run in {folder} has not finished; repeat its command to resume it")
        runs[planned], places[planned] = run, folder
    return list(runs.values())


def varied_flags(records: Sequence[RunRecord]) -> list[str]:
    """The flags that affect a result and differ between runs of one variant, if both have them."""
    varied = set()
    for one, other in itertools.combinations(records, 2):
        if variant_of(one) == variant_of(other):
            a, b = one.arguments, other.arguments
            varied |= {flag for flag in settings(one.method) if flag in a and flag in b and a[flag] != b[flag]}
    return sorted(varied)


def settings(method: str = "dbp") -> list[str]:
    """The flags that distinguish settings of one method; the others do not affect the result."""
    flags = natures(*pretraining.GROUPS).items()
    shaping = {name: flag for name, flag in flags if flag.shapes in ("data", "model", "training")}
    return sorted(name for name, flag in shaping.items() if method == "dbp" or not flag.dbp)
