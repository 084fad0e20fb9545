"""The GPU benchmark, scaled down to the CPU: it ends with one table, names what does not fit, and keeps to its time."""

import json
import signal
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from benchmark_scripts import load_benchmark
from PIL import Image

from hf_dbp.comparison.plans import read_plan


@pytest.fixture
def gpu():
    load_benchmark("step_time")
    return load_benchmark("gpu")


def run(gpu, monkeypatch, tmp_path, *flags):
    small = ["--device", "cpu", "--sizes", "mini", "--image_size", "16", "--patch_size", "8", "--dtype", "fp32"]
    small += ["--methods", "bp", "dbp_full", "--repeats", "1", "--output", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *small, *flags])
    monkeypatch.setattr(gpu.step_time, "with_memory", lambda args, rows: [row.update(peak_bytes=1) for row in rows])
    monkeypatch.setattr(gpu.step_time, "matrix_rate", lambda *_: 1e9)
    gpu.main()
    return json.loads((tmp_path / "gpu.json").read_text())


def test_one_table_last_with_every_setting(gpu, monkeypatch, tmp_path, capsys):
    record = run(gpu, monkeypatch, tmp_path, "--no-compile", "--batches", "2", "3")
    assert [(row["batch"], row["method"]) for row in record["rows"]] == [
        (batch, method) for batch in (2, 3) for method in ("bp", "dbp_full")
    ]
    assert record["left_out"] == []
    assert all(row["images_per_second"] > 0 and row["flops_to_bp"] >= 1 for row in record["rows"])
    last = capsys.readouterr().out.strip().splitlines()[-5:]
    assert last[0].startswith("size")
    assert [line.split()[3] for line in last[1:]] == ["bp", "dbp_full"] * 2


def test_what_does_not_fit_or_would_take_too_long_is_named(gpu, monkeypatch, tmp_path, capsys):
    measure = gpu.step_time.measure

    def short_of_memory(args, size, batch):
        if batch == 3:
            raise torch.OutOfMemoryError("too large")
        return measure(args, size, batch)

    monkeypatch.setattr(gpu.step_time, "measure", short_of_memory)
    record = run(gpu, monkeypatch, tmp_path, "--no-compile", "--batches", "3", "2")
    assert record["left_out"] == ["mini, adamw, batch 3: out of memory"]
    assert {row["batch"] for row in record["rows"]} == {2}
    assert "left out: mini, adamw, batch 3: out of memory" in capsys.readouterr().out
    record = run(gpu, monkeypatch, tmp_path, "--batches", "2", "--seconds", "-1")
    assert record["rows"] == []
    assert record["left_out"][1] == "mini, adamw, batch 2, compiled: -1 seconds are used up"


def test_what_is_not_done_in_time_is_stopped_and_what_was_measured_stays(gpu, monkeypatch, tmp_path):
    rows = run(gpu, monkeypatch, tmp_path, "--no-compile", "--batches", "2")["rows"]

    def hanging(args, size, batch):
        while batch == 3:
            with suppress(Exception):  # as a compiler might
                time.sleep(0.01)
        return rows

    monkeypatch.setattr(gpu.step_time, "measure", hanging)
    record = run(gpu, monkeypatch, tmp_path, "--no-compile", "--batches", "2", "3", "--seconds", "0.5")
    assert record["rows"] == rows
    assert record["left_out"] == ["mini, adamw, batch 3: 0.5 seconds are used up"]
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_each_optimizer_has_its_rows(gpu, monkeypatch, tmp_path):
    record = run(gpu, monkeypatch, tmp_path, "--no-compile", "--batches", "2", "--optimizers", "adamw", "muon")
    assert [row["optimizer_name"] for row in record["rows"]] == ["adamw"] * 2 + ["muon"] * 2


def test_inputs_are_read_from_files_and_from_the_cache(gpu, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        picture = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
        picture.save(tmp_path / f"{index}.png")
    rates = gpu.input_rates(str(tmp_path))
    assert rates.keys() == {"decoded", "cached"} and all(rate > 0 for rate in rates.values())


def test_a_convergence_run_gives_every_method_the_same_time(gpu, monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr(gpu, "compare", lambda arguments: plans.append(read_plan(arguments[1])))
    flags = ["--no-compile", "--batches", "2", "--optimizers", "adamw", "muon", "--methods", "bp", "dbp_full_blocks"]
    record = run(gpu, monkeypatch, tmp_path, *flags, "--convergence", "images", "--run_seconds", "9", "--workers", "0")
    ((plan,), seconds) = plans, {(row["method"], row["optimizer_name"]): row["seconds"] for row in record["rows"]}
    assert list(plan.variants) == ["adamw", "dbp+adamw", "muon", "dbp+muon"]
    for variant, given in plan.variants.items():
        method = "dbp_full_blocks" if variant.startswith("dbp") else "bp"
        expected = 9 / seconds[method, variant.removeprefix("dbp+")]
        assert int(given["max_steps"]) == max(4, round(expected))
    assert plan.against == {"adamw": ["dbp+adamw", "muon", "dbp+muon"], "muon": ["dbp+muon"]}
    plan.check()  # every flag is one of pre-training


@pytest.mark.slow
def test_convergence_in_small_with_compiled_steps(gpu, monkeypatch, tmp_path, capsys):
    """The whole call: eager and compiled rows, then complete schedules of equal time on images, and their report."""
    rng = np.random.default_rng(0)
    for index in range(12):
        picture = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        (tmp_path / "images").mkdir(exist_ok=True)
        picture.save(tmp_path / "images" / f"{index}.png")
    flags = ["--batches", "4", "--methods", "bp", "dbp_full_blocks", "--run_seconds", "0.2", "--workers", "0"]
    flags += ["--images", str(tmp_path / "images"), "--convergence", str(tmp_path / "images"), "--compiled", "bp"]
    record = run(gpu, monkeypatch, tmp_path, *flags, "--learning_rates", "1e-3")
    assert [row["method"] for row in record["rows"]] == ["bp", "dbp_full_blocks", "bp+compile"]
    report = json.loads((tmp_path / "gpu.convergence" / "report" / "report.json").read_text())
    assert set(report["variants"]) == {"adamw", "dbp+adamw"}


def test_without_a_gpu_it_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no GPU; --device cpu" in capsys.readouterr().err
