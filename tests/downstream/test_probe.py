"""The probe's arithmetic, and the whole way from a folder of classes to JSON."""

import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from hf_dbp.data.classes import split_classes
from hf_dbp.downstream import probe
from hf_dbp.downstream.probe import knn_accuracy, linear_accuracy, main


def test_neighbours_look_at_angles_and_vote():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 5.0]])
    test = torch.tensor([[10.0, 1.0], [0.1, 1.0]])
    assert knn_accuracy(train, torch.tensor([0, 0, 1]), test, torch.tensor([0, 1]), k=1) == 2
    assert knn_accuracy(train, torch.tensor([0, 0, 1]), test, torch.tensor([1, 0]), k=1) == 0
    assert knn_accuracy(train, torch.tensor([0, 0, 1]), test, torch.tensor([0, 1]), k=50) == 2  # near ones weigh more


def test_the_linear_probe_finds_a_linear_rule_among_scales():
    features = torch.randn(400, 6) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 1.0]) + 5
    labels = (features[:, 0] > 5).long() + 2 * (features[:, 2] > 5).long()
    hits, penalty, _ = linear_accuracy(features[:300], labels[:300], features[300:], labels[300:], seed=0)
    assert hits >= 95
    assert penalty < 0.1
    noise = torch.randint(0, 2, (400,))
    hits, _, _ = linear_accuracy(features[:300], noise[:300], features[300:], noise[300:], seed=0)
    assert hits < 70


@pytest.mark.parametrize(
    ("right", "edge"),
    [((9, 8, 7), True), ((8, 9, 7), False), ((9, 9, 7), False), ((7, 8, 9), True), ((7, 9, 9), False)],
)
def test_a_penalty_at_the_edge_of_those_tried_is_told_if_it_is_better_than_the_next(monkeypatch, right, edge):
    hits = dict(zip((0.1, 1.0, 10.0), right, strict=True))
    monkeypatch.setattr("hf_dbp.downstream.probe.PENALTIES", tuple(hits))
    monkeypatch.setattr("hf_dbp.downstream.probe._fitted", lambda *given: (given[-1], None))
    monkeypatch.setattr("hf_dbp.downstream.probe._hits", lambda penalty, *_: hits[penalty])
    features, labels = torch.zeros(10, 1), torch.zeros(10, dtype=torch.long)
    assert linear_accuracy(features, labels, features, labels, seed=0)[1:] == (max(hits, key=hits.get), edge)


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_split_alike_and_one_image_is_trained_on(seed):
    labels = np.array(["a"] * 50 + ["b"] * 10 + ["c"] * 2 + ["d"])
    labels = np.random.default_rng(seed).permutation(labels)
    train, test = split_classes(labels.tolist(), 0.2, seed)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert Counter(labels[test].tolist()) == {"a": 10, "b": 2, "c": 1}
    assert set(labels[train]) == {"a", "b", "c", "d"}
    assert len(split_classes(["a"] * 4 + ["b"], 0.9, seed)[1]) == 3


def test_single_images_cannot_be_split():
    with pytest.raises(
        ValueError, match=r"none of the 3 classes has two images, .*; add images, or give .*--validation_dir"
    ):
        split_classes(["a", "b", "c"], 0.2, 0)


