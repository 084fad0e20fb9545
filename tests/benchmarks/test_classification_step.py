"""A classifier's step is timed against the stock Trainer's: they take turns, with equally many steps each."""

import json

import pytest
from benchmark_scripts import load_benchmark


def test_both_trainers_take_turns(tmp_path):
    flags = ["--size", "mini", "--image_size", "16", "--patch_size", "8", "--batch", "4", "--steps", "4"]
    found = load_benchmark("classification_step").main([*flags, "--turns", "2", "--output", str(tmp_path / "out.json")])
    assert {name: len(turns) for name, turns in found["seconds"].items()} == {"stock": 2, "ours": 2}
    first = found["seconds"]["ours"][0] / found["seconds"]["stock"][0]
    assert found["ratios"][0] == pytest.approx(first)
    assert json.loads((tmp_path / "out.json").read_text()) == found
