"""The timed steps use the plan's model, optimizer and interval, and every turn times each variant."""

import sys

import pytest
import torch
from benchmark_scripts import load_benchmark
from tiny import TINY

from hf_dbp.training.optimizers import HiddenWithAdamW

PLAN = """
flags: {max_steps: 4, train_dir: images, image_size: 32, patch_size: 8, per_device_train_batch_size: 2, use_cpu: true,
        config_overrides: "OVERRIDES"}
axes:
  method:
    adamw: {method: bp}
    dbp+muon: {method: dbp, optimizer: muon, decorrelated_layers: full, update_interval: 5}
search: {learning_rate: [1e-3, 1e-2]}
"""


@pytest.fixture
def plan_times():
    load_benchmark("step_time")  # which it takes the step of
    return load_benchmark("plan_times")


def test_each_variant_is_timed_in_every_turn(plan_times, tmp_path, monkeypatch):
    overrides = ",".join(f"{key}={value}" for key, value in TINY.items() if "size" not in key or "hidden" in key)
    (tmp_path / "plan.yaml").write_text(PLAN.replace("OVERRIDES", overrides))
    made = {}
    kind = plan_times.PlannedMethod

    class Kept(kind):  # type: ignore[misc, valid-type]
        def __init__(self, planned, device):
            super().__init__(planned, device)
            made[planned.variant] = self

    monkeypatch.setattr(plan_times, "PlannedMethod", Kept)
    output = tmp_path / "times.json"
    monkeypatch.setattr(
        sys, "argv", ["plan_times.py", str(tmp_path / "plan.yaml"), "--repeats", "2", "--output", str(output)]
    )
    plan_times.main()
    from hf_dbp.comparison.plans import read_plan
    from hf_dbp.comparison.runner import read_step_times

    seconds = read_step_times(output, read_plan(str(tmp_path / "plan.yaml")))
    assert {name: len(taken) for name, taken in seconds.items()} == {"adamw": 2, "dbp+muon": 2}
    assert all(second > 0 for taken in seconds.values() for second in taken)
    assert made["adamw"].interval == 1
    assert type(made["adamw"].optimizer) is torch.optim.AdamW
    dbp = made["dbp+muon"]
    assert (dbp.interval, dbp.model.config.decorrelated_layers) == (5, "full")
    assert isinstance(dbp.optimizer, HiddenWithAdamW)
    assert dbp.optimizer.param_groups[0]["lr"] == 1e-3
