"""The report's text and tables, from the figures of `analyse`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_dbp.comparison.heads import HEADS
from hf_dbp.comparison.report.analysis import COSTS
from hf_dbp.comparison.report.pages import Block, Code, Heading, Items, Table

__all__ = ["headline", "introduction", "method_notes", "result_tables", "search_table"]

NONE = "-"
Figures = dict[str, Any]


def number(value: float | None, digits: int = 4) -> str:
    """A number as text in the report, with ``digits`` significant digits; a dash for None."""
    if value is None:
        return NONE
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


def mean(figures: Figures | None, digits: int = 4) -> str:
    """Mean and standard deviation over seeds, as text in the report."""
    if figures is None:
        return NONE
    spread = "" if figures["sd"] is None else f" ± {number(figures['sd'], 2)}"
    return number(figures["mean"], digits) + spread


def percent(figures: Figures | None, sign: int = 1) -> str:
    """A mean percentage with its 95 % interval; ``sign`` -1 turns a difference into a saving."""
    if figures is None:
        return NONE
    text = f"{sign * figures['mean']:+.1f} %"
    if figures["low"] is None:
        return text
    low, high = sorted((sign * figures["low"], sign * figures["high"]))
    return f"{text} [{low:+.1f}, {high:+.1f}]"


def certainty(test: Figures | None) -> str:
    """The p-value and the effect size of a paired test in words."""
    if test is None or test["p_value"] is None:
        return NONE
    return f"p = {test['p_value']:.2g}, d = {test['effect_size']:.2f}"


def setting(figures: Figures) -> str:
    return ", ".join(f"{flag} {value}" for flag, value in figures["setting"].items()) or NONE


def headline(analysis: Figures) -> list[str]:
    """One sentence per comparison, favourable or not."""
    sentences = []
    for row in analysis["comparisons"]:
        test, target = row["tests"]["best validation loss"], row["target"]
        if test is None:
            sentences.append(f"{row['other']} against {row['baseline']}: no seed has a finite loss on both sides.")
            continue
        verdict = "lower" if test["other"] < test["baseline"] else "not lower"
        text = (
            f"{row['other']} against {row['baseline']}: best validation loss {number(test['other'])} against "
            f"{number(test['baseline'])}, {verdict}: {percent(test['percent'])}"
        )
        text += f", {certainty(test)}" if test["p_value"] is not None else ""
        text += f", {plural(test['n'], 'seed')}."
        steps, seconds = (target["costs"][name] for name in ("steps", "seconds"))
        if steps is None:
            text += f" It never reaches {row['baseline']}'s best loss."
        elif steps["percent"] is None:
            text += f" {row['baseline']} has its best loss before its first step: there is nothing to save."
        else:
            text += (
                f" To {row['baseline']}'s best loss it saves {percent(steps['percent'], -1)} of the steps and "
                f"{percent(seconds['percent'], -1)} of the training time"
            )
            text += "." if len(target["reached"]) == target["of"] else f" ({reached(target)} seeds reach it)."
        sentences.append(text)
    return sentences


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def reached(target: Figures) -> str:
    return f"{len(target['reached'])} of {target['of']}"


def introduction(analysis: Figures, command: str, note: str, jobs: int, complete: Sequence[str]) -> list[Block]:
    """Headlines, those by complete schedules first, command, caveats, and the circumstances of the measurement."""
    lines = circumstances(analysis, jobs)
    if note:
        lines.append(f"Beside the runs: {note}")
    found = [*complete, *headline(analysis)]
    if complete:
        found.append(
            "Savings to a best loss are read in the middle of a schedule, where the learning rate is still high: judge "
            "by those of complete schedules, below."
        )
    blocks: list[Block] = [Heading(analysis["title"], 1), Items(found), Code(command), Items(lines)]
    if analysis["remarks"]:
        blocks += [Heading("Caveats"), Items(analysis["remarks"])]
    return blocks


def circumstances(analysis: Figures, jobs: int) -> list[str]:
    """The report's sentences on data, length, machine, energy and code."""
    where = analysis["setting"]
    hardware, data, energy, arguments = (where[key] for key in ("hardware", "data", "energy", "arguments"))
    devices = plural(hardware["gpus"], "GPU") if "gpus" in hardware else plural(hardware["cores"], "core")
    lines = [
        data_line(data),
        f"Length: {length(arguments, 'images' if 'train_images' in data else 'samples')}.",
        f"Machine: {hardware.get('gpu') or hardware['processor']}, {devices}; processes per run: "
        f"{hardware.get('processes', 1)}; runs at a time: {jobs}.",
    ]
    loads = [v["load_average"]["mean"] for v in analysis["variants"].values() if v["load_average"]]
    if loads:
        lines.append(f"Load average during the runs, mean of each variant: {min(loads):.1f} to {max(loads):.1f}.")
    if energy:
        lines.append(
            f"Energy: processor {energy['cpu']} ({energy['cpu_model']}), memory {energy['ram']}, GPU {energy['gpu']}; "
            f"counted is {energy['scope']}. Carbon intensity {energy['carbon_intensity_g_per_kwh']:g} g CO2e/kWh "
            f"({energy['country']}), codecarbon {energy['codecarbon']}."
        )
    packages = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines.append(f"Code: commit {where['commit'] or 'unknown'}; {packages}.")
    for name, head in HEADS.items():
        if analysis[name] and any(tuning := analysis[name].get("tuning", {}).values()):
            machines, commits, lengths = (" and ".join(found) or "not recorded" for found in tuning)
            lines.append(f"Fine-tuning as {head.model}: {lengths}; machine: {machines}; code: {commits}.")
    return lines


