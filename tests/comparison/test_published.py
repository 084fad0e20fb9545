"""What the documentation says of our own runs is what their reports and records say."""

import itertools
import json
import re
from pathlib import Path

import pytest

from hf_dbp.comparison.report.yardstick import mean_of_bounded, step_ratio
from hf_dbp.comparison.statistics import crossing, mean_interval, value_at

ROOT = Path(__file__).parents[2]
FAST = {
    "bp": "AdamW",
    "paper": "DBP, R every step",
    "every 5th step": "DBP, R every 5 steps",
    "block inputs": "DBP, block inputs",
    "block inputs, every 5th step": "DBP, block inputs, every 5 steps",
}


def published(name):
    """From a report under docs/results: each variant's best loss, and overhead and savings by (variant, baseline)."""
    report = json.loads((ROOT / "docs" / "results" / name / "report.json").read_text(encoding="utf-8"))
    losses, overheads, savings = {}, {}, {}
    for variant, figures in report["variants"].items():
        loss = figures["validation"]["best"]["loss"]
        losses[variant] = f"{loss['mean']:.3f} ± {loss['sd']:.3f}"
    for row in report["comparisons"]:
        pair = row["other"], row["baseline"]
        overheads[pair] = row["tests"]["step time"]["percent"]["mean"]
        costs = (row["target"]["costs"][cost]["percent"] for cost in ("steps", "seconds"))
        savings[pair] = [f"{-c['mean']:.0f} % [{-c['high']:.0f}, {-c['low']:.0f}]" for c in costs]
    return losses, overheads, savings


def cells_of(page):
    """The page's words, and the cells of each line of its tables."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return " ".join(text.split()), [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_page_on_when_it_pays_holds_the_tables_of_the_reports():
    page, table = cells_of("docs/when.md")
    losses, overheads, savings = published("methods")
    for variant, loss in losses.items():
        label = variant.replace("dbp+", "DBP + ").replace("adamw", "AdamW").replace("muon", "Muon")
        saved = (savings.get((variant, baseline), ["", ""]) for baseline in ("adamw", "muon"))
        assert [label, loss, *itertools.chain(*saved)] in table
    over_adamw, over_muon = overheads["dbp+adamw", "adamw"], overheads["dbp+muon", "muon"]
    assert f"took {over_adamw:.0f} % longer than AdamW's and {over_muon:.0f} % longer than Muon's" in page
    losses, overheads, savings = published("fast_settings")
    for variant, label in FAST.items():
        pair = variant, "bp"
        cells = [f"{overheads[pair]:+.1f} %", *savings[pair]] if pair in savings else ["", "", ""]
        assert [label, losses[variant], *cells] in table


YARDSTICK = {
    "adamw": "AdamW",
    "soap": "SOAP",
    "muon": "Muon",
    "dbp encoder+muon": "DBP of the encoder, under Muon",
    "dbp+muon": "DBP of the whole model, under Muon",
}


def yardstick_cells(name, variant):
    """From a report under docs/results: the variant's best loss, and what whole-model DBP saves to reach it."""
    report = json.loads((ROOT / "docs" / "results" / name / "report.json").read_text(encoding="utf-8"))
    if variant not in report["variants"]:
        return ["", "", ""]
    loss = report["variants"][variant]["validation"]["best"]["loss"]
    cells = [f"{loss['mean']:.3f} ± {loss['sd']:.3f}", "", ""]
    for pair in report["yardstick"]["pairs"]:
        saving = pair["savings"].get("validation loss")
        if (pair["baseline"], pair["other"]) == (variant, "dbp+muon") and saving:
            bound = "≥ " if saving["at_least"] else ""
            for cell, what in enumerate(("steps", "time"), start=1):
                mean = saving[what]
                cells[cell] = bound + saved(mean, 0)
    return cells


def saved(figures, digits, sign=""):
    """A mean saving in per cent, with its interval unless too many seeds are bounds."""
    text = f"{figures['mean']:{sign}.{digits}f} %"
    if figures["low"] is None:
        return text
    return f"{text} [{figures['low']:{sign}.{digits}f}, {figures['high']:{sign}.{digits}f}]"


def decimals(content):
    """Every number of a JSON content, rounded to three and to four decimals."""
    if isinstance(content, dict | list):
        values = content.values() if isinstance(content, dict) else content
        return set().union(*map(decimals, values))
    return {f"{content:.3f}", f"{content:.4f}"} if isinstance(content, float) else set()


