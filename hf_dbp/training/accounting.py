"""What was asked of a run and what it used, side by side: `asked_used` of its record.

A row stands there for each setting or count of which something else was used than was asked for, with the reason:

    {"per_device_train_batch_size": {"asked": 8, "used": 6, "why": "what fits in memory (--auto_find_batch_size)"}, ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["asked_used"]


def asked_used(
    asked: Mapping[str, Any],
    used: Mapping[str, Any],
    data: Mapping[str, Any],
    results: Mapping[str, Any],
    best: Mapping[str, Any] | None,
) -> dict[str, dict[str, Any]]:
    """The rows of a run that has ended, by name.

    Args:
        asked, used: the run's arguments by name, before and after it.
        data: the record's data: images, those left out, the dropped tail of an epoch.
        results: the record's results: unreadable images, guards, the model's step.
        best: the row with the lowest loss.
    """
    rows: dict[str, dict[str, Any]] = {}

    def row(name: str, wanted: Any, taken: Any, why: str) -> None:
        if wanted != taken:
            rows[name] = {"asked": wanted, "used": taken, "why": why}

    size = "per_device_train_batch_size"
    row(size, asked.get(size), used.get(size), "what fits in memory (--auto_find_batch_size)")
    base = asked.get("base_learning_rate")
    if base is not None:
        row("learning_rate", base, used.get("learning_rate"), "--base_learning_rate x images per step / 256")
    images, left_out = data["train_images"], data.get("left_out", {})
    reasons = "; ".join(f"{one['count']} {reason}" for reason, one in left_out.get("reasons", {}).items())
    row("images of the source", images + left_out.get("count", 0), images, f"left out: {reasons}")
    tail = data.get("feeding", {}).get("dropped_tail", 0)
    row("images of an epoch", images, images - tail, "the last ones do not fill a step; others in every epoch")
    unreadable = results.get("unreadable", {}).get("count", 0)
    row("readable images", images, images - unreadable, "`unreadable` names them; neighbours stood in for them")
    guards = results.get("guards", {})
    steps, skipped = results["steps"], guards.get("skipped_steps", 0)
    row("optimizer steps", steps["asked"], steps["taken"] - skipped, f"{skipped} skipped: `guards` says which and why")
    left_r = sum(guards.get("skipped_R", {}).values())
    row("updates of R left out, over layers", 0, left_r, "their sums were not finite")
    reduced = sum(layer["steps"] for layer in guards.get("reduced_eta", {}).values())
    row("updates of R with a smaller eta, over layers", 0, reduced, "--bound_eta: it would have diverged")
    lowest = None if best is None else best["step"]
    kept = results.get("model", {}).get("step")
    if lowest is not None:
        why = "--load_best_model_at_end false" if not used.get("load_best_model_at_end") else "the best that was saved"
        row("step of the model", lowest, kept, f"asked: the lowest loss seen; used: {why}")
    for step, missing in results.get("resumed_without", {}).items():
        row(f"optimizer state at step {step}", missing, [], "the checkpoint holds the model alone (--save_only_model)")
    return rows
