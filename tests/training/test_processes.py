"""Processes of one run stop and end together, and are refused if they would train apart; the trial of faults in
short."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_pretraining import flags
from test_resuming import STEPS

from hf_dbp.training.saving import last_checkpoint

ROOT = Path(__file__).parents[2]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def launch(tmp_path):
    """Run the script with two processes; once it has saved a new checkpoint, a signal goes to its second process."""

    def start(number=None, **changed):
        given = flags(tmp_path / "run", **(STEPS | {"max_steps": 100_000, "eval_strategy": "no"} | changed))
        before = last_checkpoint(tmp_path / "run")
        process = subprocess.Popen(
            [*LAUNCHER, str(Path(__file__).with_name("ended_run.py")), *given, "--save_total_limit", "2"],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while number is not None and last_checkpoint(tmp_path / "run") == before:
                assert process.poll() is None, process.stderr.read()[-2000:]
                time.sleep(0.05)
            if number is not None:
                ranks = {int(rank.environ()["RANK"]): rank for rank in psutil.Process(process.pid).children()}
                ranks[1].send_signal(number)
            errors = process.communicate(timeout=400)[1]
        finally:
            process.kill()
        return process.returncode, errors, Path(last_checkpoint(tmp_path / "run"))

    return start


@pytest.mark.slow
def test_processes_that_would_train_apart_are_refused(tmp_path):
    """Without a GPU and --use_cpu, accelerate does not join a launcher's processes."""
    script = str(ROOT / "training_scripts" / "run_dbp_mae.py")
    done = subprocess.run(
        [*LAUNCHER, script, *flags(tmp_path, use_cpu=None)], env=os.environ | ENVIRONMENT,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "2 processes but not one GPU for each: they would train separately; add --use_cpu" in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_two_processes_stop_together_name_a_dead_one_and_go_on(launch):
    """Only one of them receives a signal; then one is killed; then the run resumes and finishes."""
    _, errors, stopped = launch(signal.SIGTERM)
    assert "AssertionError" not in errors
    assert errors.count("stopped by SIGTERM after step") == 1
    assert f"the same command resumes from {stopped}" in errors
    assert {file.name for file in stopped.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    status, errors, killed = launch(signal.SIGKILL)
    assert status != 0 and int(killed.name[11:]) > int(stopped.name[11:])
    cause = errors.partition("Root Cause")[2]
    assert "rank      : 1 " in cause and "exitcode  : -9" in cause
    steps = int(killed.name[11:]) + 2
    status, errors, last = launch(max_steps=steps, save_steps=steps)
    assert status == 0, errors
    assert last.name == f"checkpoint-{steps}"


@pytest.mark.slow
def test_a_process_that_hangs_is_named(launch):
    """It is stopped in the middle of a step; the other one waits for --ddp_timeout, on CPUs too."""
    status, errors, _ = launch(signal.SIGSTOP, ddp_timeout=45)
    assert status != 0
    line = "error: rank 0 of 2 processes waited 45 s (--ddp_timeout) for rank 1, which hangs or is cut off"
    assert errors.count("error: rank") == errors.count(line) == 1, errors[-3000:]
    assert "This is a bug in hf_dbp" not in errors


@pytest.mark.slow
def test_faults_in_short(tmp_path):
    """The trial of `make faults` with five signals."""
    report = tmp_path / "faults.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--kills", "5", "--steps", "12"]
    done = subprocess.run(
        [*command, "--output", str(report)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kills = json.loads(report.read_text())["kills"]
    assert len(kills) >= 5 and all(kill["survived"] for kill in kills)
