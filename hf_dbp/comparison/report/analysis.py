"""Every figure of a comparison's report, computed from the runs' records: the content of `report.json`.

- *Best* is the lowest loss of a run, *final* its last, *equal time* its loss when the baseline of the same seed has
  ended (its last loss if it ended earlier).
- *To target*: steps, seconds, kWh and CO2e until the validation loss first meets the best one of the baseline of the
  same seed, on straight lines between evaluations. Seeds that never meet it are counted and left out of the means.
- *Step overhead* compares medians of step times, which temporary load on the machine hardly affects.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from hf_dbp.comparison.heads import HEADS
from hf_dbp.comparison.plans import Plan
from hf_dbp.comparison.report.remarks import remarks
from hf_dbp.comparison.runs import Run, RunsBySeed, best_settings
from hf_dbp.comparison.statistics import Mean, crossing, mean_interval, paired_test, value_at

__all__ = ["COSTS", "analyse", "chosen_runs", "points"]

#: cost of a run -> key in its rows
COSTS = {"steps": "step", "seconds": "train_seconds", "kWh": "kwh", "kg CO2e": "co2e_kg"}
LOSSES = {"validation": "eval_loss", "training": "train_loss"}


def points(run: Run, x: str, y: str) -> list[tuple[float, float]]:
    """(x, y) of every row of the run that has both."""
    assert run.record is not None
    return [(float(row[x]), float(row[y])) for row in run.record.rows if x in row and y in row]


def chosen_runs(runs: Sequence[Run]) -> dict[str, RunsBySeed]:
    """Each variant's finished runs at its best setting, by seed."""
    best = best_settings(runs)
    chosen: dict[str, RunsBySeed] = {variant: {} for variant in best}
    for run in runs:
        is_best = run.planned.length is None and best.get(run.planned.variant) == run.planned.searched
        if run.record is not None and is_best:
            chosen[run.planned.variant][run.planned.seed] = run
    return chosen


def analyse(
    plan: Plan, runs: Sequence[Run], random: Mapping[str, Sequence[dict[str, Any]]] | None = None
) -> dict[str, Any]:
    """All figures of the report by name.

    Args:
        plan: what was planned.
        runs: its runs, failed ones included.
        random: for each head, `eval.json` contents of fine-tuning from random weights.
    """
    chosen = chosen_runs(runs)
    pairs = [(a, b) for a, others in plan.against.items() for b in others if a in chosen and b in chosen]
    first = next((variant for variant in plan.against if variant in chosen), next(iter(chosen)))
    return {
        "title": plan.title,
        "search": [search_row(run) for run in runs if run.planned.seed == plan.seeds[0] and run.planned.length is None],
        "variants": {name: variant_figures(by_seed, chosen[first]) for name, by_seed in chosen.items()},
        "baseline": first,
        "comparisons": [compare(a, chosen[a], b, chosen[b]) for a, b in pairs],
        **{head: head_figures(head, chosen, pairs, (random or {}).get(head, ())) for head in HEADS},
        "remarks": remarks(plan, runs, chosen),
        "setting": setting_of(chosen),
    }


def search_row(run: Run) -> dict[str, Any]:
    final = None if run.record is None or not run.record.rows else run.record.rows[-1]["eval_loss"]
    return {
        "variant": run.planned.variant,
        "setting": dict(run.planned.searched),
        "best": run.best_loss,
        "final": final,
        "diverged": run.diverged,
        "error": run.error,
    }


def over(by_seed: RunsBySeed, figure: Callable[[Run], float | None]) -> Mean | None:
    """Mean of a figure over the compared runs that have it."""
    values = [value for run in by_seed.values() if (value := figure(run)) is not None and math.isfinite(value)]
    return mean_interval(values) if values else None


def best_row(run: Run, key: str) -> dict[str, Any] | None:
    assert run.record is not None
    rows = [row for row in run.record.rows if key in row and math.isfinite(row[key])]
    return min(rows, key=lambda row: row[key]) if rows else None


def last_row(run: Run, key: str) -> dict[str, Any] | None:
    assert run.record is not None
    return next((row for row in reversed(run.record.rows) if key in row), None)


