"""The report on chosen images pairs runs by their seeds, and jobs come seed after seed."""

import json

import pytest
from benchmark_scripts import load_benchmark

MACHINE = {"arguments": {}, "versions": {}, "hardware": {}, "data": {"validation_images": 3}, "seconds": 1.0}


@pytest.fixture
def selection():
    return load_benchmark("selection")


def written(folder, judge, method, labels, ious):
    for seed, iou in ious.items():
        about = {"data": "camvid", "judge": judge, "method": method, "labels": labels, "seed": seed}
        file = folder / "camvid" / f"{judge}-{method}-{labels}-{seed}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(MACHINE | {"mean_iou": iou, "benchmark": about}))


def test_differences_are_paired_over_the_seeds_that_both_sides_have(selection, tmp_path):
    written(tmp_path, "upernet", "random", 20, {0: 0.1, 1: 0.3, 2: 0.5, 3: 0.9})
    written(tmp_path, "upernet", "typical", 20, {2: 0.6, 1: 0.41, 0: 0.2})
    runs = selection.read(tmp_path)["camvid"]
    base, other = ("upernet", ("random", 20)), ("upernet", ("typical", 20))
    assert selection.compared(runs, base, other) == ["0.300", "0.403", "+0.103 [+0.089, +0.118]", "better", "3"]
    assert selection.compared(runs, other, base)[3:] == ["worse", "3"]
    assert selection.compared(runs, base, ("upernet", ("k_centre", 20)))[-3:] == ["not run", "", "0"]


@pytest.mark.parametrize(("many", "blind"), [([0.3, 0.4, 0.5], False), ([0.2, 0.1, 0.3], True)])
def test_a_judge_that_more_labels_do_not_help_is_named(selection, tmp_path, many, blind):
    written(tmp_path, "upernet", "random", 20, dict(enumerate([0.1, 0.2, 0.29])))
    written(tmp_path, "upernet", "random", 80, dict(enumerate(many)))
    text = "\n".join(selection.remarks(selection.read(tmp_path)["camvid"]))
    assert ("can hardly tell" in text) == blind
    assert "retrieval" not in text


def test_the_single_k_centre_memory_stands_for_every_random_seed(selection, tmp_path):
    written(tmp_path, "retrieval", "random", 40, {0: 0.1, 1: 0.3})
    written(tmp_path, "retrieval", "k_centre", 40, {0: 0.25})
    runs = selection.read(tmp_path)["camvid"]
    found = selection.difference(runs, ("retrieval", ("random", 40)), ("retrieval", ("k_centre", 40)))
    assert (found.n, found.mean) == (2, pytest.approx(0.05))


def test_jobs_come_seed_after_seed_and_each_has_a_file_of_its_own(selection, tmp_path, capsys):
    flags = ["--data_dir", "d", "--encoders", "e", "--choices", "c.json", "--results", str(tmp_path)]
    selection.main(["jobs", *flags, "--seeds", "2", "--more", "--max_steps 3"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    seeds = [line[line.index("--seed") + 1] for line in lines]
    assert seeds == sorted(seeds)
    assert len({line[line.index("--output") + 1] for line in lines}) == len(lines) == 2 * 2 * 2 * 11 - 2 * 3
    assert all(line[-2:] == ["--max_steps", "3"] for line in lines)
