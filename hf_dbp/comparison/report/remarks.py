"""What a reader must know to judge a comparison: failed, missing and unequal runs, settings at an edge."""

from __future__ import annotations

from collections.abc import Sequence

from hf_dbp.comparison.plans import Plan, is_number
from hf_dbp.comparison.runs import Run, RunsBySeed, varied_flags

__all__ = ["edge_remarks", "remarks"]

DATA_KEYS = ("source", "train_images", "validation_images", "size", "channels", "mean", "std")


def remarks(plan: Plan, runs: Sequence[Run], chosen: dict[str, RunsBySeed]) -> list[str]:
    """Caveats that the runs themselves reveal."""
    found = []
    for run in runs:
        name = run.planned.name
        if run.error is not None:
            found.append(f"{name} failed and is left out: {run.error}")
        elif run.diverged:
            found.append(f"{name} diverged: its validation loss ended above where it began, or was not finite.")
        found += [f"{name}: {note}" for note in run.notes]
    found += left_out(plan, runs, chosen)
    for variant in plan.variants:
        if variant not in chosen:
            found.append(f"{variant} has no finished run.")
    if chosen and min(map(len, chosen.values())) == 1:
        found.append("One seed: there is neither interval nor significance; another seed could turn the order round.")
    if len({len(by_seed) for by_seed in chosen.values()}) > 1:
        counts = ", ".join(f"{name} {len(by_seed)}" for name, by_seed in chosen.items())
        found.append(f"Unequal numbers of seeds ({counts}): each comparison uses the seeds that both have.")
    lengths = {
        run.record.rows[-1]["step"] for by in chosen.values() for run in by.values() if run.record and run.record.rows
    }
    if len(lengths) > 1:
        found.append(f"Curves of unequal length: runs end after {min(lengths)} to {max(lengths)} steps.")
    found += edge_remarks(plan, chosen)
    edges = sum(run.probe is not None and run.probe["linear"].get("at_edge", False) for run in runs)
    if edges:
        found.append(
            f"Linear probes that chose a penalty at the edge of those tried: {edges}. These accuracies may be too low, "
            "and not equally for every method."
        )
    for variant, by_seed in chosen.items():
        flags = varied_flags([run.record for run in by_seed.values() if run.record is not None])
        if flags:
            found.append(f"{variant}: not all seeds were run with the same --{', --'.join(flags)}.")
    for key, what in (("data", "Data"), ("hardware", "Hardware"), ("commit", "Code (commit)")):
        if differs(chosen, key):
            found.append(f"{what} differ between runs that are compared.")
    return found


def left_out(plan: Plan, runs: Sequence[Run], chosen: dict[str, RunsBySeed]) -> list[str]:
    """Finished runs of a comparison at a setting that was not chosen, except those of the search with the first
    seed."""
    found = []
    for run in runs:
        by_seed = chosen.get(run.planned.variant, {})
        searched = run.planned.seed == plan.seeds[0] and run.planned.seed in by_seed
        finished = run.record is not None and run.planned.length is None
        if finished and by_seed and run not in by_seed.values() and not searched:
            best = next(iter(by_seed.values())).planned.setting
            found.append(f"{run.planned.name} is left out: the setting chosen for {run.planned.variant} is {best}.")
    return found


def edge_remarks(plan: Plan, chosen: dict[str, RunsBySeed]) -> list[str]:
    """Best settings at the edge of the searched range: a better one may lie beyond."""
    found = []
    for variant, by_seed in chosen.items():
        for flag, value in next(iter(by_seed.values())).planned.searched:
            values = sorted({float(v) for v in plan.searched(variant).get(flag, []) if is_number(v)})
            if len(values) > 1 and is_number(value) and float(value) in (values[0], values[-1]):
                found.append(f"{variant}: the best {flag}, {value}, is at the edge of what was tried.")
    return found


def differs(chosen: dict[str, RunsBySeed], key: str) -> bool:
    """Whether runs of one seed differ in this field of their records."""
    by_seed: dict[int, set[str]] = {}
    for runs in chosen.values():
        for seed, run in runs.items():
            value = getattr(run.record, key)
            if key == "data":
                value = {name: value.get(name) for name in DATA_KEYS}
            by_seed.setdefault(seed, set()).add(repr(value))
    return any(len(values) > 1 for values in by_seed.values())
