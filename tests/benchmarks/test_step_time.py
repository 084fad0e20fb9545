"""The benchmark measures what it says: the naive form is the published algorithm, and every step has its parts."""

import argparse
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import load_benchmark
from torch import nn

from hf_dbp.layers import DecorrelatedLinear, DecorrelatedPatchProjection

ARGUMENTS = argparse.Namespace(optimizer="adamw", image_size=32, patch_size=16, dtype="fp32", fields={})


@pytest.fixture(scope="module")
def step_time() -> ModuleType:
    return load_benchmark("step_time")


@pytest.mark.parametrize("kind", ["linear", "patches"])
def test_the_naive_layer_is_the_published_algorithm(step_time: ModuleType, kind: str) -> None:
    plain = nn.Linear(6, 4) if kind == "linear" else nn.Conv2d(2, 4, 3, 3)
    ours = (DecorrelatedLinear.from_linear if kind == "linear" else DecorrelatedPatchProjection.from_conv)(plain)
    x = torch.randn(30, 6) if kind == "linear" else torch.randn(5, 2, 9, 9)
    naive = step_time.NaiveLayer(plain)
    for matrix in (ours.decorrelation.R, naive.R):
        matrix.add_(0.1 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(naive(x), ours(x), rtol=1e-4, atol=1e-5)
    z, R = naive.z.double(), naive.R.double()
    C = z.T @ z / len(z)
    expected = R - 0.05 * (C - torch.diag(C.diag())) @ R
    naive.update(0.05)
    assert len(z) == (3 if kind == "linear" else 4)
    torch.testing.assert_close(naive.R.double(), expected, rtol=1e-5, atol=1e-6)


def test_every_method_steps_in_four_parts(step_time: ModuleType) -> None:
    pixels, flops = torch.randn(2, 3, 32, 32), {}
    for name in ("bp", "naive", "dbp", "dbp_fast", "dbp_full", "dbp_full_blocks"):
        method = step_time.Method(name, ARGUMENTS, "mini", "cpu")
        before = [p.detach().clone() for p in method.model.parameters()]
        marks: list[int] = []
        flops[name] = method.warm_up(pixels)
        method.step(pixels, lambda marks=marks: marks.append(0))
        assert len(marks) == len(step_time.PARTS) + 1
        assert any(not torch.equal(*pair) for pair in zip(before, method.model.parameters(), strict=True))
    assert flops["bp"] < flops["dbp_fast"] < flops["dbp"] < flops["naive"]
    assert flops["bp"] < flops["dbp_full_blocks"] < flops["dbp_full"]


def test_fused_inference_compares_the_same_shapes() -> None:
    result = load_benchmark("fused_inference").measure("mini", batch=1, repeats=1)
    assert result["ratio_to_stock"].keys() == {"fused", "unfused", "naive", "stock"}
    assert result["ratio_to_stock"]["stock"] == 1 and all(ratio > 0 for ratio in result["ratio_to_stock"].values())


@pytest.mark.slow
def test_growth_is_a_table_and_a_figure_of_every_sweep(
    step_time: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    growth = load_benchmark("step_growth")
    assert growth.SWEEPS.keys() == {"batch", "width", "depth"}
    points = {blocks: (2, {"num_hidden_layers": blocks, "decoder_num_hidden_layers": 1}) for blocks in (1, 2)}
    monkeypatch.setattr(growth, "SWEEPS", {"depth": points})
    flags = ["--device", "cpu", "--repeats", "1", "--threads", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step_growth.py", *flags])
    growth.main()
    found = json.loads((tmp_path / "growth.json").read_text())["sweeps"]
    flops = {value: {row["method"]: row["flops"] for row in rows} for value, rows in found["depth"].items()}
    assert flops["1"]["bp"] < flops["2"]["bp"] and flops["1"]["dbp"] < flops["1"]["naive"]
    assert capsys.readouterr().out.count("| depth ") == 2
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_the_share_of_the_guards_is_printed(
    step_time: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guards = load_benchmark("guards")
    flags = [
        "--device",
        "cpu",
        "--size",
        "mini",
        "--image_size",
        "32",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--threads",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["guards.py", *flags])
    guards.main()
    assert re.search(r"of a step: check [\d.]+ %, in the update -?[\d.]+ %", capsys.readouterr().out)
