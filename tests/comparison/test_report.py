"""The report says what the runs say, whatever became of them."""

import itertools
import json
import re
from pathlib import Path

import pytest
from runs import NAN, QUICK, SLOW, made_plan, made_run

from hf_dbp.comparison.report import write_report
from hf_dbp.comparison.report.analysis import analyse
from hf_dbp.comparison.report.tables import headline
from hf_dbp.comparison.report.yardstick import step_ratio
from hf_dbp.comparison.runs import Run, best_settings
from hf_dbp.comparison.statistics import paired_test, value_at


def three_seeds(variant, losses, **fields):
    return [made_run(variant, seed, [loss + 0.01 * seed for loss in losses], **fields) for seed in range(3)]


def paired_runs():
    runs = [*three_seeds("adamw", SLOW), *three_seeds("dbp+adamw", QUICK, second=1.2)]
    runs[3].record.rows[-1]["eval_loss"] -= 0.05  # so that differences vary
    return runs


def test_table_one_and_savings_are_those_of_the_curves():
    analysis = analyse(made_plan(), paired_runs())
    adamw, dbp = (analysis["variants"][name] for name in ("adamw", "dbp+adamw"))
    assert adamw["validation"]["best"]["loss"]["mean"] == pytest.approx(0.51)
    assert adamw["validation"]["best"]["epoch"]["mean"] == 2.0
    assert dbp["training"]["final"]["loss"]["mean"] == pytest.approx(0.31)
    # after 40 s BP has ended; DBP, at 1.2 s a step, is a third of the way from its third evaluation to its last
    equal_time = (0.5 - 0.15 / 3 + 0.51 - 0.1 / 3 + 0.52 - 0.1 / 3) / 3
    assert dbp["validation"]["equal time"]["loss"]["mean"] == pytest.approx(equal_time)
    assert dbp["validation"]["equal time"]["epoch"]["mean"] == pytest.approx(40 / 12 / 2)
    (comparison,) = analysis["comparisons"]
    costs = comparison["target"]["costs"]
    assert (costs["steps"]["baseline"], costs["steps"]["other"]) == (40.0, 30.0)
    assert costs["steps"]["percent"]["mean"] == pytest.approx(-25.0)
    assert (costs["seconds"]["baseline"], costs["seconds"]["other"]) == (40.0, 36.0)
    assert costs["kg CO2e"]["percent"]["mean"] == pytest.approx(-25.0)
    assert comparison["tests"]["step time"]["percent"]["mean"] == pytest.approx(20.0)
    best = paired_test([0.5, 0.51, 0.52], [0.35, 0.41, 0.42])
    found = comparison["tests"]["best validation loss"]
    assert (found["p_value"], found["effect_size"]) == pytest.approx((best.p_value, best.effect_size))
    assert analysis["remarks"] == []


def test_the_target_is_met_between_evaluations():
    runs = [made_run("adamw", 0, SLOW), made_run("dbp+adamw", 0, (0.9, 0.7, 0.3))]
    analysis = analyse(made_plan(seeds=[0]), runs)
    assert analysis["comparisons"][0]["target"]["costs"]["steps"]["other"] == pytest.approx(25.0)
    assert "Curves of unequal length: runs end after 30 to 40 steps." in analysis["remarks"]


def test_one_seed_says_so():
    analysis = analyse(made_plan(seeds=[0]), [made_run("adamw", 0, SLOW), made_run("dbp+adamw", 0, QUICK)])
    assert any(remark.startswith("One seed:") for remark in analysis["remarks"])
    (sentence,) = headline(analysis)
    assert "-20.0 %, 1 seed." in sentence
    assert "p =" not in sentence
    assert "saves +25.0 % of the steps" in sentence


def test_a_target_that_is_never_met_says_so():
    runs = [*three_seeds("adamw", QUICK), *three_seeds("dbp+adamw", SLOW)]
    analysis = analyse(made_plan(), runs)
    assert analysis["comparisons"][0]["target"]["costs"]["steps"] is None
    assert "not lower" in headline(analysis)[0]
    assert "It never reaches adamw's best loss." in headline(analysis)[0]
    runs[3] = made_run("dbp+adamw", 0, QUICK)
    assert "(1 of 3 seeds reach it)" in headline(analyse(made_plan(), runs))[0]


