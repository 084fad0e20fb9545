"""The charts of a comparison: curves, the cost of reaching the target, correlations, mean IoU, and grids of settings.

A curve is the mean over a variant's seeds, shaded by one standard deviation where there are several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_dbp.comparison.heads import HEADS
from hf_dbp.comparison.plans import Plan
from hf_dbp.comparison.report.analysis import COSTS, chosen_runs, points
from hf_dbp.comparison.report.pages import Picture
from hf_dbp.comparison.runs import Run, RunsBySeed

__all__ = ["correlation_chart", "grid_charts", "head_chart", "loss_chart", "target_chart"]

Curve = list[tuple[float, float]]
LOSSES = {"eval_loss": "validation loss", "train_loss": "training loss"}
SAMPLES = 200
EVALUATIONS = 4


def color(index: int) -> str:
    return f"C{index % 10}"


def draw_mean(axis: Axes, curves: Sequence[Curve], label: str, index: int) -> None:
    """Draw the mean of curves over their common range, linear between their points."""
    finite = [[point for point in curve if math.isfinite(point[1])] for curve in curves]
    finite = [curve for curve in finite if curve]
    if not finite:
        axis.plot([], [], color=color(index), label=f"{label} (nothing finite)")
        return
    first, last = max(curve[0][0] for curve in finite), min(curve[-1][0] for curve in finite)
    x = np.unique(np.clip([point[0] for point in finite[0]] if len(finite) == 1 else [], first, last))
    x = x if len(x) else np.linspace(first, last, SAMPLES)
    values = np.stack([np.interp(x, [a for a, _ in curve], [b for _, b in curve]) for curve in finite])
    mean = values.mean(axis=0)
    axis.plot(x, mean, marker="o" if len(x) == 1 else None, color=color(index), label=label)
    if len(finite) > 1:
        sd = values.std(axis=0, ddof=1)
        axis.fill_between(x, mean - sd, mean + sd, color=color(index), alpha=0.2, linewidth=0)


def loss_chart(chosen: dict[str, RunsBySeed], x: str, unit: str, scale: float, name: str) -> Picture:
    """Validation and training loss over ``x``: the whole run above, its beginning enlarged below.

    The beginning is the first tenth, or enough to hold `EVALUATIONS` evaluations.
    """
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    places = [[a / scale for a, _ in points(run, x, "eval_loss")] for by in chosen.values() for run in by.values()]
    places = [place for place in places if place]
    end = max((place[-1] for place in places), default=1.0)
    begin = max([end / 10, *(place[min(EVALUATIONS, len(place)) - 1] for place in places)])
    for column, (key, label) in enumerate(LOSSES.items()):
        for row in range(2):
            for index, (variant, by_seed) in enumerate(chosen.items()):
                curves = [[(a / scale, b) for a, b in points(run, x, key)] for run in by_seed.values()]
                draw_mean(axes[row, column], curves, variant, index)
            axes[row, column].set(xlabel=unit, ylabel=label)
        axes[0, column].set_title(label)
        zoom(axes[1, column], begin)
    axes[0, 0].legend()
    caption = f"Losses by {unit}: the whole run, and its first {100 * begin / end:.0f} % enlarged."
    return Picture(name, f"{caption} Means over the range that all seeds share.", figure)


def zoom(axis: Axes, end: float) -> None:
    """Limit the axis of a chart to ``end``."""
    lines = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axis.lines]
    values = np.concatenate([y[x <= end] for x, y in lines]) if lines else np.empty(0)
    if values.size > 1:
        axis.set_xlim(0, end)
        margin = 0.05 * (values.max() - values.min()) or 0.05
        axis.set_ylim(values.min() - margin, values.max() + margin)


def target_chart(comparisons: Sequence[dict[str, Any]]) -> Picture | None:
    """Bars of steps, time, energy and emissions until the baseline's best loss; None if no run reached it."""
    shown = [row for row in comparisons if row["target"]["costs"]["steps"] is not None]
    if not shown:
        return None
    costs = [name for name in COSTS if all(row["target"]["costs"][name] is not None for row in shown)]
    figure = Figure(figsize=(3.2 * len(costs), 0.9 + 0.8 * len(shown)), layout="constrained")
    axes = figure.subplots(1, len(costs), squeeze=False, sharey=True)[0]
    labels = [f"{row['other']}\nto {row['baseline']}'s best" for row in shown]
    for axis, name in zip(axes, costs, strict=True):
        tests = [row["target"]["costs"][name] for row in shown]
        height = np.arange(len(shown))
        axis.barh(height - 0.2, [t["baseline"] for t in tests], height=0.38, color="0.7", label="baseline")
        axis.barh(height + 0.2, [t["other"] for t in tests], height=0.38, color="C1", label="other")
        for y, t in zip(height, tests, strict=True):
            change = "-" if t["percent"] is None else f"{t['percent']['mean']:+.0f} %"
            axis.annotate(change, (t["other"], y + 0.2), va="center", fontsize=8)
        axis.set_xlabel(name)
        axis.set_yticks(height, labels, fontsize=8)
        axis.margins(x=0.2)
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=7)
    return Picture("to_target", "What reaching the baseline's best validation loss takes.", figure)


