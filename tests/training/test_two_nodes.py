"""Two hosts for real: network namespaces of one machine, joined by a cable, with a launcher on each."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pretraining import flags, losses

from hf_dbp.pretraining import main

ROOT = Path(__file__).parents[2]
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
    """Kill everything that runs on a host; a launcher's processes are in groups of their own."""
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