def data_line(data: Figures) -> str:
    """A sentence on the runs' data; for another script's record, whatever it says."""
    if "train_images" not in data:
        return "Data: " + (", ".join(f"{name} {value}" for name, value in data.items()) or "not recorded") + "."
    size = " x ".join(map(str, data.get("size", [])))
    return (
        f"Data: {data.get('source')}, {data['train_images']} training and {data.get('validation_images')} validation "
        f"images, {size} pixels, {data.get('channels')} channels."
    )


def length(arguments: Figures, unit: str) -> str:
    """Steps or epochs, and the batch size, in the report's words; for another script's record, whatever it says."""
    steps, epochs = arguments["max_steps"], arguments["num_train_epochs"]
    if not epochs and not steps:
        return "not recorded"
    told = f"{steps} steps" if steps and steps > 0 else f"{number(float(epochs))} epochs"
    return f"{told}, {arguments['per_device_train_batch_size']} {unit} per process and step"


def search_table(analysis: Figures) -> list[Block]:
    """The settings that every variant could choose from, and its choice."""
    best = {name: figures["setting"] for name, figures in analysis["variants"].items()}
    rows = []
    for row in analysis["search"]:
        state = "failed" if row["error"] else "diverged" if row["diverged"] else "ended"
        state = "chosen" if state == "ended" and row["setting"] == best.get(row["variant"]) else state
        rows.append([row["variant"], setting(row), number(row["best"]), number(row["final"]), state])
    header = ["variant", "setting", "best validation loss", "final", ""]
    offered: dict[str, set[str]] = {}
    for row in analysis["search"]:
        offered.setdefault(row["variant"], set()).add(setting(row))
    alike, counts = len({frozenset(values) for values in offered.values()}) <= 1, {len(v) for v in offered.values()}
    caption = "Every variant had the same settings to choose from"
    if not alike:
        budget = ", ".join(f"{name} {len(values)}" for name, values in offered.items())
        number_of = f"as many settings, {max(counts)}," if len(counts) == 1 else f"settings of its own ({budget})"
        caption = f"Every variant had {number_of} to choose from"
    return [Heading("The search"), Table(f"{caption} (first seed); others were not searched here.", header, rows)]


def result_tables(analysis: Figures) -> list[Block]:
    """The paper's Table 1, costs, tests, the cost of the target, and the heads."""
    blocks: list[Block] = [Heading("Results"), table_one(analysis), costs_table(analysis)]
    if analysis["comparisons"]:
        blocks += [target_table(analysis), tests_table(analysis)]
    for name in HEADS:
        if analysis[name]:
            blocks += head_tables(name, analysis[name])
    return blocks


def table_one(analysis: Figures) -> Table:
    rows = []
    for split in ("validation", "training"):
        for name, figures in analysis["variants"].items():
            cells = [f"{split}, {name}"]
            for moment in ("best", "final", "equal time"):
                cells += [mean(figures[split][moment]["loss"]), mean(figures[split][moment]["epoch"], 3)]
            rows.append(cells)
    header = ["", "best loss", "epoch", "final loss", "epoch", "loss at equal time", "epoch"]
    ended = f"within its schedule, when {analysis['baseline']} of the same seed has ended"
    caption = f"Losses, mean ± standard deviation over seeds. Equal time: {ended}."
    return Table(caption, header, rows)