def mean_of_muon_over_2400_steps():
    report = json.loads((ROOT / "docs/results/yardstick_long/report.json").read_text(encoding="utf-8"))
    (pair,) = report["yardstick"]["pairs"]
    return pair["savings"]["validation loss"]["ends"]["2400"]["mean"]


def test_losses_and_probes_of_the_variants_stand_in_their_records():
    folder = ROOT / "docs" / "results" / "yardstick"
    *_, section = (folder / "VARIANTS.md").read_text(encoding="utf-8").partition("## On deeper and wider models")
    files = (folder / name for name in ("variants_models.json", "variants.json", "mean_iou.json"))
    recorded = decimals([json.loads(file.read_text(encoding="utf-8")) for file in files])
    for name, variant in (("yardstick_tiny", "muon"), ("yardstick", "adamw"), ("yardstick", "soap")):
        recorded.add(yardstick_cells(name, variant)[0].split()[0])
    recorded |= decimals(records_of("report.json")["search"])
    recorded |= {f"{mean_of_muon_over_2400_steps():.4f}", soap_on_mini()[0].split()[0]}
    quoted = set(re.findall(r"\b0\.\d{3,4}\b", section))
    assert len(quoted) > 50 and not quoted - recorded


@pytest.mark.parametrize(
    ("name", "baseline"),
    [(name, "muon") for name in ("yardstick", "yardstick_tiny", "yardstick_long", "yardstick_wire_bonding")]
    + [("yardstick", "adamw"), ("yardstick_tiny", "adamw")],
)
def test_encoders_at_equal_time_are_those_of_the_reports(name, baseline):
    """The list of reports gives errors that the older reports leave to be interpolated."""
    results = ROOT / "docs" / "results"
    page = " ".join((results / "README.md").read_text(encoding="utf-8").split())
    pairs = json.loads((results / name / "report.json").read_text(encoding="utf-8"))["yardstick"]["pairs"]
    pair = next(one for one in pairs if (one["baseline"], one["other"]) == (baseline, "dbp+muon"))
    for quality in ("error of k nearest neighbours", "error of the linear probe"):
        found = pair["savings"][quality]
        curve = [(float(length), end["mean"]) for length, end in found["ends"].items()]
        end = value_at(curve, found["length"] * pair["step_ratio"]["mean"])
        dbp = f"{found['other_end']['mean']:.3f}"
        assert f"{end:.3f} and {dbp}" in page or f"{end:.3f} and DBP {dbp}" in page


def test_savings_by_the_encoder_are_those_of_the_reports():
    savings = {}
    for name in ("yardstick_tiny", "yardstick_long"):
        report = json.loads((ROOT / "docs" / "results" / name / "report.json").read_text(encoding="utf-8"))
        for pair in report["yardstick"]["pairs"]:
            for quality, found in pair["savings"].items():
                savings[name, pair["baseline"], quality.split()[-1]] = found
    page, when = (cells_of(file)[0] for file in ("README.md", "docs/when.md"))
    knn, linear = (savings["yardstick_tiny", "muon", quality] for quality in ("neighbours", "probe"))
    assert (len(knn["at_most"]), len(linear["at_least"])) == (1, 3)
    assert f"at most {saved(knn['steps'], 0)} of the steps and none of the time, {saved(knn['time'], 0)}" in page
    assert f"at least {saved(linear['steps'], 0)} of Muon's steps and {saved(linear['time'], 0)} of its time" in page
    assert f"≥ {saved(linear['steps'], 1, '+')} of Muon's steps and ≥ {saved(linear['time'], 1, '+')} of its" in when
    assert f"≤ {saved(knn['steps'], 1, '+')} and of its time ≤ {saved(knn['time'], 1, '+')}" in when
    adamw = savings["yardstick_tiny", "adamw", "neighbours"]
    assert not adamw["at_most"] and f"{saved(adamw['steps'], 1, '+')} of AdamW's steps" in when
    knn = savings["yardstick_long", "muon", "neighbours"]
    assert len(knn["at_most"]) == 1
    assert f"≤ {saved(knn['steps'], 1, '+')} of the steps and ≤ {saved(knn['time'], 1, '+')} of the time" in when


