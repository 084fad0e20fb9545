"""The input benchmark compares like with like: every way gives the same views as the plain one."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import numpy as np
import pytest
from benchmark_scripts import load_benchmark
from PIL import Image

SIZE = 32


@pytest.fixture(scope="module")
def input_rate() -> ModuleType:
    return load_benchmark("input_rate")


@pytest.fixture
def pictures(tmp_path, monkeypatch) -> Path:
    """Five JPEGs, four to eight times as large as a view."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for index in range(5):
        small = Image.fromarray(rng.integers(60, 190, (12, 16, 3), np.uint8))
        picture = small.resize((SIZE * 8, SIZE * 4 + 20 * index), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "pictures" / f"{index}.jpg", quality=95)
    return tmp_path / "pictures"


def test_every_way_gives_the_plain_views(input_rate, pictures, tmp_path):
    args = SimpleNamespace(size=SIZE, cache_short_side=SIZE * 4, device="cpu")
    samples = input_rate.encoded_images(str(pictures), 9)
    ways = input_rate.ways(args, samples, tmp_path / "cache")
    assert tuple(ways) == input_rate.WAYS and len(samples) == 5
    plain = ways["plain"](0)
    for name in (
        "jpeg",
        "cache",
    ):  # made smaller before they are cut: edges move by a part of a pixel of these tiny views
        for ours, theirs in zip(ways[name](0), plain, strict=True):
            steps = (ours["pixel_values"] - theirs["pixel_values"]) * 255 * 0.225
            assert abs(steps).mean() < 4 and (ours["noise"] == theirs["noise"]).all()
        other = ways[name](1)[0]["pixel_values"] - plain[0]["pixel_values"]
        assert abs(other * 255 * 0.225).mean() > 12, "the views of another epoch are others"
    for name in ("jpeg_to_device", "cache_to_device"):
        (batch,) = ways[name](0)
        assert batch["pixel_values"].shape[0] == 5 and batch["flip"].any()


def test_the_command_writes_a_table_and_json(input_rate, pictures, tmp_path, monkeypatch, capsys):
    output = tmp_path / "rate.json"
    flags = [str(pictures), "--images", "4", "--size", str(SIZE), "--rounds", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["input_rate.py", *flags])
    input_rate.main()
    record = json.loads(output.read_text())
    assert [row["way"] for row in record["rows"]] == list(input_rate.WAYS)
    assert all(row["images_per_second"] > 0 and len(row["ratios"]) == 2 for row in record["rows"])
    assert record["rows"][0]["ratio_to_plain"] == 1.0
    assert "cache_to_device" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["input_rate.py", *flags, "--ways", "cache"])
    with pytest.raises(SystemExit):
        input_rate.main()
