"""Two real hosts: network namespaces of one machine, joined by a virtual cable, with a launcher on each."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pretraining import flags, losses

from hf_dbp.pretraining import main
from hf_dbp.training.saving import last_checkpoint

ROOT = Path(__file__).parents[2]
SECONDS = 120  # in which a host ends after the other has vanished, on a crowded core as well
ADDRESSES = ("10.77.0.1", "10.77.0.2")

pytestmark = pytest.mark.slow


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hosts():
    """Names of two namespaces that reach each other at `ADDRESSES`."""
    names = [f"dbp{os.getpid()}{side}" for side in "ab"]
    if shutil.which("ip") is None or ip("netns", "add", names[0]).returncode:
        pytest.skip("no network namespace can be made here: two hosts are not tested")
    try:
        ip("netns", "add", names[1])
        cables = ("type", "veth", "peer", "name", "node", "netns", names[1])
        made = ip("link", "add", "node", "netns", names[0], *cables)
        if made.returncode:
            pytest.skip(f"the namespaces cannot be joined ({made.stderr.strip()}): two hosts are not tested")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "node")
            for device in ("node", "lo"):
                assert not ip("-n", name, "link", "set", device, "up").returncode
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def vanish(host):
    """Kill everything that runs on a host; a launcher's processes have their own groups."""
    for process in ip("netns", "pids", host).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


@contextlib.contextmanager
def launched(hosts, output, port, **options):
    """The same command on both hosts, one process on each."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "node"}
    script = [str(ROOT / "training_scripts" / "run_dbp_mae.py"), *flags(output, **options)]
    running = []
    for rank, host in enumerate(hosts):
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
        where = ["--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0], "--main_process_port", str(port)]
        command = ["ip", "netns", "exec", host, sys.executable, "-W", "ignore", "-m", *launcher, *where, *script]
        running.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )  # fmt: skip
    try:
        yield running
    finally:
        for host in hosts:
            vanish(host)
        ended(running)


def ended(running):
    return [(process.communicate(timeout=300)[1], process.returncode) for process in running]


SETTINGS = {"num_train_epochs": 2, "sample_fraction": 1.0, "eta": 0.01, "eta_schedule": "constant"}


def test_two_hosts_are_one_process(tmp_path, hosts):
    """Losses and every R."""
    with launched(hosts, tmp_path / "two", 29511, per_device_train_batch_size=4, **SETTINGS) as running:
        for errors, status in ended(running):
            assert status == 0, errors[-3000:]
    one = main(flags(tmp_path / "one", per_device_train_batch_size=8, **SETTINGS))
    two = type(one).read(tmp_path / "two" / "run.json")
    assert two.hardware["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    found, expected = (load_file(tmp_path / name / "model.unfused.safetensors") for name in ("two", "one"))
    matrices = [name for name in expected if name.endswith("decorrelation.R")]
    assert len(matrices) == 9
    for name in matrices:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_host_that_vanishes_is_named_and_the_run_goes_on(tmp_path, hosts):
    """Everything on the second host is killed; the first one ends within `SECONDS`, and both commands resume."""
    run, given = tmp_path / "run", {"per_device_train_batch_size": 4, "num_train_epochs": None, "eval_strategy": "no"}
    given |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 100_000, "save_total_limit": 2}
    with launched(hosts, run, 29521, **given) as running:
        while last_checkpoint(run) is None:
            assert running[0].poll() is None, running[0].communicate()[1][-3000:]
            time.sleep(0.05)
        vanish(hosts[1])
        began = time.monotonic()
        errors = running[0].communicate(timeout=SECONDS)[1]
        print(f"the first host ended {time.monotonic() - began:.1f} s after the second vanished")
    assert running[0].returncode != 0
    assert f"error: rank 0 of 2 processes lost the one at {ADDRESSES[1]}, which has ended or whose host" in errors
    assert "This is a bug in hf_dbp" not in errors
    steps = int(Path(last_checkpoint(run)).name[11:]) + 2
    with launched(hosts, run, 29531, **(given | {"max_steps": steps, "save_steps": steps})) as running:
        for errors, status in ended(running):
            assert status == 0, errors[-3000:]
    assert Path(last_checkpoint(run)).name == f"checkpoint-{steps}"
