"""Savings come from complete schedules of several lengths; a headline is the smallest of them or is refused."""

import dataclasses
import json

import pytest
from runs import made_plan, made_run

from hf_dbp.comparison.plans import Finetuning, Plan, Probe, read_plan
from hf_dbp.comparison.report import write_report
from hf_dbp.comparison.report.analysis import analyse
from hf_dbp.comparison.report.yardstick import yardstick_figures
from hf_dbp.comparison.report.yardstick_tables import headline_of

SEEDS = range(3)
SEARCH = {"learning_rate": ["5e-4", "1e-3", "2e-3"]}


def ended(variant, seed, steps, loss, *, accuracy=None, second=1.0, usual=40):
    """A run with a complete schedule of so many steps that ends with this loss; its encoder is probed."""
    losses = [1.0] * (steps // 10 - 1) + [loss]
    run = made_run(variant, seed, losses, second=second, searched=[("learning_rate", "1e-3")])
    run.planned = dataclasses.replace(run.planned, length=None if steps == usual else steps)
    if accuracy is not None:
        run.probe = {"knn": {"accuracy": accuracy}, "linear": {"accuracy": accuracy + 0.1}}
    return run


def figures_of(seed, **changed):
    """The runs of one seed: AdamW for 40, 60 and 80 steps, and DBP for 40 at 1.1 s a step."""
    off = 0.01 * seed
    runs = [
        ended("adamw", seed, 40, 0.50 + off, accuracy=0.50),
        ended("adamw", seed, 60, 0.40 + off, accuracy=0.60),
        ended("adamw", seed, 80, 0.30 + off, accuracy=0.70),
        ended(
            "dbp+adamw", seed, 40, changed.get("loss", 0.35) + off, accuracy=changed.get("accuracy", 0.55), second=1.1
        ),
    ]
    return runs


def plan_with(**fields) -> Plan:
    plan = made_plan(lengths={"adamw": [60, 80]}, **{"probe": Probe(), **fields})
    plan.search = SEARCH
    return plan


def pair(plan, runs, **kwargs):
    (found,) = yardstick_figures(plan, runs, **kwargs)["pairs"]
    return found


def test_linear_probes_at_the_edge_of_their_penalties_are_counted():
    runs = [run for seed in SEEDS for run in figures_of(seed)]
    assert not any("edge of those tried" in remark for remark in analyse(plan_with(), runs)["remarks"])
    for run in runs[:2]:
        run.probe["linear"]["at_edge"] = True
    assert any("edge of those tried: 2." in remark for remark in analyse(plan_with(), runs)["remarks"])


def test_the_saving_is_from_the_length_at_which_the_baseline_ends_alike():
    found = pair(plan_with(), [run for seed in SEEDS for run in figures_of(seed)])
    loss, knn = found["savings"]["validation loss"], found["savings"]["error of k nearest neighbours"]
    assert loss["equal_length"] == pytest.approx(dict.fromkeys(SEEDS, 70.0))
    assert loss["steps"]["mean"] == pytest.approx(100 * (1 - 40 / 70))
    assert loss["time"]["mean"] == pytest.approx(100 * (1 - 44 / 70))
    assert knn["equal_length"] == pytest.approx(dict.fromkeys(SEEDS, 50.0))
    assert knn["steps"]["mean"] == pytest.approx(20.0)
    assert loss["margins"][40]["percent"]["mean"] == pytest.approx(-100 * 0.15 / 0.51, rel=0.01)
    # the encoder gains less than the loss: that is what the headline says
    assert found["headline"] == "error of k nearest neighbours"
    assert "saves +12.0 % [+12.0, +12.0] of the time" in headline_of(found)


def test_step_times_in_turns_stand_in_for_the_runs_clocks():
    runs = [run for seed in SEEDS for run in figures_of(seed)]
    found = pair(plan_with(), runs, step_times={"adamw": [1.0, 2.0], "dbp+adamw": [1.02, 2.04]})
    assert found["step_ratio"]["mean"] == pytest.approx(1.02)
    assert found["savings"]["validation loss"]["time"]["mean"] == pytest.approx(100 * (1 - 40.8 / 70))


def test_what_the_longest_length_does_not_reach_counts_with_it_and_says_so():
    runs = [run for seed in SEEDS for run in figures_of(seed, loss=0.2, accuracy=0.9)]
    found = pair(plan_with(), runs)
    assert found["savings"]["validation loss"]["at_least"] == [0, 1, 2]
    assert found["savings"]["validation loss"]["steps"]["mean"] == pytest.approx(50.0)
    assert "saves at least (in 3 of 3 seeds) +45.0 % of the time" in headline_of(found)  # bounds have no interval


def test_a_baseline_that_is_ahead_at_its_shortest_length_leaves_no_headline():
    runs = [run for seed in SEEDS for run in figures_of(seed, accuracy=0.3 if seed == 1 else 0.55)]
    found = pair(plan_with(), runs)
    knn = found["savings"]["error of k nearest neighbours"]
    assert knn["at_most"] == [1] and knn["equal_length"] == pytest.approx({0: 50.0, 1: 40.0, 2: 50.0})
    assert knn["steps"]["mean"] == pytest.approx((20.0 + 0.0 + 20.0) / 3)  # the seed is not left out of the mean
    assert knn["steps"]["low"] is not None  # one bound leaves an interval
    assert found["headline"] is None
    assert "adamw is ahead by error of k nearest neighbours at its shortest length, 40 steps" in headline_of(found)


@pytest.mark.parametrize(
    ("search", "own", "message"),
    [
        ({"learning_rate": ["1e-3", "2e-3"]}, {}, "the best learning_rate, 1e-3, is at the edge"),
        (
            {"learning_rate": ["5e-4", "1e-3", "2e-3"]},
            {"learning_rate": {"adamw": ["5e-4", "1e-3", "2e-3"], "dbp+adamw": ["1e-3"]}},
            "adamw had 3 settings to choose from, dbp+adamw had 1",
        ),
        ({"learning_rate": ["1e-3"]}, {}, "one setting was tried for each"),
        ({}, {}, "one setting was tried for each"),
    ],
)
def test_a_search_that_was_not_fair_or_not_wide_enough_leaves_no_headline(search, own, message):
    runs = [run for seed in SEEDS for run in figures_of(seed)]
    for run in runs:
        run.planned = dataclasses.replace(run.planned, searched=run.planned.searched if search else ())
    plan = plan_with(own_search=own)
    plan.search = search
    found = pair(plan, runs)
    assert found["headline"] is None
    assert message in headline_of(found)


def test_seeds_that_lack_a_quality_or_a_schedule_leave_no_headline():
    runs = [run for seed in SEEDS for run in figures_of(seed)]
    next(run for run in runs if run.planned.seed == 2 and run.planned.variant == "dbp+adamw").probe = None
    found = pair(plan_with(), runs)
    assert found["headline"] is None and "not every seed has every quality" in headline_of(found)
    for run in runs:
        run.probe = None  # it was planned, and failed
    assert "no seed has the error of the linear probe on both sides" in headline_of(pair(plan_with(), runs))
    runs = [run for seed in SEEDS for run in figures_of(seed)]
    for run in runs:
        if run.planned.length is not None:
            run.probe = None
    found = pair(plan_with(), runs)  # of the baseline, only the encoders of its own length were probed
    knn = found["savings"]["error of k nearest neighbours"]
    assert knn["steps"] is None and knn["margins"][40]["percent"]["mean"] == pytest.approx(-10.0)
    assert "adamw has the error of k nearest neighbours at one length alone" in headline_of(found)
    runs = [run for seed in SEEDS for run in figures_of(seed)]
    shortest = next(run for run in runs if run.planned.seed == 2 and run.planned.length is None)
    found = pair(plan_with(), [run for run in runs if run is not shortest])
    assert found["savings"]["validation loss"]["equal_length"].keys() == {0, 1}


def test_one_seed_and_encoders_that_were_not_probed_leave_no_headline():
    runs = figures_of(0)
    assert "one seed by validation loss" in headline_of(pair(plan_with(seeds=[0]), runs))
    for run in runs:
        run.probe = None
    assert "the encoders were neither probed nor fine-tuned" in headline_of(pair(plan_with(probe=None), runs))


def test_heads_of_all_lengths_are_judged_too():
    runs = [run for seed in SEEDS for run in figures_of(seed)]
    for run in runs:
        seed, length = run.planned.seed, run.planned.length or 40
        iou = 0.32 if run.planned.variant == "dbp+adamw" else 0.3 + (length - 40) / 1000
        run.heads["segmentation"] = {"mean_iou": iou + 0.01 * seed}
    found = pair(plan_with(), runs)
    iou = found["savings"]["error in mean IoU"]
    assert iou["equal_length"] == pytest.approx(dict.fromkeys(SEEDS, 60.0))
    assert iou["time"]["mean"] == pytest.approx(100 * (1 - 44 / 60))
    assert iou["other_end"]["mean"] == pytest.approx(1 - 0.33)
    assert pair(plan_with(probe=None, heads={"segmentation": Finetuning()}), runs)["headline"] is not None


def test_at_equal_time_the_baseline_has_as_many_more_steps_as_its_steps_are_faster():
    found = pair(plan_with(), [run for seed in SEEDS for run in figures_of(seed)])
    same = found["savings"]["validation loss"]["equal_time"]  # 44 steps: a fifth of the way from 40 to 60
    assert same["steps"] == pytest.approx(44)
    assert same["end"]["mean"] == pytest.approx(0.51 - 0.02)
    assert same["margin"]["percent"]["mean"] == pytest.approx(-100 * 0.13 / 0.49, rel=0.01)
    slow = pair(
        plan_with(),
        [run for seed in SEEDS for run in figures_of(seed)],
        step_times={"adamw": [1.0, 1.0], "dbp+adamw": [2.1, 2.1]},
    )
    assert slow["savings"]["validation loss"]["equal_time"] is None  # 84 steps: longer than was run


def test_runs_of_other_lengths_are_no_part_of_the_usual_figures():
    runs = [run for seed in SEEDS for run in figures_of(seed)]
    usual = [run for run in runs if run.planned.length is None]
    assert analyse(plan_with(), runs) == analyse(plan_with(), usual)
    assert yardstick_figures(made_plan(), usual) is None


def test_the_report_holds_the_yardstick_and_its_figures(tmp_path, sketched):
    sketched.add("lengths")
    runs = [run for seed in SEEDS for run in figures_of(seed)]
    write_report(tmp_path, plan_with(), runs, command="hf-dbp compare")
    text = (tmp_path / "README.md").read_text()
    saved = json.loads((tmp_path / "report.json").read_text())["yardstick"]["pairs"][0]["savings"]
    assert saved["validation loss"]["equal_length"] == pytest.approx({"0": 70.0, "1": 70.0, "2": 70.0})
    for words in (
        "Saved, by complete schedules",
        "adamw, 60 steps",
        "adamw, schedule of equal time, 44 steps",
        "| dbp+adamw | 0.55",
    ):
        assert words in text
    assert (tmp_path / "lengths.png").stat().st_size > 1000
    first = next(line for line in text.splitlines() if line.startswith("- "))
    assert first.startswith("- dbp+adamw against adamw: saves +12.0 %")
    assert "read in the middle of a schedule" in text


PLAN = """
title: Made up
flags: {max_steps: 40, dataset_name: wire_bonding, method: bp}
axes: {method: {adamw: {optimizer: adamw}, muon: {optimizer: muon}}}
search: {learning_rate: {adamw: [1e-3, 2e-3], muon: [1e-2, 2e-3]}}
seeds: [0, 1]
probe: {flags: {train_dir: tiles}}
lengths: {adamw: [80, 60]}
"""


def test_a_plan_has_lengths_and_searches_of_each_variants_own(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    plan = read_plan(str(tmp_path / "plan.yaml"))
    assert plan.search == {"learning_rate": ["1e-3", "2e-3", "1e-2"]}
    tried = [(run.variant, dict(run.searched)["learning_rate"]) for run in plan.search_runs()]
    assert tried == [("adamw", "1e-3"), ("adamw", "2e-3"), ("muon", "2e-3"), ("muon", "1e-2")]
    runs = plan.length_runs({"adamw": (("learning_rate", "2e-3"),)})
    assert [(run.length, run.seed) for run in runs] == [(60, 0), (60, 1), (80, 0), (80, 1)]
    assert runs[0].folder.as_posix() == "adamw/max_steps=60/learning_rate=2e-3/seed0"
    arguments = list(runs[0].arguments)
    assert arguments[len(arguments) - arguments[::-1].index("--max_steps")] == "60"
    assert len({run.folder for run in (*runs, *plan.search_runs())}) == 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("lengths: {adamw: [80, 60]}", "lengths: {muon: [80]}"), "lengths names 'muon'; the baselines are adamw"),
        (("[80, 60]", "[many]"), "lengths are numbers of steps"),
        (("muon: [1e-2, 2e-3]", "sgd: [1e-2]"), "search of learning_rate must name every variant: adamw, muon"),
        (("{flags: {train_dir: tiles}}", "{train_dir: tiles}"), "probe has flags; not 'train_dir'"),
    ],
)
def test_what_a_plan_cannot_say_is_refused(tmp_path, changed, message):
    (tmp_path / "plan.yaml").write_text(PLAN.replace(*changed))
    with pytest.raises(ValueError, match=message):
        read_plan(str(tmp_path / "plan.yaml"))