def test_diverged_failed_and_missing_runs_are_named():
    runs = paired_runs()
    runs[0] = made_run("adamw", 0, (1.0, NAN, NAN))
    runs[1] = made_run("adamw", 1, (1.0, 0.9, 2.0))
    runs[5] = Run(runs[5].planned, error="exit status 1: out of memory")
    plan = made_plan(("adamw", "dbp+adamw", "muon"))
    remarks = "\n".join(analyse(plan, runs)["remarks"])
    assert "adamw, seed 0 diverged" in remarks
    assert "adamw, seed 1 diverged" in remarks
    assert "dbp+adamw, seed 2 failed and is left out: exit status 1: out of memory" in remarks
    assert "muon has no finished run." in remarks
    assert "Unequal numbers of seeds (adamw 3, dbp+adamw 2)" in remarks


def test_runs_that_do_not_compare_are_named():
    runs = paired_runs()
    runs[3].record.data["train_images"] = 17
    runs[4].record.hardware = {"processor": "another", "cores": 1}
    runs[5].record.commit = "1" * 40
    remarks = "\n".join(analyse(made_plan(), runs)["remarks"])
    for what in ("Data", "Hardware", "Code (commit)"):
        assert f"{what} differ between runs that are compared." in remarks


def test_runs_of_one_variant_with_other_flags_are_named():
    """As when a default changed half-way through a comparison. What plain backprop does not use is no difference."""
    runs = paired_runs()
    for run in runs[0], runs[3]:
        run.record.arguments["update_interval"] = 1
    for run in runs[1:3] + runs[4:]:
        run.record.arguments["update_interval"] = 5
    remarks = analyse(made_plan(), runs)["remarks"]
    assert "dbp+adamw: not all seeds were run with the same --update_interval." in remarks
    assert not any(remark.startswith("adamw:") for remark in remarks)


def test_the_best_setting_is_chosen_without_diverged_runs_and_edges_are_named():
    plan = made_plan(
        ("adamw",),
        seeds=[0],
    )
    plan.search = {"learning_rate": ["1e-3", "2e-3", "4e-3"]}
    losses = {"1e-3": SLOW, "2e-3": QUICK, "4e-3": (0.9, 0.1, 5.0)}
    runs = [made_run("adamw", 0, curve, searched=[("learning_rate", rate)]) for rate, curve in losses.items()]
    analysis = analyse(plan, runs)
    assert analysis["variants"]["adamw"]["setting"] == {"learning_rate": "2e-3"}
    assert not any("edge" in remark for remark in analysis["remarks"])
    assert any("at the edge" in remark for remark in analyse(plan, [runs[0], runs[2]])["remarks"])


def searched_run(rate, seed, losses):
    return made_run("adamw", seed, losses, searched=[("learning_rate", rate)])


def test_settings_are_held_against_each_other_on_the_seeds_that_all_have():
    first = [searched_run("1e-3", 0, QUICK), searched_run("2e-3", 0, SLOW)]
    harder = [searched_run("1e-3", seed, (1.0, 0.9, 0.8, 0.7)) for seed in (1, 2)]
    assert best_settings(first + harder) == best_settings(first) == {"adamw": (("learning_rate", "1e-3"),)}
    diverged = [searched_run("1e-3", 1, (1.0, 0.9, 2.0))]
    assert best_settings(first + diverged) == best_settings(first)
    both = [*first, *harder, searched_run("2e-3", 1, QUICK), searched_run("2e-3", 2, QUICK)]
    assert best_settings(both) == {"adamw": (("learning_rate", "2e-3"),)}  # all have three seeds, and here all count
    apart = [searched_run("1e-3", 0, SLOW), searched_run("2e-3", 1, QUICK)]
    assert best_settings(apart) == {"adamw": (("learning_rate", "2e-3"),)}