def field_of(pick: Callable[[Run, str], dict[str, Any] | None], key: str, field: str) -> Callable[[Run], float | None]:
    """A function that returns ``field`` of the row that ``pick`` takes for ``key``."""

    def figure(run: Run) -> float | None:
        row = pick(run, key)
        return None if row is None else float(row[field])

    return figure


def at_time(baseline: RunsBySeed, field: str) -> Callable[[Run], float | None]:
    """A function that returns ``field`` at the time when the baseline of the same seed ended."""

    def figure(run: Run) -> float | None:
        other = baseline.get(run.planned.seed)
        if other is None or other.record is None or not other.record.rows:
            return None
        return value_at(points(run, "train_seconds", field), other.record.rows[-1]["train_seconds"])

    return figure


def step_seconds(run: Run) -> float | None:
    """Median over the run of the median step times between evaluations."""
    assert run.record is not None
    times = [row["step_seconds"] for row in run.record.rows if "step_seconds" in row]
    return float(statistics.median(times)) if times else None


def result_of(name: str) -> Callable[[Run], float | None]:
    def figure(run: Run) -> float | None:
        assert run.record is not None
        return run.record.results.get(name)

    return figure


def variant_figures(by_seed: RunsBySeed, baseline: RunsBySeed) -> dict[str, Any]:
    """One variant's means over its seeds: the rows of the paper's Table 1, and the cost of its runs."""
    table = {
        name: {
            moment: {"loss": over(by_seed, loss), "epoch": over(by_seed, epoch)}
            for moment, loss, epoch in (
                ("best", field_of(best_row, key, key), field_of(best_row, key, "epoch")),
                ("final", field_of(last_row, key, key), field_of(last_row, key, "epoch")),
                ("equal time", at_time(baseline, key), at_time(baseline, "epoch")),
            )
        }
        for name, key in LOSSES.items()
    }
    run = next(iter(by_seed.values()))
    costs = {"seconds": "train_seconds", "kWh": "kwh", "kg CO2e": "co2e_kg"}
    return plain(
        {
            "setting": dict(run.planned.searched),
            "seeds": sorted(by_seed),
            **table,
            "step_seconds": over(by_seed, step_seconds),
            "cost": {name: over(by_seed, result_of(key)) for name, key in costs.items()},
            "load_average": over(by_seed, load_average),
        }
    )


def load_average(run: Run) -> float | None:
    assert run.record is not None
    loads = [row["load_average"] for row in run.record.rows if "load_average" in row]
    return float(statistics.mean(loads)) if loads else None


def compare(a: str, baseline: RunsBySeed, b: str, other: RunsBySeed) -> dict[str, Any]:
    """One variant against a baseline, over the seeds that both have."""
    seeds = sorted(baseline.keys() & other.keys())
    figures: dict[str, Callable[[Run], float | None]] = {}
    for name, key in LOSSES.items():
        figures[f"best {name} loss"] = field_of(best_row, key, key)
        figures[f"final {name} loss"] = field_of(last_row, key, key)
        figures[f"{name} loss at equal time"] = at_time(baseline, key)
    figures["step time"] = step_seconds
    tests = {}
    for name, figure in figures.items():
        values = [(figure(baseline[seed]), figure(other[seed])) for seed in seeds]
        tests[name] = test(values)
    return plain(
        {"baseline": a, "other": b, "seeds": seeds, "tests": tests, "target": to_target(baseline, other, seeds)}
    )


def test(values: Sequence[tuple[float | None, float | None]]) -> Any:
    """Paired test, for the report, of the pairs with two finite numbers; None if there are none."""
    pairs = [(x, y) for x, y in values if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)]
    return paired_test([x for x, _ in pairs], [y for _, y in pairs]) if pairs else None


def to_target(baseline: RunsBySeed, other: RunsBySeed, seeds: Sequence[int]) -> dict[str, Any]:
    """The cost of both until the baseline's best validation loss of the same seed."""
    targets = {seed: best for seed in seeds if (best := baseline[seed].best_loss) is not None}

    def paid(run: Run, key: str) -> float | None:
        return crossing(points(run, key, "eval_loss"), targets[run.planned.seed])

    reached = [seed for seed in targets if paid(other[seed], "step") is not None]
    costs = {
        name: test([(paid(baseline[seed], key), paid(other[seed], key)) for seed in reached])
        for name, key in COSTS.items()
    }
    return {"losses": targets, "reached": reached, "of": len(targets), "costs": costs}


