"""A run loses nothing to what stops it: signals, a full disk, half a checkpoint."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from multiprocessing import popen_fork
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from test_pretraining import flags
from torch.utils.data import DataLoader

from hf_dbp import locking
from hf_dbp.pretraining import main
from hf_dbp.records import RunRecord
from hf_dbp.training import stopping
from hf_dbp.training.resuming import ResumingTrainer
from hf_dbp.training.saving import UNFINISHED, fault, last_checkpoint, whole_checkpoints
from hf_dbp.training.stopping import StopOnSignal, shield_workers

sys.path.insert(0, str(Path(__file__).parents[1] / "downstream" / "segmentation"))
from segmentation_runs import trainer as segmentation_trainer

ROOT = Path(__file__).parents[2]
STEPS = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "max_steps": 10}


def state_of(folder):
    """Everything in a checkpoint that training resumes from: weights with every R, optimizer, schedule."""
    files = (torch.load(folder / name, weights_only=True) for name in ("optimizer.pt", "scheduler.pt"))
    return [load_file(next(folder.glob("*.safetensors"))), *files]


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def losses(record):
    return [(row["step"], row["eval_loss"]) for row in record.rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The record and the last checkpoint of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    record = main(flags(folder, **STEPS))
    return losses(record), state_of(folder / "checkpoint-10")


@contextmanager
def at_step(step, action):
    """Have something done when a step of any `ResumingTrainer` begins."""
    stock = ResumingTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            action()
        return stock(self, *args, **kwargs)

    ResumingTrainer.training_step = training_step
    try:
        yield
    finally:
        ResumingTrainer.training_step = stock


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.slow
def test_a_run_goes_on_with_another_learning_rate(tmp_path, optimizer):
    """As advised if it was too large: the checkpoint's state must not bring the old one back."""
    for step, settings in ((4, {}), (10, {"learning_rate": 1e-4, "weight_decay": 0.3})):
        with at_step(step, send(signal.SIGTERM)), suppress(SystemExit):
            main(flags(tmp_path, optimizer=optimizer, logging_steps=1, **STEPS | settings))
    rows = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert len(rates) == 10 and min(rates[:5]) > 4e-4
    assert rates[5:] == pytest.approx([1e-4 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(5, 10)])
    state = torch.load(tmp_path / "checkpoint-10" / "optimizer.pt", weights_only=True)
    groups = [group for part in (state.values() if optimizer == "muon" else [state]) for group in part["param_groups"]]
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}


def test_a_longer_schedule_says_that_the_learning_rate_rises_again(tmp_path, caplog):
    """A finished cosine ended at 0; with twice the steps the same command trains on from the middle of the new one."""
    main(flags(tmp_path, **STEPS))
    assert "rises" not in caplog.text
    main(flags(tmp_path, **STEPS | {"max_steps": 20}))
    assert "the learning rate rises from 0 to 0.0005 at step 10" in caplog.text


@pytest.mark.parametrize("settings", [{}, {"learning_rate": 1e-4}, {"max_steps": 9}])
def test_no_rise_is_told_of_the_same_or_a_shorter_schedule_or_a_lower_rate(tmp_path, stopped_run, caplog, settings):
    run = shutil.copytree(stopped_run, tmp_path / "run")
    main(flags(run, **STEPS | settings))
    assert "rises" not in caplog.text


# ---- signals ----


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 4), (signal.SIGINT, 5), (signal.SIGTERM, 9)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, undisturbed, capsys, number, step):
    """In the middle of an epoch of 3 steps, in its last one, and in the last step of all."""
    handler = signal.getsignal(number)
    with at_step(step, send(number)), pytest.raises(SystemExit) as stopped:
        main(flags(tmp_path, **STEPS))
    assert stopped.value.code == 128 + number
    folder = tmp_path / f"checkpoint-{step + 1}"
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"stopped by {number.name} after step {step + 1} of 10; the same command resumes from {folder}"
    )
    assert signal.getsignal(number) is handler
    assert last_checkpoint(tmp_path) == str(folder)
    resumed = main(flags(tmp_path, **STEPS))
    assert (losses(resumed), equal(state_of(tmp_path / "checkpoint-10"), undisturbed[1])) == (undisturbed[0], True)
    assert signal.getsignal(number) is handler


