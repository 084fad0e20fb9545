"""Each task's step and memory are compared with the stock Trainer's: both train the same model, in turns."""

import json
from pathlib import Path

import pytest
import torch
from benchmark_scripts import load_benchmark
from transformers import Trainer

FLAGS = ["--size", "mini", "--image_size", "32", "--patch_size", "4", "--batch", "2", "--use_cpu"]


def test_a_task_takes_turns_with_the_stock_trainer(tmp_path: Path) -> None:
    flags = ["--tasks", "classification", *FLAGS, "--steps", "4", "--turns", "2", "--memory_runs", "0"]
    found = load_benchmark("head_step").main([*flags, "--output", str(tmp_path / "out.json")])
    row = found["tasks"]["classification"]
    assert {side: len(turns) for side, turns in row["seconds"].items()} == {"stock": 2, "ours": 2}
    for clock in ("processor", "wall"):
        first = row["seconds"]["ours"][0][clock] / row["seconds"]["stock"][0][clock]
        assert row["ratios"][clock][0] == pytest.approx(first)
        assert row["ratio"][clock] == pytest.approx(sum(row["ratios"][clock]) / 2)
    assert json.loads((tmp_path / "out.json").read_text()) == found


@pytest.mark.parametrize("task", ["segmentation", "classification", "detection", "instances"])
def test_both_sides_train_the_same_model_on_the_same_data(task: str, tmp_path: Path) -> None:
    benchmark = load_benchmark("head_step")
    args = benchmark.parsed([*FLAGS, "--steps", "4"])
    stock, ours = (benchmark.trainer_of(task, side, args, str(tmp_path))[0] for side in ("stock", "ours"))
    assert type(stock) is Trainer and type(ours) is not Trainer and type(stock.model) is type(ours.model)
    for (name, one), (other, two) in zip(
        stock.model.state_dict().items(), ours.model.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(one, two)
    for one, two in zip(stock.train_dataset, (ours.train_dataset[(0, k)] for k in range(4)), strict=True):
        assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert len(next(iter(stock.get_train_dataloader()))["pixel_values"]) == args.batch


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_each_side(tmp_path: Path) -> None:
    flags = ["--tasks", "detection", *FLAGS, "--steps", "4", "--turns", "1", "--memory_runs", "1"]
    memory = load_benchmark("head_step").main(flags)["tasks"]["detection"]["memory"]
    assert memory["ratio"] == memory["megabytes"]["ours"][0] / memory["megabytes"]["stock"][0]
    assert all(10 < memory["megabytes"][side][0] < 4000 for side in ("stock", "ours"))