@pytest.fixture
def folder(tmp_path):
    """Two classes: dark and bright pictures; and a ViT."""
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 120)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(15):
            pixels = rng.integers(low, low + 130, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    return tmp_path


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_from_a_folder_of_classes_to_json(folder, pooling):
    flags = ["--model_name_or_path", str(folder / "vit"), "--train_dir", str(folder / "images"), "--pooling", pooling]
    record = main([*flags, "--output_file", str(folder / "probe.json")])
    assert json.loads((folder / "probe.json").read_text()) == json.loads(json.dumps(record))
    assert record["data"] == {
        "source": str(folder / "images"),
        "train_images": 24,
        "test_images": 6,
        "classes": 2,
        "unreadable": {"count": 0, "images": {}},
        "left_out": {"count": 0, "reasons": {}},
    }
    assert record["linear"]["accuracy"] == 1.0
    assert record["linear"]["interval_95"][0] < 0.7  # six images prove little
    assert record["commonest_class"]["accuracy"] < 1.0
    again = main([*flags, "--output_file", str(folder / "again.json")])
    assert {k: again[k] for k in ("knn", "linear")} == {k: record[k] for k in ("knn", "linear")}


def counts(record):
    return record["data"]["train_images"], record["data"]["test_images"], record["data"]["classes"]


def probed(folder, *flags):
    arguments = ["--model_name_or_path", str(folder / "vit"), "--train_dir", str(folder / "images")]
    arguments += ["--output_file", str(folder / "probe.json")]  # of two the last counts
    return main([*arguments, *flags])


def test_names_of_files_are_not_taken_for_splits(folder):
    """`datasets` would read splits from val_1.png and test_0.png."""
    for name in ("dark", "bright"):
        shutil.copytree(folder / "images" / name, folder / "shown" / name)
        for file in (folder / "shown" / name).iterdir():
            file.rename(file.with_name(f"ILSVRC2012_val_{file.name}"))
        (folder / "images" / name / "0.png").rename(folder / "images" / name / "test_0.png")
    assert counts(probed(folder, "--validation_dir", str(folder / "shown"))) == (30, 30, 2)


def test_folders_of_splits_hold_the_classes(folder):
    """The first folder below the split is the class, however deep the pictures lie."""
    (folder / "images").rename(folder / "all")
    (folder / "all" / "dark" / "lot" / "7").mkdir(parents=True)
    (folder / "all" / "dark" / "0.png").rename(folder / "all" / "dark" / "lot" / "7" / "0.png")
    shutil.copytree(folder / "all", folder / "images" / "train")
    shutil.copytree(folder / "all" / "bright", folder / "images" / "val" / "bright")
    assert counts(probed(folder)) == (30, 15, 2)


def test_unreadable_images_are_left_out_and_counted(folder, capsys):
    (folder / "images" / "dark" / "3.png").write_bytes(b"no picture")
    (folder / "images" / "dark" / "a.png").write_bytes(b"")
    (folder / "images" / "bright" / "b.npy").write_bytes(b"")
    record = probed(folder)
    assert sum(counts(record)[:2]) == 29
    assert record["linear"]["accuracy"] == 1.0  # the labels are still those of their images
    unreadable = record["data"]["unreadable"]
    assert unreadable["count"] == 3
    assert {Path(path).name for path in unreadable["images"]} == {"3.png", "a.png", "b.npy"}
    with pytest.raises(SystemExit):
        probed(folder, "--max_unreadable", "0")
    assert "more than 0 unreadable images" in capsys.readouterr().err


def test_damaged_images_in_parquet_are_left_out(folder):
    files = sorted((folder / "images").rglob("*.png"))
    values = [{"bytes": file.read_bytes() if number else b"no", "path": None} for number, file in enumerate(files)]
    table = datasets.Dataset.from_dict({"image": values, "label": [file.parent.name for file in files]})
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(folder / "images" / "all.parquet")
    record = probed(folder)
    assert sum(counts(record)[:2]) == 29
    assert record["data"]["unreadable"]["count"] == 1


def test_two_channels_of_sixteen_bits(folder):
    """As a ViT that was pre-trained on such files is probed."""
    rng = np.random.default_rng(0)
    shutil.rmtree(folder / "images")
    for name, low in (("whole", 0), ("broken", 30_000)):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(15):
            pixels = rng.integers(low, low + 35_000, (2, 40, 50), dtype=np.uint16)
            tifffile.imwrite(folder / "images" / name / f"{index}.tif", pixels, photometric="minisblack")
    config = ViTConfig.from_pretrained(folder / "vit", num_channels=2)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "vit")
    record = probed(folder)
    assert counts(record) == (24, 6, 2)
    assert record["linear"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("path", "flag", "message"),
    [
        ("absent", "--train_dir", "there is no such folder"),
        ("absent", "--validation_dir", "there is no such folder"),
        ("empty", "--train_dir", "holds nothing; expected pictures"),
        ("images/dark", "--train_dir", "15 of 15 pictures lie in no class folder"),
        ("images/dark", "--validation_dir", "give each class its own folder"),
    ],
)
def test_folders_without_classes_end_with_one_line(folder, capsys, path, flag, message):
    (folder / "empty").mkdir()
    with pytest.raises(SystemExit):
        probed(folder, flag, str(folder / path))
    assert message in capsys.readouterr().err


def test_a_class_that_training_lacks_is_named_with_what_to_do(folder, capsys):
    shutil.copytree(folder / "images" / "dark", folder / "shown" / "night")
    with pytest.raises(SystemExit):
        probed(folder, "--validation_dir", str(folder / "shown"))
    message = capsys.readouterr().err
    assert "1 test classes are not in training, e.g. 'night'; add training images of them or remove" in message
    with pytest.raises(SystemExit):
        probed(folder, "--validation_dir", str(folder / "shown"), "--max_train_samples", "20")
    assert "'night'; raise --max_train_samples 20, or add training images" in capsys.readouterr().err


def test_the_folder_of_the_output_is_made(folder):
    record = probed(folder, "--output_file", str(folder / "new" / "place" / "probe.json"))
    assert json.loads((folder / "new" / "place" / "probe.json").read_text())["knn"] == record["knn"]


@pytest.mark.parametrize(
    ("place", "message"),
    [(".", "is a folder; name a file in it"), ("file/probe.json", "cannot be written")],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(folder, capsys, monkeypatch, place, message):
    monkeypatch.setattr(probe, "load_labelled", None)  # not reached
    (folder / "file").touch()
    with pytest.raises(SystemExit):
        probed(folder, "--output_file", str(folder / place))
    assert message in capsys.readouterr().err


def test_a_recipe_lies_under_the_flags(folder):
    (folder / "probe.yaml").write_text("neighbours: 3\npooling: cls\n")
    record = probed(folder, "--config", str(folder / "probe.yaml"), "--pooling", "mean")
    assert (record["arguments"]["neighbours"], record["arguments"]["pooling"]) == (3, "mean")


def test_a_private_vit_is_asked_for_with_the_token_which_is_not_written(folder, monkeypatch):
    asked = []
    for name in ("load_vit", "read_statistics"):
        whole = getattr(probe, name)
        monkeypatch.setattr(probe, name, lambda source, whole=whole, **hub: asked.append(hub) or whole(source, **hub))
    flags = ["--token", "hf_secret", "--model_revision", "v2", "--cache_dir", str(folder / "kept")]
    assert probed(folder, *flags)["arguments"]["model_revision"] == "v2"
    assert asked == [{"revision": "v2", "cache_dir": str(folder / "kept"), "token": "hf_secret"}] * 2
    assert "hf_secret" not in (folder / "probe.json").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label_column_name", "breed"], "no column 'breed'; pass --label_column_name with one of image, label"),
        (["--neighbours", "0"], "--neighbours is at least 1"),
        (["--train_dri", "cls"], "unknown flag --train_dri; did you mean --train_dir?"),
        (["--num_channels", "1"], "takes 3 channels, the images have 1"),
    ],
)
def test_mistakes_end_with_one_line(folder, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(["--model_name_or_path", str(folder / "vit"), "--train_dir", str(folder / "images"), *flags])
    assert message in capsys.readouterr().err
