"""Measure how many images a run reads per second, and how long its steps wait for them."""

from __future__ import annotations

__all__ = ["InputMeter"]


class InputMeter:
    """Measures images per second, and the share of training time that steps wait for input.

    Seconds come from the training clock, so evaluation and checkpoints do not count. A device that works through a
    queue of steps hides some of the waiting: the share is an upper bound on what faster input would save.
    """

    def __init__(self) -> None:
        self.images = 0
        self.waited = 0.0
        self._last = (0, 0.0, 0.0)

    def preset(self, before: dict[str, float], seconds: float) -> None:
        """Continue from the totals of an earlier run, at ``seconds`` on the training clock."""
        self.images, self.waited = int(before.get("images", 0)), before.get("wait_seconds", 0.0)
        self._last = (self.images, self.waited, seconds)

    def add(self, images: int, waited: float) -> None:
        """Count a step: its images over all processes, and the seconds it waited."""
        self.images += images
        self.waited += waited

    def totals(self, seconds: float) -> dict[str, float]:
        """Images and seconds waited, and both relative to the training time ``seconds``."""
        total = {"images": self.images, "wait_seconds": round(self.waited, 3)}
        if seconds > 0.0:
            total |= {
                "images_per_second": round(self.images / seconds, 2),
                "data_wait_share": round(self.waited / seconds, 4),
            }
        return total

    def since_last(self, seconds: float) -> dict[str, float]:
        """The figures since the last call, at ``seconds`` on the training clock; empty if no time has passed."""
        images, waited, before = self._last
        self._last = (self.images, self.waited, seconds)
        elapsed = seconds - before
        if elapsed <= 0.0:
            return {}
        return {
            "images_per_second": round((self.images - images) / elapsed, 2),
            "data_wait_share": round((self.waited - waited) / elapsed, 4),
        }
