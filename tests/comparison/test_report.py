"""The report says what the runs say, whatever became of them."""

import json
import re

import pytest
from runs import NAN, QUICK, SLOW, made_plan, made_run

from hf_dbp.comparison.report import write_report
from hf_dbp.comparison.report.analysis import analyse
from hf_dbp.comparison.report.tables import headline
from hf_dbp.comparison.runs import Run, best_settings
from hf_dbp.comparison.statistics import paired_test


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