def evaluation(seed, miou):
    rows = [{"epoch": float(k), "eval_mean_iou": miou * k / 3} for k in range(1, 4)]
    data = {"source": "made up", "train_images": 8, "validation_images": 4}
    return {"mean_iou": miou, "seed": seed, "evaluations": rows, "data": data, "majority_class_mean_iou": 0.1}


def test_mean_iou_is_paired_by_seed_and_held_against_random_weights(tmp_path, sketched):
    runs = paired_runs()
    for run in runs:
        better = run.planned.variant != "adamw"
        run.heads["segmentation"] = evaluation(run.planned.seed, 0.4 + 0.1 * better + 0.01 * run.planned.seed**2)
    random = {"segmentation": [evaluation(seed, 0.2 + 0.01 * seed) for seed in range(3)]}
    figures = analyse(made_plan(), runs, random)["segmentation"]
    assert figures["variants"]["random weights"]["mean"] == pytest.approx(0.21)
    tests = {(t["baseline"], t["other"]): t["test"] for t in figures["tests"]}
    assert tests["adamw", "dbp+adamw"]["difference"]["mean"] == pytest.approx(0.1)
    assert tests["random weights", "adamw"]["n"] == 3
    sketched.add("miou")
    write_report(tmp_path, made_plan(), runs, command="c", random=random)
    assert "random weights" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "miou.svg").stat().st_size > 1000


def test_a_head_that_was_not_evaluated_during_training_has_no_curves(tmp_path, sketched):
    runs = paired_runs()
    for run in runs:
        run.heads["segmentation"] = evaluation(run.planned.seed, 0.4) | {"evaluations": []}
    write_report(tmp_path, made_plan(), runs, command="c")
    assert "Mean IoU of a segmentation model" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / "miou.svg").exists()


def classified(seed, accuracy):
    rows = [{"epoch": float(k), "eval_accuracy": accuracy * k / 3} for k in range(1, 4)]
    data = {"source": "tiles", "train_images": 8, "validation_images": 4}
    return {"accuracy": accuracy, "balanced_accuracy": accuracy - 0.2, "seed": seed, "evaluations": rows, "data": data,
            "majority_class_accuracy": 0.3}  # fmt: skip


def test_accuracies_of_a_classifier_stand_beside_one_another(tmp_path, sketched):
    runs = paired_runs()
    for run in runs:
        better = run.planned.variant != "adamw"
        run.heads["classification"] = classified(run.planned.seed, 0.5 + 0.1 * better + 0.01 * run.planned.seed**2)
    random = {"classification": [classified(seed, 0.4) for seed in range(3)]}
    analysis = analyse(made_plan(), runs, random)
    figures = analysis["classification"]
    assert analysis["segmentation"] is None
    assert figures["variants"]["random weights"]["mean"] == pytest.approx(0.4)
    assert figures["balanced_accuracy"]["variants"]["random weights"]["mean"] == pytest.approx(0.2)
    for one in (figures, figures["balanced_accuracy"]):
        tests = {(t["baseline"], t["other"]): t["test"] for t in one["tests"]}
        assert tests["adamw", "dbp+adamw"]["difference"]["mean"] == pytest.approx(0.1)
        assert tests["random weights", "adamw"]["n"] == 3
    write_report(tmp_path, made_plan(), runs, command="c", random=random)
    page = (tmp_path / "README.md").read_text()
    for part in ("Accuracy of a classifier on tiles (8 training and 4 validation images)", "scores 0.3.",
                 "Balanced accuracy of a classifier.", "Balanced accuracy, paired by seed."):  # fmt: skip
        assert part in page
    assert (tmp_path / "accuracy.svg").is_file() and not (tmp_path / "miou.svg").exists()


def detected(seed, precision, masks):
    rows = [{"epoch": float(k), "eval_map": precision * k / 3} for k in range(1, 4)]
    data = {"source": "photos", "train_images": 8, "validation_images": 4}
    of_masks = {"mask_map": precision - 0.1, "mask_map_50": precision + 0.1} if masks else {}
    where = {"hardware": {"processor": f"EPYC {seed % 2}", "cores": 2}, "commit": "abc", "arguments": {
        "max_steps": 600, "num_train_epochs": 3.0, "per_device_train_batch_size": 4}}  # fmt: skip
    return {"map": precision, "map_50": precision + 0.2, **of_masks, "seed": seed, "evaluations": rows, "data": data,
            **where}  # fmt: skip