def single_runs(**wanted):
    """seed -> final loss of the runs beside the reports, from their records."""
    found = [
        r
        for r in records_of("variants_models.json")
        if r["arguments"].items() >= wanted.items() and "train_dir" not in r["arguments"]
    ]
    return {r["arguments"]["seed"]: r["validation_loss"] for r in found}


def soaps_step(name):
    """The step of whole-model DBP under Muon as a multiple of SOAP's."""
    report = json.loads((ROOT / "docs" / "results" / name / "report.json").read_text(encoding="utf-8"))
    times = report["yardstick"]["step_times"]
    return step_ratio({}, {}, (times["soap"], times["dbp+muon"]))["mean"]


def soap_on_tiny():
    """SOAP's cells of ViT-Tiny: its longer schedules are recorded beside the report, not in it."""
    loss, *_ = yardstick_cells("yardstick_tiny", "soap")
    longer = single_runs(model_size="tiny", optimizer="soap", max_steps=400)
    full = {"decorrelated_layers": "full", "wide_blocks": 1, "kappa": 0.1, "eta": 2e-3}
    dbp = single_runs(model_size="tiny", optimizer="muon", max_steps=200, learning_rate=5e-3, **full)
    assert longer.keys() == dbp.keys() == set(range(5))
    assert all(longer[seed] > dbp[seed] for seed in dbp)  # so 200 of 400 steps are a lower bound
    return [loss, "≥ 50 %", f"≥ {100 - 50 * soaps_step('yardstick_tiny'):.0f} %"]


def soap_on_mini():
    """SOAP's cells of `mini`, at a learning rate between those of the report."""
    runs = {
        steps: single_runs(model_size="mini", optimizer="soap", method="bp", max_steps=steps, learning_rate=5e-3)
        for steps in (300, 400, 600)
    }
    dbp = on_mini(REFERENCE, later=True)
    assert all(losses.keys() == dbp.keys() == set(range(5)) for losses in runs.values())
    own = mean_interval(list(runs[300].values()))
    equal = [crossing([(float(steps), losses[seed]) for steps, losses in runs.items()], dbp[seed]) for seed in dbp]
    beyond = equal.count(None)
    steps = [300 / (600 if at is None else at) for at in equal]
    cells = [f"{own.mean:.3f} ± {own.sd:.3f}"]
    for ratio in (1.0, soaps_step("yardstick")):
        figures = mean_of_bounded([100 * (1 - share * ratio) for share in steps], beyond)
        cells.append(("≥ " if beyond else "") + saved(figures, 0))
    return cells


def test_the_readme_says_what_the_reports_say():
    page, table = cells_of("README.md")
    for variant, label in YARDSTICK.items():
        mini, tiny = (yardstick_cells(name, variant) for name in ("yardstick", "yardstick_tiny"))
        if variant == "soap":
            mini, tiny = soap_on_mini(), soap_on_tiny()
        assert [label, *mini, *tiny] in table
    link = "[VARIANTS](results/yardstick/VARIANTS.md)"
    for cells in (soap_on_mini(), soap_on_tiny()):
        assert ["", "SOAP", *cells[1:], link] in cells_of("docs/when.md")[1]
    street = json.loads((ROOT / "docs" / "results" / "street_scenes" / "report.json").read_text(encoding="utf-8"))
    random, bp, dbp = (
        f"{street['segmentation']['variants'][name]['mean']:.3f}" for name in ("random weights", "muon", "dbp+muon")
    )
    assert (
        f"was {random} from random weights, {bp} after 2,400 steps of pre-training with Muon and {dbp} with DBP" in page
    )


VARIANTS = ROOT / "docs" / "results" / "yardstick"


def records_of(name):
    return json.loads((VARIANTS / name).read_text(encoding="utf-8"))


def seed_of(record):
    found = re.search(r"seed (\d)", record["model"])
    return record.get("seed", int(found.group(1)) if found else 0)


def on_mini(variant, *, later):
    """seed -> final loss of a variant, from the records of one H200 or, later, of one CPU core."""
    if not later:
        return {r["seed"]: r["validation_loss"] for r in records_of("variants_gpu.json") if r["variant"] == variant}
    if variant == "Newton-Muon":
        runs = [r for r in records_of("variants_models.json") if "damping 0.2 of" in r["arguments"].get("variant", "")]
        return {r["arguments"]["seed"]: r["validation_loss"] for r in runs if r["arguments"]["learning_rate"] == 1e-2}
    runs = [r for r in records_of("variants.json") if r["variant"] == variant and r["model"].startswith("mini")]
    return {seed_of(r): r["validation_loss"] for r in runs}


