"""Plans become runs, each made once and separately; failed, interrupted and differing runs are told apart."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image
from runs import QUICK, SLOW, made_run
from test_pretraining import flags
from test_pretraining import main as pretrain

from hf_dbp import cli
from hf_dbp.comparison import runner as comparison
from hf_dbp.comparison.heads import HEADS
from hf_dbp.comparison.plans import Probe, plan_of, read_plan
from hf_dbp.comparison.report.analysis import analyse
from hf_dbp.comparison.runner import Runner, main, random_evaluations, run_plan
from hf_dbp.comparison.runs import Run, best_settings, collect_runs
from hf_dbp.errors import UserError
from hf_dbp.recipes import plan_names

PLAN = """
title: Made up
flags: {do_train: true, method: bp, max_steps: 40, learning_rate: 1e-3, dataset_name: wire_bonding}
axes:
  method:
    adamw: {optimizer: adamw}
    muon: {optimizer: muon}
search: {weight_decay: [0.0, 0.1]}
seeds: [0, 1]
"""

# Stands in for `python -m hf_dbp.pretraining`: notes that it was called, and leaves a record or fails.
FAKE = """
import json, pathlib, sys
arguments = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=True))
folder = pathlib.Path(arguments["--output_dir"])
with open(CALLS, "a") as calls:
    calls.write(folder.relative_to(RUNS).as_posix() + "\\n")
if "muon" in folder.parts and arguments["--seed"] == "1":
    raise SystemExit("out of memory")
loss = (0.5 if arguments["--weight_decay"] == "0.1" else 0.6) + 0.3 * int(arguments["--seed"])
record = json.loads(pathlib.Path(RECORD).read_text())
record["rows"] = [record["rows"][0], record["rows"][-1] | {"eval_loss": loss}]
record["seed"] = int(arguments["--seed"])
(folder / "run.json").write_text(json.dumps(record))
"""


# Stands in for fine-tuning: leaves an evaluation or fails.
FAKE_FINETUNING = """
import json, pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
if arguments["--seed"] == "1" and arguments["--from_scratch"] == "False":
    raise SystemExit("out of memory")
score = 0.1 if arguments["--from_scratch"] == "True" else 0.5
evaluation = {"mean_iou": score, "seed": int(arguments["--seed"])}
(pathlib.Path(arguments["--output_dir"]) / "eval.json").write_text(json.dumps(evaluation))
"""

# Stands in for the probe.
FAKE_PROBE = """
import json, pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
if "max_steps=80" in arguments["--output_file"] and "seed1" in arguments["--output_file"]:
    raise SystemExit("out of memory")
pathlib.Path(arguments["--output_file"]).write_text(json.dumps({"probed": arguments["--model_name_or_path"]}))
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    return str(tmp_path / "plan.yaml")


@pytest.fixture
def launcher(tmp_path):
    made_run().record.write(tmp_path / "record.json")
    names = {"CALLS": tmp_path / "calls", "RUNS": tmp_path / "out" / "runs", "RECORD": tmp_path / "record.json"}
    head = "".join(f"{name} = {str(path)!r}\n" for name, path in names.items())
    (tmp_path / "fake.py").write_text(head + textwrap.dedent(FAKE))
    return f"{sys.executable} {tmp_path / 'fake.py'}"


def calls(tmp_path):
    return (tmp_path / "calls").read_text().split()


def test_a_plan_is_read_with_the_users_flags_over_it(plan):
    made = read_plan(plan, ["--max_steps", "7"])
    assert list(made.variants) == ["adamw", "muon"]
    assert made.against == {"adamw": ["muon"]}
    runs = made.search_runs()
    assert [(r.variant, r.setting, r.seed) for r in runs] == [
        (variant, f"weight_decay {value}", 0) for value in ("0.0", "0.1") for variant in ("adamw", "muon")
    ]
    arguments = list(runs[0].arguments)
    assert arguments[-2:] == ["--seed", "0"]
    assert arguments[arguments.index("--learning_rate") + 1] == "1e-3"
    last = len(arguments) - arguments[::-1].index("--max_steps")
    assert arguments[last] == "7"
    assert len({run.folder for run in runs}) == 4


