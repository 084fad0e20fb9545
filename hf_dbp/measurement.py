"""What training costs: seconds of training alone.

The clock runs from the start of training, stands still while anything else happens (evaluation, checkpoints, logging of
pictures) and goes on after a resume from where the checkpoint was written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["TrainingClock"]


class TrainingClock:
    """Seconds of training, excluding what runs inside `paused()`; work queued on a GPU is waited for at each stop."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def start(self, seconds: float = 0.0) -> None:
        """Start, with the seconds of the run that is resumed."""
        self._seconds, self._since = seconds, time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._seconds, self._since = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that is not training; may be nested and called before the start."""
        was_running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self.start(self._seconds)
