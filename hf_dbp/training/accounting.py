"""What a run was asked for beside what it used: `asked_used` in its record.

It has a row, with the reason, for each setting or count that differs from what was asked for:

    {"per_device_train_batch_size": {"asked": 8, "used": 6, "why": "what fits in memory (--auto_find_batch_size)"}, ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["asked_lines", "asked_used"]


#: schedules that know no warm-up
UNWARMED = ("constant", "reduce_lr_on_plateau", "greedy")


def asked_used(
    asked: Mapping[str, Any],
    used: Mapping[str, Any],
    data: Mapping[str, Any],
    results: Mapping[str, Any],
    best: Mapping[str, Any] | None,
) -> dict[str, dict[str, Any]]:
    """The rows of a finished run, by name.

    Args:
        asked, used: the run's arguments by name, before and after it.
        data: data of the record: images, images left out, the dropped tail of an epoch.
        results: results of the record: unreadable images, guards, the model's step.
        best: the evaluation in training with the best value of ``metric_for_best_model``.
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
    kind = used.get("lr_scheduler_type")
    if kind in UNWARMED:
        row("warmup_steps", asked.get("warmup_steps") or 0, 0, f"--lr_scheduler_type {kind} has no warm-up")
    images, left_out = data["train_images"], data.get("left_out", {})
    reasons = "; ".join(f"{one['count']} {reason}" for reason, one in left_out.get("reasons", {}).items())
    row("images of the source", images + left_out.get("count", 0), images, f"left out: {reasons}")
    tail = data.get("feeding", {}).get("dropped_tail", 0)
    row("images of an epoch", images, images - tail, "the last ones do not fill a step; they differ in every epoch")
    both, unreadable = images + data["validation_images"], results.get("unreadable", {}).get("count", 0)
    why = "`unreadable` names them; in training neighbours replaced them"
    row("readable images, those of validation included", both, both - unreadable, why)
    guards = results.get("guards", {})
    steps, skipped = results["steps"], guards.get("skipped_steps", 0)
    wanted, why = steps["asked"], f"{skipped} skipped: `guards` says which and why"
    if asked.get("budget"):
        wanted, why = f"--budget {asked['budget']}", f"as many as there was time for; {why}"
    row("optimizer steps", wanted, steps["taken"] - skipped, why)
    left_r = sum(guards.get("skipped_R", {}).values())
    row("skipped updates of R, over layers", 0, left_r, "their sums were not finite")
    reduced = sum(layer["steps"] for layer in guards.get("reduced_eta", {}).values())
    row("updates of R with a smaller eta, over layers", 0, reduced, "--bound_eta: it would have diverged")
    if best is not None:
        metric, kept = used.get("metric_for_best_model"), results.get("model", {}).get("step")
        why = "--load_best_model_at_end false" if not used.get("load_best_model_at_end") else "the best saved one"
        row("step of the model", best["step"], kept, f"asked: the best {metric} seen; used: {why}")
    for step, missing in results.get("resumed_without", {}).items():
        row(f"optimizer state at step {step}", missing, [], "the checkpoint holds only the model (--save_only_model)")
    return rows


def asked_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The rows as lines of a run's summary."""
    return [f"  {name}: asked for {row['asked']}, used {row['used']} ({row['why']})" for name, row in rows.items()]