#: what a command of its own does besides: says `in evaluation` from a worker, and stays there; fails in the third step
EVALUATES = """
from pathlib import Path
from hf_dbp.data.masked import EvaluationViews
stock = EvaluationViews.__getitem__
def slow(self, index):
    Path("in_evaluation").touch()
    time.sleep(0.5)
    return stock(self, index)
EvaluationViews.__getitem__ = slow
"""
FAILS = """
from hf_dbp.training.resuming import ResumingTrainer
stock = ResumingTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 2:
        raise RuntimeError("out of memory")
    return stock(self, *args, **kwargs)
ResumingTrainer.training_step = training_step
"""


@contextmanager
def own_group(folder, changes, **options):
    """The command with two workers, in its own process group."""
    code = f"import sys, time\nfrom hf_dbp.pretraining import main\n{changes}\nmain(sys.argv[1:])"
    run = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "ignore:This DataLoader",
            "-c",
            code,
            *flags(folder, dataloader_num_workers=2, **options),
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.parametrize("changes", ["", EVALUATES], ids=["training", "evaluation"])
@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_workers_at_work(tmp_path, changes):
    """As schedulers send it, after the first checkpoint or during an evaluation."""
    options = STEPS | {"max_steps": 2000, "save_steps": 3, "eval_steps": 3}
    if not changes:
        options |= {"eval_strategy": "no", "load_best_model_at_end": False}
    with own_group(tmp_path, changes, **options) as run:
        limit = time.monotonic() + 120
        while time.monotonic() < limit:
            if (tmp_path / "in_evaluation").exists() if changes else whole_checkpoints(tmp_path):
                break
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 143, errors[-2000:]
    assert "the same command resumes from" in errors.strip().splitlines()[-1]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on one processor
def test_a_signal_ends_no_worker_that_has_only_begun(monkeypatch):
    stock = popen_fork.Popen._launch  # type: ignore[attr-defined]

    def launch(self, process):
        stock(self, process)
        os.kill(self.pid, signal.SIGTERM)

    monkeypatch.setattr(popen_fork.Popen, "_launch", launch)
    loader = DataLoader(range(8), num_workers=2, collate_fn=list)
    shield_workers(loader)
    assert len(list(loader)) == 8


@pytest.mark.slow
def test_a_run_that_fails_ends_with_its_workers(tmp_path):
    """A process that ends sends its workers SIGTERM and waits for them: that one they must not ignore."""
    with own_group(tmp_path, FAILS, **STEPS) as run:
        _, errors = run.communicate(timeout=90)
    assert run.returncode == 1 and "out of memory" in errors


def test_what_an_epoch_ends_with_comes_before_its_checkpoint(tmp_path):
    """After a signal in an epoch's last step the run evaluates and saves once; after one in another step it only
    saves."""
    for step, rows in ((5, [3, 6]), (4, [3])):
        with at_step(step, send(signal.SIGTERM)), pytest.raises(SystemExit):
            main(flags(tmp_path / str(step)))
        assert [*whole_checkpoints(tmp_path / str(step))] == [3, step + 1]
        record = RunRecord.read(tmp_path / str(step) / f"checkpoint-{step + 1}" / "run.json")
        assert [row["step"] for row in record.rows] == rows


