"""The report of a comparison: tables and figures as Markdown (PNG, SVG), one HTML page, and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_dbp.comparison.heads import HEADS
from hf_dbp.comparison.plans import Plan
from hf_dbp.comparison.report.analysis import analyse, chosen_runs
from hf_dbp.comparison.report.charts import correlation_chart, grid_charts, head_chart, loss_chart, target_chart
from hf_dbp.comparison.report.pages import Block, Heading, write_html, write_markdown
from hf_dbp.comparison.report.tables import introduction, method_notes, result_tables, search_table
from hf_dbp.comparison.report.yardstick import yardstick_figures
from hf_dbp.comparison.report.yardstick_tables import headlines, yardstick_blocks, yardstick_charts
from hf_dbp.comparison.runs import Run
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
    random: Mapping[str, Sequence[dict[str, Any]]] | None = None,
    step_times: dict[str, list[float]] | None = None,
) -> Path:
    """Write `README.md` with its figures, `report.html` and `report.json`; return the path of the HTML page.

    Args:
        folder: output folder.
        plan: what was planned.
        runs: its runs, at least one of them finished.
        command: the command that made the report.
        note: a sentence on what else the machine was doing.
        jobs: how many runs ran at a time.
        random: for each head, `eval.json` contents of fine-tuning from random weights.
        step_times: seconds of each variant's step, measured in turn by one process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    analysis = analyse(plan, runs, random)
    chosen = chosen_runs(runs)
    measured = yardstick_figures(plan, runs, step_times)
    if measured is not None:
        analysis["yardstick"] = measured
    unit, scale = ("hours", 3600.0) if longest(runs) > 3 * 3600 else ("seconds", 1.0)
    pictures = [
        loss_chart(chosen, "epoch", "epoch", 1.0, "loss_by_epoch"),
        loss_chart(chosen, "train_seconds", f"{unit} of training", scale, "loss_by_time"),
        target_chart(analysis["comparisons"]),
        *(yardstick_charts(measured) if measured is not None else []),
        correlation_chart(chosen),
        *(head_chart(head, chosen, (random or {}).get(head, ())) for head in HEADS),
        *grid_charts(plan, runs),
    ]
    blocks: list[Block] = [
        *introduction(analysis, command, note, jobs, headlines(measured)),
        *(yardstick_blocks(measured) if measured is not None else []),
        *result_tables(analysis),
        Heading("Figures"),
        *(picture for picture in pictures if picture is not None),
        *search_table(analysis),
        *method_notes(len(plan.seeds)),
    ]
    write_markdown(folder / "README.md", blocks)
    write_html(folder / "report.html", plan.title, blocks)
    write_json(folder / "report.json", analysis | {"command": command, "note": note})
    return folder / "report.html"


def longest(runs: Sequence[Run]) -> float:
    return max((run.record.results.get("train_seconds", 0.0) for run in runs if run.record is not None), default=0.0)