def head_figures(
    name: str, chosen: dict[str, RunsBySeed], pairs: Sequence[tuple[str, str]], random: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """The first metric of a head for the variants' encoders and random weights, and its other metrics by name; None
    without evaluations."""
    evaluations = [run.heads[name] for by_seed in chosen.values() for run in by_seed.values() if name in run.heads]
    if not evaluations:
        return None
    first, *others = (metric for metric in HEADS[name].metrics if metric in evaluations[0])

    def figures(metric: str) -> dict[str, Any]:
        return metric_figures(name, metric, chosen, pairs, random)

    shared = {key: evaluations[0][key] for key in ("data", HEADS[name].guess) if key is not None}
    shared["tuning"] = tuning([*evaluations, *random])
    return plain(figures(first) | {metric: figures(metric) for metric in others} | shared)


def tuning(evaluations: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The machines, commits and lengths of fine-tuning, each once; empty where a record does not say."""
    machines, commits, lengths = dict[str, None](), dict[str, None](), dict[str, None]()
    for evaluation in evaluations:
        if hardware := evaluation.get("hardware"):
            machines[hardware.get("gpu") or f"{hardware['processor']}, {hardware['cores']} cores"] = None
        if commit := evaluation.get("commit"):
            commits[commit] = None
        if arguments := evaluation.get("arguments"):
            steps, batch = arguments["max_steps"], arguments["per_device_train_batch_size"]
            told = f"{steps} steps" if steps > 0 else f"{arguments['num_train_epochs']} epochs"
            lengths[f"{told} of {batch} images"] = None
    return {"machines": [*machines], "commits": [*commits], "lengths": [*lengths]}


def metric_figures(
    head: str,
    metric: str,
    chosen: dict[str, RunsBySeed],
    pairs: Sequence[tuple[str, str]],
    random: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Means of a metric and its paired tests."""

    def score(run: Run) -> float | None:
        return float(run.heads[head][metric]) if head in run.heads else None

    variants = {name: over(by_seed, score) for name, by_seed in chosen.items()}
    randoms = {evaluation["seed"]: float(evaluation[metric]) for evaluation in random}
    tests = []
    for a, b in pairs:
        seeds = sorted(chosen[a].keys() & chosen[b].keys())
        values = [(score(chosen[a][seed]), score(chosen[b][seed])) for seed in seeds]
        tests.append({"baseline": a, "other": b, "test": test(values)})
    if randoms:
        variants["random weights"] = mean_interval(list(randoms.values()))
        for name, by_seed in chosen.items():
            pairs_of = [(randoms[s], score(by_seed[s])) for s in sorted(randoms.keys() & by_seed.keys())]
            tests.append({"baseline": "random weights", "other": name, "test": test(pairs_of)})
    return {"variants": variants, "tests": [row for row in tests if row["test"]]}


def final_loss(run: Run) -> float | None:
    """The validation loss at the end of the schedule."""
    rows = run.record.rows if run.record is not None else []
    return float(rows[-1]["eval_loss"]) if rows and math.isfinite(rows[-1]["eval_loss"]) else None


def setting_of(chosen: dict[str, RunsBySeed]) -> dict[str, Any]:
    """Hardware, data, versions and energy of the comparison, from its first run."""
    record = next(iter(next(iter(chosen.values())).values())).record
    assert record is not None
    arguments = {
        key: record.arguments.get(key) for key in ("max_steps", "num_train_epochs", "per_device_train_batch_size")
    }
    fields = {key: getattr(record, key) for key in ("hardware", "versions", "energy", "commit")}
    source = str(record.data.get("source"))
    data = record.data | {"source": Path(source).name if Path(source).is_absolute() else source}
    return {"arguments": arguments, "data": data, **fields}


def plain(figures: dict[str, Any]) -> dict[str, Any]:
    """The report's figures with all dataclasses as mappings."""

    def item(value: Any) -> Any:
        if isinstance(value, list):
            return [item(one) for one in value]
        return plain(value) if isinstance(value, dict) else asdict(value) if is_dataclass(value) else value  # type: ignore[arg-type]

    return {key: item(value) for key, value in figures.items()}
