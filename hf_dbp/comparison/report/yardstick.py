"""The yardstick: what a variant saves, from complete schedules of a baseline at several lengths.

Comparing the middle of one run's schedule with the end of another's is unfair, because the learning rate in the middle
is still high. So the baseline runs complete schedules of several lengths, and each seed's final values form a curve
over the length:

    equal length   where that curve first reaches the end of the other variant's run of T steps, same seed, on straight
                   lines between lengths
    steps saved    1 - T / (equal length)
    time saved     1 - T (step time of the other) / ((equal length) (step time of the baseline))

for the validation loss and, if encoders were probed or fine-tuned, for the error of k nearest neighbours, of the linear
probe and of each head (1 - mean IoU, for example). CO2e is taken as proportional to time, because the same machine
draws the same power. T is the same for all seeds. If the baseline reaches a seed's target at no length, the longest one
is used (the saving is *at least* that); if the shortest length already meets it, that one (*at most* that).

The headline is the smallest of the savings. There is none if the best setting of either side lies at the edge of those
tried or is the only one, the sides had different numbers of settings to choose from, a saving is at most what it says,
there is only one seed, some lack a quality, or the encoders were neither probed nor fine-tuned.

`margins` use one stopping step for all seeds: (baseline's mean end - other's mean end) * sqrt(n) / (sd of the other's
ends), for each length of the baseline. At *equal time* the baseline's schedule has T (step time of the other) / (step
time of the baseline) steps; its end is taken from the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from hf_dbp.comparison.heads import HEADS
from hf_dbp.comparison.plans import Plan
from hf_dbp.comparison.report.analysis import chosen_runs, final_loss, step_seconds
from hf_dbp.comparison.report.remarks import edge_remarks
from hf_dbp.comparison.runs import Run, RunsBySeed
from hf_dbp.comparison.statistics import crossing, margin, mean_interval, value_at

__all__ = ["QUALITIES", "yardstick_figures"]

Figures = dict[str, Any]
Ends = dict[int, dict[int, float]]  # length -> seed -> figure at the end


def probe_error(kind: str) -> Callable[[Run], float | None]:
    """A function that returns the share of test images that the probe gets wrong."""

    def figure(run: Run) -> float | None:
        return None if run.probe is None else 1.0 - float(run.probe[kind]["accuracy"])

    return figure


def head_error(head: str, metric: str) -> Callable[[Run], float | None]:
    """A function that returns 1 - the metric of the model that was fine-tuned from the run's encoder."""

    def figure(run: Run) -> float | None:
        value = run.heads.get(head, {}).get(metric)
        return None if value is None else 1.0 - float(value)

    return figure


FIRST = {head: task.first for head, task in HEADS.items()}
PROBES = {"error of k nearest neighbours": probe_error("knn"), "error of the linear probe": probe_error("linear")}
LOSS = "validation loss"
QUALITIES: dict[str, Callable[[Run], float | None]] = {
    LOSS: final_loss,
    **PROBES,
    **{f"error in {words}": head_error(head, metric) for head, (metric, words) in FIRST.items()},
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
        variant: {name: summary(by_seed, figure) for name, figure in PROBES.items()}
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
    """The saving of ``b`` by one quality (loss, probe); None if no seed has it on both sides. ``steps`` and ``time``
    are None if ``a`` has it at one length alone."""
    ends, own = ends_of(runs, chosen[a], a, figure), ends_of([], chosen[b], b, figure)
    if len(own) != 1:
        return None
    ((length, targets),) = own.items()
    equal: dict[int, float] = {}
    beyond, below = [], []
    for seed, target in sorted(targets.items()):
        curve = [(float(steps), by_seed[seed]) for steps, by_seed in ends.items() if seed in by_seed]
        if len(curve) < len(ends):
            continue  # one of the baseline's schedules is missing, so the others would misplace the seed
        met = crossing(curve, target)
        if met is None:
            beyond.append(seed)
        elif curve[0][1] < target:
            below.append(seed)
        equal[seed] = curve[-1][0] if met is None else met
    if not equal:
        return None
    if len(ends) == 1:
        equal, beyond, below = {}, [], []  # one point is no curve
    in_time = {seed: at_length(ends, seed, length * ratio) for seed in targets}
    kept = {seed: value for seed, value in in_time.items() if value is not None}
    steps = [100 * (1 - length / at) for at in equal.values()]
    time = [100 * (1 - length * ratio / at) for at in equal.values()]
    return {
        "length": length,
        "equal_length": equal,
        "at_least": beyond,
        "at_most": below,
        "steps": mean_of_bounded(steps, len(beyond + below)),
        "time": mean_of_bounded(time, len(beyond + below)),
        "ends": {steps: asdict(mean_interval(list(by_seed.values()))) for steps, by_seed in ends.items()},
        "other_end": asdict(mean_interval(list(targets.values()))),
        "margins": {steps: margin(by_seed, targets) for steps, by_seed in ends.items()},
        "equal_time": {
            "steps": length * ratio,
            "end": asdict(mean_interval(list(kept.values()))),
            "margin": margin(kept, targets),
        }
        if kept
        else None,
    }


def mean_of_bounded(values: Sequence[float], bounds: int) -> Figures | None:
    """Mean and interval of values of which so many are only bounds; their spread says nothing if it is two or more.
    None without values."""
    if not values:
        return None
    found = mean_interval(values)
    return asdict(found if bounds < 2 else replace(found, sd=None, low=None, high=None))


def at_length(ends: Ends, seed: int, steps: float) -> float | None:
    """The end of a schedule of so many steps, on the line between two lengths; None outside those that were run."""
    curve = [(float(length), by_seed[seed]) for length, by_seed in ends.items() if seed in by_seed]
    return value_at(curve, steps) if curve and steps <= curve[-1][0] else None


def refusals(plan: Plan, chosen: dict[str, RunsBySeed], a: str, b: str, savings: dict[str, Figures]) -> list[str]:
    """Why the yardstick has no headline for the pair; empty if it has one."""
    reasons = [remark.removesuffix(".") for remark in edge_remarks(plan, {name: chosen[name] for name in (a, b)})]
    tried = {name: settings_tried(plan, name) for name in (a, b)}
    if max(tried.values()) == 1:
        reasons.append("one setting was tried for each, so nobody knows whether a better one lies beyond")
    if tried[a] != tried[b]:
        reasons.append(f"{a} had {tried[a]} settings to choose from, {b} had {tried[b]}")
    if not savings:
        reasons.append("no seed has an end on both sides")
    for name, found in savings.items():
        if found["steps"] is None:
            reasons.append(f"{a} has the {name} at one length alone")
        elif found["at_most"]:
            shortest = min(found["ends"])
            reasons.append(f"{a} is ahead by {name} at its shortest length, {shortest} steps, for some seeds")
        elif len(found["equal_length"]) == 1:
            reasons.append(f"one seed by {name}: there is no interval")
    seeds = {len(found["equal_length"]) for found in savings.values() if found["steps"] is not None}
    if len(seeds) > 1:
        reasons.append("not every seed has every quality")
    asked = [*(PROBES if plan.probe is not None else ()), *(f"error in {FIRST[head][1]}" for head in plan.heads)]
    if not asked:
        reasons.append("the encoders were neither probed nor fine-tuned")
    return reasons + [f"no seed has the {name} on both sides" for name in asked if name not in savings]
