"""The yardstick: what a variant saves, from complete schedules of a baseline at several lengths.

Comparing the middle of one run's schedule with the end of another's is unfair, because the learning rate in the middle
is still high. So the baseline runs complete schedules of several lengths, and each seed's final values form a curve
over the length:

    equal length   where that curve first reaches the end of the other variant's run of T steps, same seed, on straight
                   lines between lengths
    steps saved    1 - T / (equal length)
    time saved     1 - T (step time of the other) / ((equal length) (step time of the baseline))

for the validation loss and, if encoders were probed, for the error of k nearest neighbours and of the linear probe.
CO2e is taken as proportional to time, because the same machine draws the same power. T is the same for all seeds. If
the baseline reaches a seed's target at no length, the longest one is used (the saving is *at least* that); if the
shortest length already meets it, the seed has no figure.

The headline is the smallest of the savings. There is none if the best setting of either side lies at the edge of those
tried, the sides had different numbers of settings to choose from, a seed has no figure, there is only one seed, or the
encoders were not probed.

`margins` use one stopping step for all seeds: (baseline's mean end - other's mean end) * sqrt(n) / (sd of the other's
ends), for each length of the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure

from hf_dbp.comparison.plans import Plan
from hf_dbp.comparison.report.analysis import chosen_runs, final_loss, step_seconds
from hf_dbp.comparison.report.pages import Block, Heading, Items, Picture, Table
from hf_dbp.comparison.report.remarks import edge_remarks
from hf_dbp.comparison.report.tables import certainty, mean, number, percent
from hf_dbp.comparison.runs import Run, RunsBySeed
from hf_dbp.comparison.statistics import crossing, margin, mean_interval

__all__ = ["QUALITIES", "yardstick_blocks", "yardstick_charts", "yardstick_figures"]

Figures = dict[str, Any]
Ends = dict[int, dict[int, float]]  # length -> seed -> figure at the end


def probe_error(kind: str) -> Callable[[Run], float | None]:
    """A function that returns the share of test images that the probe gets wrong."""

    def figure(run: Run) -> float | None:
        return None if run.probe is None else 1.0 - float(run.probe[kind]["accuracy"])

    return figure


QUALITIES: dict[str, Callable[[Run], float | None]] = {
    "validation loss": final_loss,
    "error of k nearest neighbours": probe_error("knn"),
    "error of the linear probe": probe_error("linear"),
}


def end_step(run: Run) -> int:
    assert run.record is not None
    return int(run.record.rows[-1]["step"])


def yardstick_figures(
    plan: Plan, runs: Sequence[Run], step_times: dict[str, list[float]] | None = None
) -> Figures | None:
    """The savings of every pair whose baseline has schedules of other lengths, and the probe of all variants.

    Args:
        plan: what was planned.
        runs: its runs, those of other lengths included.
        step_times: seconds of each variant's step, measured in turn; None to use the runs' own clocks.

    Returns:
        The figures; None if the plan has neither other lengths nor a probe.
    """
    if not plan.lengths and plan.probe is None:
        return None
    chosen = chosen_runs(runs)
    pairs = [
        pair_figures(plan, runs, chosen, a, b, step_times)
        for a, others in plan.against.items()
        for b in others
        if a in plan.lengths and a in chosen and b in chosen
    ]
    probes = {
        variant: {name: summary(by_seed, QUALITIES[name]) for name in list(QUALITIES)[1:]}
        for variant, by_seed in chosen.items()
        if any(run.probe is not None for run in by_seed.values())
    }
    return {"pairs": pairs, "probe": probes, "step_times": step_times}


def summary(by_seed: RunsBySeed, figure: Callable[[Run], float | None]) -> Figures | None:
    values = [value for run in by_seed.values() if (value := figure(run)) is not None]
    return asdict(mean_interval(values)) if values else None


def pair_figures(
    plan: Plan, runs: Sequence[Run], chosen: dict[str, RunsBySeed], a: str, b: str, times: dict[str, list[float]] | None
) -> Figures:
    """Variant ``b`` against the baseline ``a``: savings by each quality, and the headline or why there is none."""
    ratio = step_ratio(chosen[a], chosen[b], (times[a], times[b]) if times else None)
    savings = {}
    for name, figure in QUALITIES.items():
        found = saving(runs, chosen, a, b, figure, ratio["mean"])
        if found is not None:
            savings[name] = found
    reasons = refusals(plan, chosen, a, b, savings)
    headline = None
    if not reasons:
        headline = min(savings, key=lambda name: savings[name]["time"]["mean"])
    return {
        "baseline": a,
        "other": b,
        "budget": {name: settings_tried(plan, name) for name in (a, b)},
        "step_ratio": ratio,
        "savings": savings,
        "headline": headline,
        "no_headline": reasons,
    }


def settings_tried(plan: Plan, variant: str) -> int:
    return math.prod(len(values) for values in plan.searched(variant).values())


def step_ratio(baseline: RunsBySeed, other: RunsBySeed, times: tuple[list[float], list[float]] | None) -> Figures:
    """Step time of the other as a multiple of the baseline's, over turns of one process or over seeds of the runs."""
    if times is not None:
        pairs, source = list(zip(*times, strict=True)), "in turns"
    else:
        found = [(step_seconds(baseline[s]), step_seconds(other[s])) for s in sorted(baseline.keys() & other.keys())]
        pairs, source = [(x, y) for x, y in found if x is not None and y is not None], "runs' own clocks"
    if not pairs:
        return asdict(mean_interval([1.0])) | {"source": "not measured"}
    return asdict(mean_interval([y / x for x, y in pairs])) | {"source": source}