def costs_table(analysis: Figures) -> Table:
    rows = [
        [
            name,
            setting(figures),
            str(len(figures["seeds"])),
            mean(figures["step_seconds"], 3),
            *(mean(figures["cost"][cost], 3) for cost in ("seconds", "kWh", "kg CO2e")),
        ]
        for name, figures in analysis["variants"].items()
    ]
    header = ["variant", "setting", "seeds", "median step (s)", "training (s)", "kWh", "kg CO2e"]
    return Table("What a whole run costs: training alone, without evaluation, checkpoints and start-up.", header, rows)


def target_table(analysis: Figures) -> Table:
    rows = []
    for row in analysis["comparisons"]:
        for name in COSTS:
            test = row["target"]["costs"][name]
            first = [f"{row['other']} to {row['baseline']}'s best", name, reached(row["target"])]
            cells = [NONE, "not reached" if name == "steps" else NONE, NONE, NONE]
            if test is not None:
                saving = percent(test["percent"], -1)
                cells = [number(test["baseline"]), number(test["other"]), saving, certainty(test)]
            rows.append([*first, *cells])
    header = ["", "", "seeds that reach it", "baseline", "other", "saving [95 %]", "paired t-test"]
    caption = "What it takes to reach the baseline's best validation loss; a saving below zero is a loss."
    return Table(caption, header, rows)


def tests_table(analysis: Figures) -> Table:
    rows = []
    for row in analysis["comparisons"]:
        for name, test in row["tests"].items():
            if test is not None:
                numbers = [number(test["baseline"]), number(test["other"]), percent(test["percent"]), certainty(test)]
                rows.append([f"{row['other']} against {row['baseline']}", name, str(test["n"]), *numbers])
    header = ["", "", "seeds", "baseline", "other", "difference [95 %]", "paired t-test"]
    return Table("Paired comparisons. The difference in step time is the step overhead.", header, rows)


def head_tables(name: str, figures: Figures) -> list[Block]:
    """Means and paired tests of every metric of a head."""
    head, data, blocks = HEADS[name], figures["data"], list[Block]()
    for index, (metric, label) in enumerate(head.metrics.items()):
        if index > 0 and metric not in figures:
            continue
        title, own = f"{label[0].upper()}{label[1:]}", figures.get(metric, figures)
        caption = f"{title} of {head.model}"
        if own is figures:
            caption += (
                f" on {data['source']} ({data['train_images']} training and {data['validation_images']} "
                "validation images)"
            )
            if head.guess is not None:
                caption += f"; always predicting the most common class scores {number(figures[head.guess])}"
        means = [[one, mean(value), str(value["n"])] for one, value in own["variants"].items() if value is not None]
        tests = [
            [f"{t['other']} against {t['baseline']}", *(number(t["test"][k]) for k in ("baseline", "other")),
             percent(t["test"]["percent"]), certainty(t["test"])]
            for t in own["tests"]
        ]  # fmt: skip
        header = ["", "baseline", "other", "difference [95 %]", "paired t-test"]
        blocks += [
            Table(f"{caption}.", ["encoder", label, "seeds"], means),
            Table(f"{title}, paired by seed.", header, tests),
        ]
    return blocks


def method_notes(num_seeds: int) -> list[Block]:
    """How the figures were measured."""
    choice = (
        " Each variant's setting was chosen on the seeds that all its settings have; they count among the pairs."
        if num_seeds > 1
        else ""
    )
    return [
        Heading("How it was measured"),
        Items(
            [
                "Runs of one seed start from the same weights and see the same images, crops and masks in one order."
                + choice,
                "Intervals are 95 % and t-based, of the mean over seeds of each pair's relative difference. p is of "
                "the two-sided paired t-test (SciPy), d is Cohen's d_z: mean over standard deviation of differences.",
                "Between two evaluations losses, times and energies are taken as linear; a target met at the first "
                "evaluation counts there. At equal time, a run that had ended sooner counts with its last loss.",
                "The training loss is the mean over the steps since the last evaluation.",
                "Times on a busy machine are noisy. Step times are medians of medians between evaluations and suffer "
                "least; training times, energies and what follows from them suffer in full.",
                "Correlations are measured outside the clock, at every layer that DBP can decorrelate in the encoder, "
                "on the same validation images for every variant; R = I where nothing is decorrelated.",
            ]
        ),
    ]