@pytest.mark.parametrize("masks", [False, True])
def test_precisions_of_a_detector_stand_beside_one_another(tmp_path, sketched, masks):
    runs = paired_runs()
    for run in runs:
        better = run.planned.variant != "adamw"
        run.heads["detection"] = detected(run.planned.seed, 0.3 + 0.1 * better + 0.01 * run.planned.seed**2, masks)
    figures = analyse(made_plan(), runs)["detection"]
    of_masks = [figures[name] for name in ("mask_map", "mask_map_50") if name in figures]
    assert len(of_masks) == 2 * masks
    for one in (figures, figures["map_50"], *of_masks):
        (test,) = (t["test"] for t in one["tests"] if (t["baseline"], t["other"]) == ("adamw", "dbp+adamw"))
        assert test["difference"]["mean"] == pytest.approx(0.1)
    write_report(tmp_path, made_plan(), runs, command="c")
    page = (tmp_path / "README.md").read_text()
    for part in ("Mean average precision of a detector on photos (8 training and 4 validation images).",
                 "AP50 of a detector.", "AP50, paired by seed.", "Fine-tuning as a detector: 600 steps of 4 images; "
                 "machine: EPYC 0, 2 cores and EPYC 1, 2 cores; code: abc."):  # fmt: skip
        assert part in page
    for part in ("Mean average precision of masks of a detector.", "AP50 of masks, paired by seed."):
        assert (part in page) == masks
    assert "most common class" not in page and (tmp_path / "map.svg").is_file()


def grid_runs(plan):
    return [
        made_run(variant, 0, QUICK, searched=[("learning_rate", a), ("eta", b)])
        for variant in plan.variants
        for a in plan.search["learning_rate"]
        for b in plan.search["eta"]
    ]


def written(folder):
    return write_report(folder, made_plan(), paired_runs(), command="python x.py --note <b>", note="nothing", jobs=2)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The HTML page of a report."""
    return written(tmp_path_factory.mktemp("report"))


def test_pages_hold_every_table_and_figure_and_nothing_from_elsewhere(report):
    folder = report.parent
    page, markdown = report.read_text(), (folder / "README.md").read_text()
    names = re.findall(r"\]\((\w+\.(?:png|svg))\)", markdown)
    assert {name.split(".")[0] for name in names} == {"loss_by_epoch", "loss_by_time", "to_target", "correlations"}
    assert all((folder / name).stat().st_size > 1000 for name in names)
    assert page.count("data:image/svg+xml;base64,") == len(names) / 2
    assert page.count("<table>") == len(re.findall(r"^\| ---", markdown, flags=re.M)) == 5
    assert not re.search(r"""(src|href)=["'](?!data:)|<script|@import|url\(""", page)
    assert "&lt;b&gt;" in page
    for text in (page, markdown):
        assert "Beside the runs: nothing" in text
        assert "500 g CO2e/kWh" in text
    content = json.loads((folder / "report.json").read_text())
    assert content["comparisons"][0]["target"]["reached"] == [0, 1, 2]


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


def test_losses_and_probes_of_the_variants_stand_in_their_records():
    folder = ROOT / "docs" / "results" / "yardstick"
    *_, section = (folder / "VARIANTS.md").read_text(encoding="utf-8").partition("## On deeper and wider models")
    files = (folder / name for name in ("variants_models.json", "variants.json", "mean_iou.json"))
    recorded = decimals([json.loads(file.read_text(encoding="utf-8")) for file in files])
    for name, variant in (("yardstick_tiny", "muon"), ("yardstick", "adamw"), ("yardstick", "soap")):
        recorded.add(yardstick_cells(name, variant)[0].split()[0])
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