def ends_of(runs: Sequence[Run], chosen: RunsBySeed, variant: str, figure: Callable[[Run], float | None]) -> Ends:
    """The final values of the variant's complete schedules, its own length included."""
    best = next(iter(chosen.values())).planned.searched
    longer = [
        run
        for run in runs
        if run.planned.variant == variant and run.planned.length is not None and run.planned.searched == best
    ]
    ends: Ends = {}
    for run in (*chosen.values(), *longer):
        value = None if run.record is None else figure(run)
        if value is not None:
            ends.setdefault(end_step(run), {})[run.planned.seed] = value
    return dict(sorted(ends.items()))


def saving(
    runs: Sequence[Run], chosen: dict[str, RunsBySeed], a: str, b: str,
    figure: Callable[[Run], float | None], ratio: float,
) -> Figures | None:  # fmt: skip
    """The saving of ``b`` by one quality (loss, probe); None if no seed has it on both sides."""
    ends, own = ends_of(runs, chosen[a], a, figure), ends_of([], chosen[b], b, figure)
    if len(own) != 1:
        return None
    ((length, targets),) = own.items()
    equal: dict[int, float] = {}
    beyond, below = [], []
    for seed, target in sorted(targets.items()):
        curve = [(float(steps), by_seed[seed]) for steps, by_seed in ends.items() if seed in by_seed]
        if not curve:
            continue
        met = crossing(curve, target)
        if met is None:
            beyond.append(seed)
        elif curve[0][1] < target:
            below.append(seed)
            continue
        equal[seed] = curve[-1][0] if met is None else met
    if not equal and not below:
        return None
    steps = [100 * (1 - length / at) for at in equal.values()]
    time = [100 * (1 - length * ratio / at) for at in equal.values()]
    return {
        "length": length,
        "equal_length": equal,
        "at_least": beyond,
        "no_figure": below,
        "steps": asdict(mean_interval(steps)) if steps else None,
        "time": asdict(mean_interval(time)) if time else None,
        "ends": {steps: asdict(mean_interval(list(by_seed.values()))) for steps, by_seed in ends.items()},
        "other_end": asdict(mean_interval(list(targets.values()))),
        "margins": {steps: margin(by_seed, targets) for steps, by_seed in ends.items()},
    }


def refusals(plan: Plan, chosen: dict[str, RunsBySeed], a: str, b: str, savings: dict[str, Figures]) -> list[str]:
    """Why the yardstick has no headline for the pair; empty if it has one."""
    reasons = [remark.removesuffix(".") for remark in edge_remarks(plan, {name: chosen[name] for name in (a, b)})]
    tried = {name: settings_tried(plan, name) for name in (a, b)}
    if tried[a] != tried[b]:
        reasons.append(f"{a} had {tried[a]} settings to choose from, {b} had {tried[b]}")
    if not savings:
        reasons.append("no seed has an end on both sides")
    for name, found in savings.items():
        if found["no_figure"]:
            shortest = min(found["ends"])
            reasons.append(f"{a} is ahead by {name} at its shortest length, {shortest} steps, for some seeds")
        elif len(found["equal_length"]) == 1:
            reasons.append(f"one seed by {name}: there is no interval")
    if plan.probe is None:
        reasons.append("the encoders were not probed")
    return reasons


# ---- words, tables, pictures ----


def headline_of(pair: Figures) -> str:
    """The headline of the yardstick: the smallest saving, or why there is none to state."""
    who = f"{pair['other']} against {pair['baseline']}"
    if pair["headline"] is None:
        return f"{who}: no headline, for {'; '.join(pair['no_headline'])}."
    found = pair["savings"][pair["headline"]]
    bound = (
        f"at least (in {len(found['at_least'])} of {len(found['equal_length'])} seeds) " if found["at_least"] else ""
    )
    return (
        f"{who}: saves {bound}{percent(found['time'])} of the time and CO2e and {percent(found['steps'])} of the "
        f"steps, judged by the {pair['headline']}, where it saves least; {len(found['equal_length'])} paired seeds."
    )


def yardstick_blocks(figures: Figures) -> list[Block]:
    """The headlines, the savings by each quality, the baselines' ends by length, and the probe."""
    blocks: list[Block] = [Heading("Saved, by complete schedules")]
    if figures["pairs"]:
        blocks += [Items([headline_of(pair) for pair in figures["pairs"]])]
        blocks += [savings_table(figures["pairs"]), ends_table(figures["pairs"]), ratio_table(figures["pairs"])]
    if figures["probe"]:
        blocks.append(probe_table(figures["probe"]))
    note = (
        "A baseline's schedules of other lengths use the setting that was best at the plan's length. Equal length: "
        "where the baseline's end, linear between lengths, first reaches the other's end of the same seed. CO2e is "
        "taken as proportional to time. Intervals do not include the uncertainty of the ratio of step times."
    )
    return [*blocks, Items([note])]


