"""Two processes do not write into one folder; a process that was killed holds nothing."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