def soap_on_tiny():
    """SOAP's cells of ViT-Tiny: its longer schedules are recorded beside the report, not in it."""
    loss, *_ = yardstick_cells("yardstick_tiny", "soap")
    results = ROOT / "docs" / "results"
    yardstick = json.loads((results / "yardstick_tiny" / "report.json").read_text(encoding="utf-8"))["yardstick"]
    dbp = next(pair["savings"]["validation loss"]["other_end"] for pair in yardstick["pairs"])
    records = json.loads((results / "yardstick" / "variants_models.json").read_text(encoding="utf-8"))
    runs = [record for record in records if record["arguments"]["model_size"] == "tiny"]
    longer = [record for record in runs if record["arguments"]["optimizer"] == "soap"]
    assert {record["arguments"]["max_steps"] for record in longer} == {400}
    assert min(record["validation_loss"] for record in longer) > dbp["high"]  # so 200 of 400 steps are a lower bound
    times = yardstick["step_times"]
    ratio = step_ratio({}, {}, (times["soap"], times["dbp+muon"]))["mean"]
    return [loss, f"≥ 50 % ({len(longer)} seeds)", f"≥ {100 - 50 * ratio:.0f} % ({len(longer)} seeds)"]


def test_the_readme_says_what_the_reports_say():
    page, table = cells_of("README.md")
    for variant, label in YARDSTICK.items():
        tiny = soap_on_tiny() if variant == "soap" else yardstick_cells("yardstick_tiny", variant)
        assert [label, *yardstick_cells("yardstick", variant), *tiny] in table
    street = json.loads((ROOT / "docs" / "results" / "street_scenes" / "report.json").read_text(encoding="utf-8"))
    random, bp, dbp = (
        f"{street['segmentation']['variants'][name]['mean']:.3f}" for name in ("random weights", "muon", "dbp+muon")
    )
    assert (
        f"was {random} from random weights, {bp} after 2,400 steps of pre-training with Muon and {dbp} with DBP" in page
    )


@pytest.mark.slow
def test_the_report_is_the_same_at_every_call(report, tmp_path):
    written(tmp_path)
    for file in report.parent.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name


def test_grids_become_heat_maps(tmp_path, sketched):
    sketched |= {"search", "axes"}
    plan = made_plan(seeds=[0])
    plan.search = {"learning_rate": ["1e-3", "2e-3"], "eta": ["0", "5e-4"]}
    write_report(tmp_path / "search", plan, grid_runs(plan)[:-1], command="c")
    assert "by learning_rate and eta" in (tmp_path / "search" / "README.md").read_text()
    axes = made_plan(("a, x", "a, y", "b, x", "b, y"), seeds=[0])
    axes.axes = {"one": ["a", "b"], "two": ["x", "y"]}
    write_report(tmp_path / "axes", axes, [made_run(name, 0) for name in axes.variants], command="c")
    assert "by one and two" in (tmp_path / "axes" / "README.md").read_text()


def test_a_baseline_that_is_best_before_its_first_step_is_reported(tmp_path, sketched):
    """With --eval_on_start the first evaluation costs nothing, and nothing is relative to that."""
    runs = [made_run("adamw", 0, (0.5, 0.9, 0.8)), made_run("dbp+adamw", 0, (0.6, 0.5, 0.4))]
    for run in runs:
        run.record.rows[0] |= dict.fromkeys(("step", "epoch", "train_seconds", "kwh", "co2e_kg"), 0)
    write_report(tmp_path, made_plan(seeds=[0]), runs, command="c")
    page = (tmp_path / "README.md").read_text()
    assert "adamw has its best loss before its first step: there is nothing to save." in page
    assert "| dbp+adamw to adamw's best | seconds | 1 of 1 | 0 | 20 | - | - |" in page


@pytest.mark.slow
def test_nothing_but_diverged_runs_is_still_reported(tmp_path):
    runs = [made_run("adamw", 0, (1.0, NAN)), made_run("dbp+adamw", 0, (NAN, NAN))]
    write_report(tmp_path, made_plan(seeds=[0]), runs, command="c")
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
