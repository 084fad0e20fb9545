"""The GPU benchmark, scaled down to the CPU: it ends with one table, names what does not fit, and keeps to its time."""

import json
import sys

import pytest
import torch
from benchmark_scripts import load_benchmark


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


def test_each_optimizer_has_its_rows(gpu, monkeypatch, tmp_path):
    record = run(gpu, monkeypatch, tmp_path, "--no-compile", "--batches", "2", "--optimizers", "adamw", "muon")
    assert [row["optimizer_name"] for row in record["rows"]] == ["adamw"] * 2 + ["muon"] * 2


def test_without_a_gpu_it_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no GPU; --device cpu" in capsys.readouterr().err
