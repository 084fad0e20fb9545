"""Two processes do not write into one folder; a process that was killed holds nothing."""

import errno
import fcntl
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from inspect import ismodule
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from filelock import FileLock, Timeout

from hf_dbp import locking
from hf_dbp.errors import UserError
from hf_dbp.locking import one_writer

HOLDS = """
import sys, time
from pathlib import Path
from hf_dbp.locking import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder() -> Any:
    """Start a process that holds a folder or file, and end it after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(target: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLDS, str(target)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


Start = Callable[[Path], subprocess.Popen[str]]


def test_a_second_writer_is_refused_and_a_killed_one_holds_nothing(
    tmp_path: Path, holder: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "PATIENCE", 0.2)
    for target in (tmp_path, tmp_path / "table.parquet"):
        process = holder(target)
        with pytest.raises(UserError, match=f"{target}: another process is writing there"), one_writer(target):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with one_writer(target):
            assert len(list(tmp_path.iterdir())) == 1
        assert not list(tmp_path.iterdir())


def test_a_writer_waits_for_the_workers_of_a_killed_run(tmp_path: Path, holder: Start) -> None:
    process = holder(tmp_path)
    began = time.monotonic()
    stop = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {process.pid}"])
    with one_writer(tmp_path):
        assert time.monotonic() - began > 0.3
    stop.wait()


def is_held(folder: Path) -> bool:
    try:
        FileLock(folder / ".lock").acquire(timeout=0).lock.release()
    except Timeout:
        return True
    return False


def test_a_writer_may_call_another(tmp_path: Path) -> None:
    with one_writer(tmp_path):
        with one_writer(tmp_path):
            assert is_held(tmp_path)
        assert is_held(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.filterwarnings("ignore:flock not supported on this filesystem")
def test_without_locks_it_warns_and_leaves_no_file_that_would_stop_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """NFS without its lock service, Lustre without `flock`: the next run may be on another host."""

    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with one_writer(tmp_path):
        assert not any(socket.gethostname() in file.read_text() for file in tmp_path.iterdir())
        assert "is on a file system without locks" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "task",
    ["pretraining", *(f"downstream.{name}.finetuning" for name in ("classification", "detection", "segmentation"))],
)
def test_a_run_has_its_folder_until_its_last_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Not in training alone: a second run would delete the model that the first is saving."""
    module, held = importlib.import_module(f"hf_dbp.{task}"), dict[str, bool]()
    for name in [name for name, what in vars(module).items() if callable(what) or ismodule(what)]:
        if name in ("run", "alone"):
            continue
        several = MagicMock()
        several.__iter__.return_value = [MagicMock()] * (3 if name == "prepare_data" else 2)
        monkeypatch.setattr(module, name, MagicMock(return_value=several))

    def note(name: str) -> Callable[..., Any]:
        def noted(*_: Any, **__: Any) -> Any:
            held[name] = is_held(tmp_path / "run")
            return {}, []

        return noted

    for name in {"find_checkpoint", "trained", "finish"} & vars(module).keys():
        monkeypatch.setattr(module, name, note(name))
    args = MagicMock(do_train=True, should_save=True, output_dir=str(tmp_path / "run"))
    module.run(*[MagicMock()] * (module.run.__code__.co_argcount - 1), args)
    assert len(held) == 2 and all(held.values())
    assert not is_held(tmp_path / "run")


WAITS = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from accelerate import PartialState
from hf_dbp.training.processes import alone, end_processes
state, folder = PartialState(cpu=True), Path(sys.argv[1])
(folder / str(state.process_index)).touch()
with alone(SimpleNamespace(should_save=state.is_main_process), folder):
    found = (folder / "checkpoint").exists()
end_processes()
assert found
"""


@pytest.mark.slow
def test_no_process_of_a_run_looks_for_checkpoints_while_another_run_saves(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    (tmp_path / "run").mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with one_writer(tmp_path / "run"):
        process = subprocess.Popen(
            [*launcher, str(tmp_path / "waits.py"), str(tmp_path / "run")], env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        while not all((tmp_path / "run" / rank).exists() for rank in "01"):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        (tmp_path / "run" / "checkpoint").mkdir()
    assert process.wait(100) == 0