def mean_change(losses, others):
    """Mean over the common seeds of the relative difference, in per cent."""
    seeds = losses.keys() & others.keys()
    return 100 * sum(losses[seed] / others[seed] - 1 for seed in seeds) / len(seeds)


def steps_saved(change):
    """Where Muon's mean end, as a share of that of 300 steps, is as low: on the lines between its three lengths."""
    pairs = json.loads((VARIANTS / "report.json").read_text(encoding="utf-8"))["yardstick"]["pairs"]
    ends = next(pair for pair in pairs if pair["baseline"] == "muon")["savings"]["validation loss"]["ends"]
    curve = [(float(steps), end["mean"] / ends["300"]["mean"]) for steps, end in ends.items()]
    equal = crossing(curve, 1 + change / 100)
    return f"{100 * (1 - 300 / equal):.0f} %"


LATER = {  # rows of variants that were run later, on a CPU -> the name of their records
    "eta divided by the inputs' mean variance †": "whole model, kappa 0.1, scale-free eta",
    "eta warmed up over a tenth of the steps †": "whole model, kappa 0.1, eta warmed up over a tenth of the steps",
    "R frozen when its correlations no longer fall †": (
        "whole model, kappa 0.1, R frozen when its correlations no longer fall"
    ),
    "Newton-Muon †": "Newton-Muon",
}
HALF = "R frozen after half of the steps"
REFERENCE = "whole model, kappa 0.1"


def step_cost(variant):
    """Time and FLOPs of a step as multiples of Muon's, and MiB of matrices; like the reference's where not measured."""
    record = records_of("variants_step_times.json")
    if variant == HALF:
        frozen, whole = (step_cost(name) for name in ("R frozen (after eta_stop)", REFERENCE))
        return [(a + b) / 2 for a, b in zip(frozen, whole, strict=True)]
    name = variant.removesuffix(" †")
    name = name if name in record["seconds"] else REFERENCE
    own, muon = (record["seconds"][one] for one in (name, "Muon"))
    time = step_ratio({}, {}, (muon, own))["mean"]
    return [time, record["flops"][name] / record["flops"]["Muon"], record["matrix_bytes"][name] / 2**20]


def variant_cells(variant):
    """What the table of variants says of one, but for the verdict."""
    later = variant in LATER
    losses = on_mini(LATER.get(variant, variant), later=later)
    written = ", ".join(f"{loss:.4f}" for _, loss in sorted(losses.items()))
    time, flops, size = step_cost(variant)
    cost = [f"{time:.2f}", f"{flops:.3f}", f"{size:.1f}"]
    if variant == "Muon":
        return [variant, written, "", "", "", *cost]
    to_muon, to_reference = (mean_change(losses, on_mini(name, later=later)) for name in ("Muon", REFERENCE))
    return [
        variant, written, f"{to_muon:+.1f} %", steps_saved(to_muon),
        "" if variant == REFERENCE else f"{to_reference:+.1f} %", *cost,
    ]  # fmt: skip


def test_the_table_of_variants_is_that_of_the_records():
    text = (VARIANTS / "VARIANTS.md").read_text(encoding="utf-8")
    _, table = text.split("| variant | validation loss, seeds 0, 1, 2 |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n\n")[0].splitlines()[2:]]
    assert {row[0] for row in rows} >= {r["variant"] for r in records_of("variants_gpu.json")} | LATER.keys()
    for row in rows:
        assert row[:-1] == variant_cells(row[0])


def test_the_single_runs_of_variants_are_recorded():
    rows = cells_of("docs/results/yardstick/VARIANTS.md")[1]
    found = {(row[0], row[1]): row[2:4] for row in rows if len(row) == 5 and "steps of" in row[0]}
    records = {(r["model"], r["variant"]): r for r in records_of("variants.json") if "to_muon_percent" in r}
    assert found.keys() == records.keys()
    for key, record in records.items():
        assert found[key] == [f"{record['validation_loss']:.4f}", f"{record['to_muon_percent']:+.1f} %"]