def savings_table(pairs: Sequence[Figures]) -> Table:
    rows = []
    for pair in pairs:
        for name, found in pair["savings"].items():
            equal = found["equal_length"].values()
            at_least = f"at least, {len(found['at_least'])}" if found["at_least"] else ""
            notes = [at_least, f"no figure, {len(found['no_figure'])}" if found["no_figure"] else ""]
            rows.append(
                [
                    f"{pair['other']} against {pair['baseline']}",
                    name,
                    str(len(equal)),
                    str(found["length"]),
                    mean(asdict(mean_interval(list(equal)))) if equal else "-",
                    percent(found["steps"]),
                    percent(found["time"]),
                    "; ".join(note for note in notes if note) or "all between",
                ]
            )
    header = [
        "",
        "judged by",
        "seeds",
        "steps",
        "equal length",
        "steps saved [95 %]",
        "time, CO2e saved [95 %]",
        "seeds",
    ]
    return Table("What a variant saves; a value below zero is a loss.", header, rows)


def ends_table(pairs: Sequence[Figures]) -> Table:
    rows = []
    for pair in pairs:
        for name, found in pair["savings"].items():
            for steps, end in found["ends"].items():
                test = found["margins"][steps]
                row = [f"{pair['baseline']}, {steps} steps", name, mean(end), str(end["n"])]
                row += [f"{pair['other']}, {found['length']} steps", mean(found["other_end"])]
                if test is not None:
                    row += [percent(test["percent"]), certainty(test), number(test["standard_errors"], 3)]
                rows.append(row + ["-"] * (9 - len(row)))
    header = [
        "baseline",
        "at the end",
        "mean ± sd",
        "seeds",
        "other",
        "mean ± sd",
        "difference [95 %]",
        "paired t-test",
    ]
    caption = (
        "Ends of complete schedules, one stopping step for all seeds. The last column: by how many of its own standard "
        "errors the other's mean lies below the baseline's."
    )
    return Table(caption, [*header, "standard errors"], rows)


def ratio_table(pairs: Sequence[Figures]) -> Table:
    rows = []
    for pair in pairs:
        ratio, budget = pair["step_ratio"], pair["budget"]
        spread = "" if ratio["low"] is None else f" [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        rows.append(
            [
                f"{pair['other']} against {pair['baseline']}",
                f"{ratio['mean']:.3f}{spread}",
                f"{ratio['n']}, {ratio['source']}",
                *(str(budget[name]) for name in (pair["baseline"], pair["other"])),
            ]
        )
    header = ["", "step time, x baseline [95 %]", "measurements", "settings tried, baseline", "other"]
    return Table("Step times, and the search that each side had.", header, rows)


def probe_table(probes: dict[str, Figures]) -> Table:
    rows = [
        [name, *(accuracy(figures) for figures in found.values()), str(next(iter(found.values()))["n"])]
        for name, found in probes.items()
    ]
    header = ["frozen encoder of", "k nearest neighbours", "linear probe", "seeds"]
    return Table("Accuracy of the probe, mean ± standard deviation over seeds.", header, rows)


def accuracy(error: Figures | None) -> str:
    return "-" if error is None else mean(error | {"mean": 1.0 - error["mean"]})


def yardstick_charts(figures: Figures) -> list[Picture]:
    """For each quality, the ends of each baseline by length, and the other variants' ends as lines."""
    if not figures["pairs"]:
        return []
    names = [name for name in QUALITIES if any(name in pair["savings"] for pair in figures["pairs"])]
    figure = Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    shown = [pair[side] for side in ("baseline", "other") for pair in figures["pairs"]]
    colors = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(shown))}
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        drawn: set[str] = set()
        for pair in figures["pairs"]:
            found = pair["savings"].get(name)
            if found is None:
                continue
            if pair["baseline"] not in drawn:
                drawn.add(pair["baseline"])
                ends = found["ends"]
                errors = [end["sd"] or 0.0 for end in ends.values()]
                axis.errorbar(
                    list(ends), [end["mean"] for end in ends.values()], errors, marker="o",
                    color=colors[pair["baseline"]], label=pair["baseline"], capsize=3,
                )  # fmt: skip
            if pair["other"] not in drawn:
                drawn.add(pair["other"])
                target, color = found["other_end"]["mean"], colors[pair["other"]]
                axis.axhline(target, color=color, linestyle="--", linewidth=1)
                axis.plot([found["length"]], [target], marker="s", color=color, linestyle="", label=pair["other"])
        axis.set(xlabel="steps of the complete schedule", ylabel=name)
        axis.legend(fontsize=8)
    caption = "Ends of complete schedules: the baselines by length, mean ± standard deviation, and the others' ends."
    return [Picture("lengths", caption, figure)]