@pytest.mark.parametrize(
    ("changed", "extra", "message"),
    [
        (("axes:", "axis:"), [], "mapping with at least `axes`"),
        (("title:", "name:"), [], "unknown key 'name'; a plan has title, script, recipe"),
        (("{optimizer: adamw}", "adamw"), [], "axes are mappings, axis -> label -> flags"),
        (("[0, 1]", "[0, 0]"), [], "seeds must be different"),
        (("[0, 1]", "[zero]"), [], "seeds are whole numbers"),
        (("seeds: [0, 1]", "against: {sgd: [muon]}"), [], "against names 'sgd'; the variants are adamw, muon"),
        (("seeds:", "segmentation: {flag: {}}\nseeds:"), [], "segmentation has recipe, flags, random; not 'flag'"),
        (("seeds:", "segmentation: {random: maybe}\nseeds:"), [], "random of segmentation is 'maybe'; expected true"),
        (("seeds:", "probe: {}\nseeds:"), [], "probe is empty; give it flags, or leave it out"),
        (("seeds:", "detection:\nseeds:"), [], "detection is empty; give it flags, or leave it out"),
        (("", ""), ["--weight_decay", "1"], "--weight_decay is set by the plan"),
        (("", ""), ["--optimizer=muon"], "--optimizer is set by the plan"),
        (("", ""), ["--weight-decay", "1"], "--weight_decay is set by the plan"),
        (("", ""), ["--seed", "1"], "--seed is set by the plan"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, changed, extra, message):
    (tmp_path / "plan.yaml").write_text(PLAN.replace(*changed))
    with pytest.raises(ValueError, match=message):
        read_plan(str(tmp_path / "plan.yaml"), extra)


def test_an_unknown_plan_names_those_there_are():
    with pytest.raises(ValueError, match=r"no plan 'demo.yaml'.*compare_methods.yaml"):
        read_plan("demo.yaml")


@pytest.mark.parametrize("name", plan_names())
def test_shipped_plans_are_ones_that_runs_accept(name, tmp_path):
    plan = read_plan(name, ["--train_dir", "images", "--use_cpu", "true"])
    plan.check()
    assert len(plan.search_runs()) > 1


@pytest.mark.slow
def test_every_run_runs_once_and_failures_stop_nothing(plan, launcher, tmp_path, capsys):
    runs = run_plan(read_plan(plan, ["--use_cpu", "true"]), tmp_path / "out", jobs=2, launcher=launcher)
    best = "weight_decay=0.1"
    assert sorted(calls(tmp_path)) == sorted(
        [f"{variant}/weight_decay={value}/seed0" for variant in ("adamw", "muon") for value in ("0.0", "0.1")]
        + [f"{variant}/{best}/seed1" for variant in ("adamw", "muon")]
    )
    assert [run.error for run in runs] == [None] * 5 + ["exit status 1: out of memory"]
    assert best_settings(runs)["muon"] == (("weight_decay", "0.1"),)
    # the second seed is worse than every setting with the first, and yet it counts
    assert analyse(read_plan(plan), runs)["variants"]["adamw"]["seeds"] == [0, 1]
    # once more: only what failed runs again
    (tmp_path / "calls").unlink()
    run_plan(read_plan(plan, ["--use_cpu", "true"]), tmp_path / "out", launcher=launcher)
    assert calls(tmp_path) == [f"muon/{best}/seed1"]


def labelled_images(folder):
    """A folder of images of two classes."""
    for name, color in (("dark", 30), ("bright", 220)):
        (folder / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (32, 32), (color, color, number)).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.slow
def test_baselines_run_at_other_lengths_and_encoders_are_probed(plan, launcher, tmp_path, monkeypatch, capsys):
    tiles, others = (labelled_images(tmp_path / name) for name in ("tiles", "others"))
    with Path(plan).open("a") as file:
        file.write(f"probe: {{flags: {{train_dir: {tiles}}}}}\nlengths: {{adamw: [60, 80]}}\n")
    monkeypatch.setattr(comparison, "PROBE", FAKE_PROBE)
    monkeypatch.setattr(comparison, "fused", lambda run: run / "vit")
    made = read_plan(plan, ["--use_cpu", "true"])
    runs = run_plan(made, tmp_path / "out", jobs=2, launcher=launcher)
    lengths = [(run.planned.variant, run.planned.length, run.planned.seed) for run in runs if run.planned.length]
    assert lengths == [("adamw", steps, seed) for steps in (60, 80) for seed in (0, 1)]
    assert "adamw, 60 steps, weight_decay 0.1, seed 1: best validation loss" in capsys.readouterr().out
    folder = tmp_path / "out" / "runs" / "adamw" / "max_steps=60" / "weight_decay=0.1" / "seed0"
    assert json.loads((folder / "probe" / "probe.json").read_text()) == {"probed": str(folder / "vit")}
    # of every finished run at its variant's best setting, of any length; what fails is noted
    probed = {run.planned.name for run in runs if run.probe is not None}
    best = {run.planned.name for run in runs if run.record and dict(run.planned.searched)["weight_decay"] == "0.1"}
    (failed,) = best - probed
    assert (len(probed), failed) == (6, "adamw, 80 steps, weight_decay 0.1, seed 1")
    assert [run.notes for run in runs if run.planned.name == failed] == [
        ["its encoder was not probed: exit status 1: out of memory"]
    ]
    # once more, with a probe of other images: what is there stays, and is not taken for it
    made.probe = Probe(("--train_dir", str(others)))
    with pytest.raises(ValueError, match="holds a run with other flags"):
        run_plan(made, tmp_path / "out", launcher=launcher)


def test_a_run_that_was_interrupted_is_started_again(plan, launcher, tmp_path):
    planned = read_plan(plan).search_runs()[:1]
    runner = Runner(tmp_path / "out", 1, launcher=launcher)
    (run,) = runner.run(planned)
    run.record.results.pop("finished")
    run.record.write(runner.path(planned[0]) / "run.json")
    assert runner.progress(planned[0]) == 1.0
    runner.run(planned)
    assert len(calls(tmp_path)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_ends_the_runs_too(number, plan, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "def save(*_):\n"
        "    time.sleep(0.5)\n"
        "    (here / 'saved').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(here / 'started').touch()\n"
        "time.sleep(60)\n"
    )
    command = "from hf_dbp.comparison.runner import main; main()"
    arguments = ["--plan", plan, "--output_dir", "out", "--launcher", f"{sys.executable} slow.py"]
    with subprocess.Popen([sys.executable, "-c", command, *arguments], cwd=tmp_path, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (tmp_path / "started").exists():
            time.sleep(0.05)
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + number and (tmp_path / "saved").exists()
    assert b"Traceback" not in told


def test_runs_with_other_flags_are_not_taken_for_these(plan, launcher, tmp_path):
    Runner(tmp_path / "out", 1, launcher=launcher).run(read_plan(plan).search_runs()[:1])
    with pytest.raises(ValueError, match="holds a run with other flags; choose another --output_dir"):
        Runner(tmp_path / "out", 1).run(read_plan(plan, ["--max_steps", "7"]).search_runs()[:1])


def test_flags_are_put_right_after_a_run_that_failed_at_once(plan, launcher, tmp_path):
    planned = read_plan(plan).seed_runs({"muon": ()})  # of which the stand-in fails
    (run,) = Runner(tmp_path / "out", 1, launcher=launcher).run(planned)
    assert run.error == "exit status 1: out of memory"
    corrected = read_plan(plan, ["--max_steps", "7"]).seed_runs({"muon": ()})
    runner = Runner(tmp_path / "out", 1, launcher=launcher)
    runner.run(corrected)
    assert len(calls(tmp_path)) == 2
    (runner.path(corrected[0]) / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match="holds a run with other flags"):
        Runner(tmp_path / "out", 1, launcher=launcher).run(planned)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("dataset_name: wire_bonding", "streaming: false"), "no data: give --train_dir FOLDER"),
        (("do_train: true", "do_eval: true"), "the plan's runs would train nothing: add do_train: true"),
        (("seeds:", "lengths: {adamw: [40, 80]}\nseeds:"), "lengths of adamw names 40, its own --max_steps"),
        (("seeds:", "segmentation: {flags: {crop_sise: 64}}\nseeds:"), "segmentation: unknown flag --crop_sise; did"),
        (("seeds:", "segmentation: {random: true}\nseeds:"), "segmentation: no data: give --train_dir FOLDER"),
        (("seeds:", "classification: {random: true}\nseeds:"), "classification: no data: give --train_dir FOLDER"),
        (("seeds:", "classification: {flags: {mix_up: 1}}\nseeds:"), "classification: unknown flag --mix_up; did"),
        (("seeds:", "detection: {random: true}\nseeds:"), "detection: no data: give --train_dir FOLDER"),
    ],
)
def test_what_a_run_would_refuse_is_refused_before_the_first(changed, message, tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN.replace(*changed))
    with pytest.raises(ValueError, match=message):
        run_plan(read_plan(str(tmp_path / "plan.yaml")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [*HEADS, "probe"])
def test_images_without_labels_are_refused_before_the_first(part, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / f"{number}.png")
    planned = f"{part}: {{flags: {{train_dir: {tmp_path / 'photos'}}}}}\nseeds:"
    (tmp_path / "plan.yaml").write_text(PLAN.replace("seeds:", planned))
    with pytest.raises(UserError, match=f"^{part}: "):
        run_plan(read_plan(str(tmp_path / "plan.yaml")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


SEGMENTED = PLAN.replace(
    "seeds:", "segmentation: {flags: {dataset_name: wire_bonding, crop_size: 64}, random: True}\nseeds:"
)


def test_heads_are_trained_on_encoders_of_every_length_and_once_on_random_weights(tmp_path, monkeypatch):
    def ran(self, planned):
        return [Run(one, made_run(one.variant, one.seed).record) for one in planned]

    trained = []

    def finetune(head, arguments, own, folder):
        trained.append(folder.relative_to(tmp_path / "runs").as_posix())
        return {"mean_iou": 0.5}

    monkeypatch.setattr(Runner, "run", ran)
    monkeypatch.setattr(comparison, "fused", lambda run: run / "vit")
    monkeypatch.setattr(comparison, "finetune", finetune)
    (tmp_path / "plan.yaml").write_text(SEGMENTED + "lengths: {adamw: [9]}\n")
    runs = run_plan(read_plan(str(tmp_path / "plan.yaml"), ["--use_cpu", "true"]), tmp_path)
    longer = [run for run in runs if run.planned.length == 9]
    assert longer and all(run.heads["segmentation"]["mean_iou"] == 0.5 for run in longer)
    assert {run.planned.folder.as_posix() for run in longer} < set(trained)
    assert len(trained) == len(set(trained))
    assert {name for name in trained if name.startswith("random")} == {"random/seed0", "random/seed1"}


@pytest.mark.slow
def test_segmentation_that_fails_is_told_and_reported(launcher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "FINETUNE", FAKE_FINETUNING)
    (tmp_path / "plan.yaml").write_text(SEGMENTED)
    plan, out = read_plan(str(tmp_path / "plan.yaml"), ["--use_cpu", "true"]), tmp_path / "out"
    runs = run_plan(plan, out, launcher=launcher)
    remark = "adamw, weight_decay 0.1, seed 0: its encoder was not evaluated on segmentation: "  # there is no model
    assert any(text.startswith(remark) for text in analyse(plan, runs)["remarks"])
    assert remark in capsys.readouterr().out
    for seed in (0, 1):
        vit = out / "runs" / "adamw" / "weight_decay=0.1" / f"seed{seed}" / "vit"
        vit.mkdir()
        (vit / "config.json").touch()
    adamw = [run for run in run_plan(plan, out, launcher=launcher) if run.planned.variant == "adamw"]
    assert [run.heads.get("segmentation", {}).get("mean_iou") for run in adamw] == [None, 0.5, None]
    assert adamw[2].notes == ["its encoder was not evaluated on segmentation: exit status 1: out of memory"]
    assert [one["mean_iou"] for one in random_evaluations(out)["segmentation"]] == [0.1, 0.1]
    (tmp_path / "plan.yaml").write_text(SEGMENTED.replace("64", "128"))
    with pytest.raises(ValueError, match="segmentation holds a run with other flags"):
        run_plan(read_plan(str(tmp_path / "plan.yaml"), ["--use_cpu", "true"]), out, launcher=launcher)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --plan PLAN or --runs FOLDER"),
        (["--plan", "nowhere.yaml"], "no plan 'nowhere.yaml'"),
        (["--runs", "nowhere"], "nowhere holds no run.json"),
        (["--runs", "nowhere", "--eta", "1"], "finished runs take no flags"),
        (["--plan", "compare_methods.yaml", "--jobs", "0"], "--jobs is a positive number"),
        (["--plan", "compare_methods.yaml", "--et", "1"], "unknown flag --et"),
        (["--plan", "compare_methods.yaml", "--eta", "3"], r"--eta lies in \[0, 1\)"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_runs(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out" / "runs").exists()


def written(folder, run):
    folder.mkdir()
    run.record.write(folder / "run.json")
    return str(folder)


def test_finished_runs_are_taken_as_they_are(tmp_path, sketched):
    runs = [
        made_run("adamw", 0, SLOW),
        made_run("dbp+adamw", 0, SLOW),
        made_run("dbp+adamw", 0, QUICK),
        made_run("dbp+adamw", 1, QUICK),
    ]
    runs[1].record.arguments["learning_rate"] = 5e-3
    folders = [written(tmp_path / str(k), run) for k, run in enumerate(runs)]
    collected = collect_runs(folders)
    assert [run.planned.setting for run in collected] == [
        f"learning_rate {rate}" for rate in (0.001, 0.005, 0.001, 0.001)
    ]
    assert best_settings(collected)["dbp+adamw"] == (("learning_rate", "0.001"),)
    assert plan_of(collected).against == {"adamw": ["dbp+adamw"]}
    cli.main(["compare", "--runs", *folders, "--output_dir", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert content["comparisons"][0]["seeds"] == [0]
    assert content["command"].startswith("hf-dbp compare --runs ")
    main(["--runs", *folders, "--output_dir", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert content["command"].startswith("python training_scripts/run_comparison.py --runs ")
    runs[0].record.results.pop("finished")
    runs[0].record.write(Path(folders[0]) / "run.json")
    with pytest.raises(ValueError, match="has not finished; repeat its command"):
        collect_runs(folders)


def test_flags_that_leave_the_result_as_it_is_make_no_settings(tmp_path):
    runs = [made_run("adamw", seed) for seed in range(3)]
    for workers, run in enumerate(runs):
        run.record.arguments |= {"dataloader_num_workers": workers, "logging_dir": str(workers)}
    collected = collect_runs([written(tmp_path / str(k), run) for k, run in enumerate(runs)])
    assert [run.planned.setting for run in collected] == [""] * 3
    assert analyse(plan_of(collected), collected)["variants"]["adamw"]["seeds"] == [0, 1, 2]


def test_collected_runs_that_are_left_out_are_named(tmp_path):
    runs = [made_run("adamw", 0, QUICK), made_run("adamw", 1, SLOW), made_run("adamw", 0, SLOW)]
    for run, decay in zip(runs, (0.05, 0.1, 0.1), strict=True):
        run.record.arguments["weight_decay"] = decay
    collected = collect_runs([written(tmp_path / str(k), run) for k, run in enumerate(runs)])
    remarks = analyse(plan_of(collected), collected)["remarks"]
    message = "adamw, weight_decay 0.1, seed 1 is left out: the setting chosen for adamw is weight_decay 0.05."
    assert [remark for remark in remarks if "left out" in remark] == [message]
    alone = analyse(plan_of(collected), collected[:2])["remarks"]  # no seed in common
    assert message in alone


def test_the_stock_class_is_a_variant_of_its_own(tmp_path):
    runs = [made_run("dbp+adamw"), made_run("adamw"), made_run("adamw")]
    runs[2].record.method = "stock"
    collected = collect_runs([written(tmp_path / str(k), run) for k, run in enumerate(runs)])
    assert plan_of(collected).against == {"adamw": ["stock+adamw", "dbp+adamw"]}
    assert plan_of([collected[0], collected[2]]).against == {"stock+adamw": ["dbp+adamw"]}


def test_two_runs_of_one_setting_and_seed_are_refused(tmp_path):
    folders = [written(tmp_path / name, made_run("adamw", 1)) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"a and .*b are both adamw, seed 1; name one of them"):
        collect_runs(folders)
    with pytest.raises(ValueError, match="are both adamw, seed 1"):
        collect_runs([folders[0], f"{folders[0]}/"])


@pytest.mark.slow
def test_methods_see_the_same_images_crops_masks_and_weights(tmp_path):
    """Paired seeds: DBP with eta = 0 is BP, so that any difference there is comes from the method."""
    curves = [
        [row["eval_loss"] for row in pretrain(flags(tmp_path / name, num_train_epochs=2, **changed)).rows]
        for name, changed in {"bp": {"method": "bp"}, "dbp": {"method": "dbp", "eta": 0.0}}.items()
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