def test_fine_tuning_stops_and_goes_on_too(tmp_path):
    """Even if no checkpoint was asked for."""
    options = {"max_steps": 5, "lr_scheduler_type": "constant"}
    whole = segmentation_trainer(tmp_path / "whole", **options)
    whole.train()
    stopped = segmentation_trainer(tmp_path / "stopped", **options)
    with at_step(2, send(signal.SIGTERM)), pytest.raises(SystemExit) as status:
        stopped.train()
    assert status.value.code == 143
    resumed = segmentation_trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert equal(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        segmentation_trainer(tmp_path / "other", **options).train(resume_from_checkpoint=True)


def test_a_second_signal_ends_the_process_and_an_echo_does_not(monkeypatch):
    """Launchers pass on what a terminal has sent to all: the same signal twice within a moment."""
    killed, now = [], [0.0]
    monkeypatch.setattr(stopping.os, "kill", lambda pid, number: killed.append((pid, number)))
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop = StopOnSignal()
    with stop.listening():
        for seconds, expected in ((0.0, []), (0.5, []), (1.5, [(os.getpid(), signal.SIGINT)])):
            now[0] = seconds
            signal.raise_signal(signal.SIGINT)
            assert killed == expected
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert stop.received == signal.SIGINT


# ---- checkpoints that are not whole ----


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def weights(folder):
    return next(folder.glob("*.safetensors"))


DAMAGES = {
    "weights cut off": lambda folder: truncate(weights(folder)),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "empty state": lambda folder: os.truncate(folder / "trainer_state.json", 0),
    "empty listing": lambda folder: os.truncate(folder / "checkpoint.json", 0),
    "without a listing: weights cut off": lambda folder: (unlisted(folder), truncate(weights(folder))),
    "without a listing: optimizer cut off": lambda folder: (unlisted(folder), truncate(folder / "optimizer.pt")),
    "without a listing: no random state": lambda folder: (unlisted(folder), (folder / "rng_state.pth").unlink()),
    "without a listing: state cut off": lambda folder: (unlisted(folder), truncate(folder / "trainer_state.json")),
    "nothing in it": lambda folder: [file.unlink() for file in folder.iterdir()],
}


def unlisted(folder):
    (folder / "checkpoint.json").unlink()


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run with checkpoints of steps 4 and 8 of 10."""
    folder = tmp_path_factory.mktemp("stopped")
    with at_step(8, lambda: sys.exit(1)), pytest.raises(SystemExit):
        main(flags(folder, **STEPS))
    assert [*whole_checkpoints(folder)] == [4, 8]
    return folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_half_a_checkpoint_is_passed_over(tmp_path, stopped_run, damage):
    run = shutil.copytree(stopped_run, tmp_path / "run")
    damage(run / "checkpoint-8")
    assert fault(run / "checkpoint-8") is not None
    assert last_checkpoint(run) == str(run / "checkpoint-4")


def test_a_run_goes_on_past_half_a_checkpoint_and_keeps_the_good_ones(tmp_path, stopped_run, undisturbed, caplog):
    """Rotation counts only whole checkpoints; the save at the same step replaces the half one."""
    run = shutil.copytree(stopped_run, tmp_path / "run")
    truncate(weights(run / "checkpoint-8"))
    shutil.copytree(run / "checkpoint-8", run / "checkpoint-99")
    (run / UNFINISHED / "checkpoint-7").mkdir(parents=True)
    resumed = main(flags(run, **STEPS, save_total_limit=3))
    assert f"{run / 'checkpoint-8'} is skipped: model" in caplog.text
    assert losses(resumed) == undisturbed[0]
    assert equal(state_of(run / "checkpoint-10"), undisturbed[1])
    assert [*whole_checkpoints(run)] == [4, 8, 10]
    assert (run / "checkpoint-99").is_dir() and not (run / UNFINISHED).exists()


def test_a_stock_checkpoint_is_gone_on_from(tmp_path, stopped_run, undisturbed):
    run = shutil.copytree(stopped_run, tmp_path / "run")
    unlisted(run / "checkpoint-8")
    assert last_checkpoint(run) == str(run / "checkpoint-8")
    main(flags(run, **STEPS))
    assert equal(state_of(run / "checkpoint-10"), undisturbed[1])


def test_a_named_checkpoint_must_be_whole(tmp_path, stopped_run, capsys):
    run = shutil.copytree(stopped_run, tmp_path / "run")
    (run / "checkpoint-8" / "optimizer.pt").unlink()
    for name, problem in (("checkpoint-8", "optimizer.pt is missing"), ("checkpoint-7", "there is no such folder")):
        with pytest.raises(SystemExit) as stopped:
            main(flags(tmp_path / "other", resume_from_checkpoint=run / name, **STEPS))
        assert stopped.value.code == 2
        assert f"is incomplete: {problem}" in capsys.readouterr().err.splitlines()[-1]


def test_two_commands_do_not_train_in_one_folder(tmp_path, stopped_run, capsys, monkeypatch):
    """The second would delete what the first is saving, and both would write checkpoints."""
    run = shutil.copytree(stopped_run, tmp_path / "run")
    (run / ".unfinished").mkdir()
    monkeypatch.setattr(locking, "PATIENCE", 0.1)
    with FileLock(run / ".lock"), pytest.raises(SystemExit) as stopped:
        main(flags(run, **STEPS))
    assert stopped.value.code == 2 and (run / ".unfinished").is_dir()
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {run}: another process is writing there")
    main(flags(run, **STEPS))
    assert last_checkpoint(run) == str(run / "checkpoint-10") and not (run / ".lock").exists()


def test_a_finished_run_takes_no_further_step(tmp_path, undisturbed):
    """10 steps end in the middle of an epoch; killed after its last checkpoint, a run has nothing left to train."""
    main(flags(tmp_path, **STEPS))
    steps = []
    with at_step(10, lambda: steps.append(10)):
        again = main(flags(tmp_path, **STEPS))
    assert not steps and losses(again) == undisturbed[0]


NOTHING_LEARNED = {"learning_rate": 0.0, "eta": 0.0, "num_train_epochs": 3}  # the first is best


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_keeps_the_best_and_the_last(tmp_path, limit):
    record = main(flags(tmp_path, **NOTHING_LEARNED, save_total_limit=limit))
    assert record.best["step"] < 9
    assert {*whole_checkpoints(tmp_path)} == {record.best["step"]} | ({9} if limit == 2 else set())


def test_a_lost_best_checkpoint_does_not_end_the_run(tmp_path, caplog, monkeypatch):
    """Lost before the last save, the best of the whole ones takes its place; lost after it, the run's last weights."""
    with at_step(8, lambda: [truncate(weights(tmp_path / f"a/checkpoint-{step}")) for step in (3, 6)]):
        record = main(flags(tmp_path / "a", **NOTHING_LEARNED))
    assert record.results["finished"] and record.results["model"]["step"] == 9
    stock = ResumingTrainer._load_best_model

    def load_best_model(self):
        truncate(weights(Path(self.state.best_model_checkpoint)))
        stock(self)

    monkeypatch.setattr(ResumingTrainer, "_load_best_model", load_best_model)
    record = main(flags(tmp_path / "b", **NOTHING_LEARNED))
    assert "is lost (model.unfused.safetensors has" in caplog.text
    assert record.results["finished"] and record.results["model"]["step"] == 9


# ---- a full disk ----


@contextmanager
def file_size_limit(size):
    """No file may be larger than ``size`` bytes: a write beyond fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [30_000, 4_000, 200])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, undisturbed, capsys, size):
    """There is too little room for the weights, for the record, or for anything."""
    with file_size_limit(size) as fill, at_step(5, fill), pytest.raises(SystemExit) as stopped:
        main(flags(tmp_path, **STEPS))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: no room on the disk, or in the quota, for ") and str(tmp_path) in error
    assert [*whole_checkpoints(tmp_path)] == [4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "run.json"]
    resumed = main(flags(tmp_path, **STEPS))
    assert losses(resumed) == undisturbed[0]
    assert equal(state_of(tmp_path / "checkpoint-10"), undisturbed[1])


def test_another_error_while_saving_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def fail(self, folder):
        raise RuntimeError("something else")

    monkeypatch.setattr(ResumingTrainer, "_save_scaler", fail)
    with pytest.raises(RuntimeError, match="something else"):
        main(flags(tmp_path, **STEPS))
    assert not [*whole_checkpoints(tmp_path)] and not (tmp_path / UNFINISHED).exists()