def correlation_chart(chosen: dict[str, RunsBySeed]) -> Picture | None:
    """Decorrelation loss and mean squared correlation of the encoder's layer inputs by epoch, on a log axis."""
    keys = {"decorrelation_loss": "decorrelation loss", "mean_squared_correlation": "mean squared correlation"}
    if not any(points(run, "epoch", key) for by_seed in chosen.values() for run in by_seed.values() for key in keys):
        return None
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, 2), keys.items(), strict=True):
        for index, (variant, by_seed) in enumerate(chosen.items()):
            draw_mean(axis, [points(run, "epoch", key) for run in by_seed.values()], variant, index)
        axis.set(xlabel="epoch", ylabel=label, yscale="log")
    figure.axes[0].legend()
    caption = "Inputs of the encoder's layers on a fixed validation batch, averaged over the layers (log axis)."
    return Picture("correlations", caption, figure)


def head_chart(name: str, chosen: dict[str, RunsBySeed], random: Sequence[dict[str, Any]]) -> Picture | None:
    """The first metric of a head by epoch of fine-tuning; None without evaluations during it."""
    head, (metric, label) = HEADS[name], HEADS[name].first
    evaluations = {
        variant: [run.heads[name] for run in runs.values() if name in run.heads] for variant, runs in chosen.items()
    }
    evaluations["random weights"] = list(random)
    curves = {
        variant: [[(row["epoch"], row[f"eval_{metric}"]) for row in one["evaluations"]] for one in found]
        for variant, found in evaluations.items()
    }
    curves = {variant: drawn for variant, found in curves.items() if (drawn := [curve for curve in found if curve])}
    if not curves:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for index, (variant, found) in enumerate(curves.items()):
        draw_mean(axis, found, variant, index)
    axis.set(xlabel="epoch of fine-tuning", ylabel=label)
    axis.legend()
    caption = (
        f"{label[0].upper()}{label[1:]} on the validation images while {head.model} is fine-tuned on each encoder."
    )
    return Picture("miou" if metric == "mean_iou" else metric, caption, figure)


def grid_charts(plan: Plan, runs: Sequence[Run]) -> list[Picture]:
    """Best validation loss over the searched settings (a line for one flag, heat maps for two) and over two axes."""
    pictures = []
    flags = [flag for flag, values in plan.search.items() if len(values) > 1]
    first = [run for run in runs if run.planned.seed == plan.seeds[0] and run.best_loss is not None]
    if len(flags) == 1:
        pictures.append(search_lines(plan, first, flags[0]))
    if len(flags) == 2:
        pictures.append(search_maps(plan, first, *flags))
    if len(plan.axes) == 2 and all(len(labels) > 1 for labels in plan.axes.values()):
        (a_name, a_labels), (b_name, b_labels) = plan.axes.items()
        table = [[mean_best(runs, f"{a}, {b}") for b in b_labels] for a in a_labels]
        pictures.append(heat_maps("axes", {"": table}, a_labels, b_labels, (a_name, b_name)))
    return pictures


def search_maps(plan: Plan, runs: Sequence[Run], a_flag: str, b_flag: str) -> Picture:
    """One heat map per variant over two searched flags."""
    found: dict[tuple[str, str, str], float | None] = {}
    for run in runs:
        values = dict(run.planned.searched)
        found[run.planned.variant, values[a_flag], values[b_flag]] = run.best_loss
    a_values, b_values = plan.search[a_flag], plan.search[b_flag]
    tables = {name: [[found.get((name, a, b)) for b in b_values] for a in a_values] for name in plan.variants}
    return heat_maps("search", tables, a_values, b_values, (a_flag, b_flag))


def mean_best(runs: Sequence[Run], variant: str) -> float | None:
    """Mean over seeds of the variant's best validation loss at its best setting."""
    losses = [run.best_loss for run in chosen_runs(runs).get(variant, {}).values() if run.best_loss is not None]
    return sum(losses) / len(losses) if losses else None


def search_lines(plan: Plan, runs: Sequence[Run], flag: str) -> Picture:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for index, variant in enumerate(plan.variants):
        mine = [run for run in runs if run.planned.variant == variant]
        found = {dict(run.planned.searched)[flag]: run.best_loss or math.nan for run in mine}
        place = [k for k, value in enumerate(plan.search[flag]) if value in found]
        axis.plot(place, [found[plan.search[flag][k]] for k in place], marker="o", color=color(index), label=variant)
    axis.set_xticks(range(len(plan.search[flag])), plan.search[flag])
    axis.set(xlabel=flag, ylabel="best validation loss")
    axis.legend()
    return Picture("search", f"Best validation loss by {flag}, first seed.", figure)


def heat_maps(
    name: str,
    tables: dict[str, list[list[float | None]]],
    rows: Sequence[str],
    columns: Sequence[str],
    axes_names: Sequence[str],
) -> Picture:
    """One heat map per table; an empty cell is a run that failed or had no finite loss."""
    figure = Figure(figsize=(1.5 + 3.2 * len(tables), 0.8 + 0.6 * len(rows) + 1.0), layout="constrained")
    values = {title: np.array(table, dtype=float) for title, table in tables.items()}  # None becomes NaN
    everything = np.concatenate([table.ravel() for table in values.values()])
    low, high = (np.nanmin(everything), np.nanmax(everything)) if np.isfinite(everything).any() else (0.0, 1.0)
    for axis, (title, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], values.items(), strict=True):
        image = axis.imshow(table, cmap="viridis_r", vmin=low, vmax=high, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            label = f"{value:.4f}" if np.isfinite(value) else "none"
            axis.text(j, i, label, ha="center", va="center", color="w" if value > (low + high) / 2 else "k")
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(title=title, xlabel=axes_names[1], ylabel=axes_names[0])
    figure.colorbar(image, ax=figure.axes, label="best validation loss")
    return Picture(name, f"Best validation loss by {axes_names[0]} and {axes_names[1]}.", figure)
