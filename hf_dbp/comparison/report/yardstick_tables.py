"""The yardstick in words, tables and pictures: the headlines, the savings, the ends by length, the probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from matplotlib.figure import Figure

from hf_dbp.comparison.report.pages import Block, Heading, Items, Picture, Table
from hf_dbp.comparison.report.tables import certainty, mean, number, percent
from hf_dbp.comparison.report.yardstick import QUALITIES, Figures
from hf_dbp.comparison.statistics import mean_interval

__all__ = ["headline_of", "headlines", "yardstick_blocks", "yardstick_charts"]


def headline_of(pair: Figures) -> str:
    """The headline of the yardstick: the smallest saving, or why there is none to state."""
    who = f"{pair['other']} against {pair['baseline']}"
    if pair["headline"] is None:
        return f"{who}: no headline. Reasons: {'; '.join(pair['no_headline'])}."
    found = pair["savings"][pair["headline"]]
    bound = (
        f"at least (in {len(found['at_least'])} of {len(found['equal_length'])} seeds) " if found["at_least"] else ""
    )
    return (
        f"{who}: saves {bound}{percent(found['time'])} of the time and CO2e and {percent(found['steps'])} of the "
        f"steps, judged by the {pair['headline']}, where it saves least; {len(found['equal_length'])} paired seeds."
    )


def headlines(figures: Figures | None) -> list[str]:
    """The headline of each pair with complete schedules of several lengths."""
    return [headline_of(pair) for pair in figures["pairs"]] if figures is not None else []


def yardstick_blocks(figures: Figures) -> list[Block]:
    """The savings by each quality, the baselines' ends by length, and the probe."""
    blocks: list[Block] = [Heading("Saved, by complete schedules")]
    if figures["pairs"]:
        blocks += [savings_table(figures["pairs"]), ends_table(figures["pairs"]), ratio_table(figures["pairs"])]
    if figures["probe"]:
        blocks.append(probe_table(figures["probe"]))
    note = (
        "A baseline's schedules of other lengths use the setting that was best at the plan's length. Equal length: "
        "where the baseline's end, linear between lengths, first reaches the other's end of the same seed. CO2e is "
        "taken as proportional to time. Intervals do not include the uncertainty of the ratio of step times; a mean of "
        "which two or more seeds are bounds has none."
    )
    return [*blocks, Items([note])]


def savings_table(pairs: Sequence[Figures]) -> Table:
    rows = []
    for pair in pairs:
        for name, found in pair["savings"].items():
            equal = found["equal_length"].values()
            at_least = f"at least, {len(found['at_least'])}" if found["at_least"] else ""
            at_most = f"at most, {len(found['at_most'])}" if found["at_most"] else ""
            notes = [at_least, at_most, "" if equal else "one length alone"]
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
        "of the seeds",
    ]
    return Table("What a variant saves; a value below zero is a loss.", header, rows)


def ends_table(pairs: Sequence[Figures]) -> Table:
    rows = []
    for pair in pairs:
        for name, found in pair["savings"].items():
            ends = [(f"{steps} steps", end, found["margins"][steps]) for steps, end in found["ends"].items()]
            if (same := found["equal_time"]) is not None:
                ends.append((f"schedule of equal time, {same['steps']:.0f} steps", same["end"], same["margin"]))
            for length, end, test in ends:
                row = [f"{pair['baseline']}, {length}", name, mean(end), str(end["n"])]
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
        "Ends of complete schedules, one stopping step for all seeds; for a schedule of equal time, on the line "
        "between two lengths. An error in a metric is 1 - its value. The last column: by how many of its own standard "
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
