"""The probe's arithmetic, and the whole way from a folder of classes to JSON."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from transformers import ViTConfig, ViTModel

from hf_dbp.probe import knn_accuracy, linear_accuracy, main, wilson_interval


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (7, 10), (10, 10), (412, 1000)])
def test_wilson_interval_is_scipys(hits, trials):
    expected = binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson_interval(hits, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_neighbours_look_at_angles_and_vote():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 5.0]])
    test = torch.tensor([[10.0, 1.0], [0.1, 1.0]])
    assert knn_accuracy(train, torch.tensor([0, 0, 1]), test, torch.tensor([0, 1]), k=1) == 2
    assert knn_accuracy(train, torch.tensor([0, 0, 1]), test, torch.tensor([1, 0]), k=1) == 0
    assert knn_accuracy(train, torch.tensor([0, 0, 1]), test, torch.tensor([0, 1]), k=50) == 2  # near ones weigh more


def test_the_linear_probe_finds_a_linear_rule_among_scales():
    features = torch.randn(400, 6) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 1.0]) + 5
    labels = (features[:, 0] > 5).long() + 2 * (features[:, 2] > 5).long()
    hits, penalty = linear_accuracy(features[:300], labels[:300], features[300:], labels[300:], seed=0)
    assert hits >= 95
    assert penalty < 0.1
    noise = torch.randint(0, 2, (400,))
    hits, _ = linear_accuracy(features[:300], noise[:300], features[300:], noise[300:], seed=0)
    assert hits < 70


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
    assert record["data"] == {"source": str(folder / "images"), "train_images": 24, "test_images": 6, "classes": 2}
    assert record["linear"]["accuracy"] == 1.0
    assert record["linear"]["interval_95"][0] < 0.7  # six images prove little
    assert record["commonest_class"]["accuracy"] < 1.0
    again = main([*flags, "--output_file", str(folder / "again.json")])
    assert {k: again[k] for k in ("knn", "linear")} == {k: record[k] for k in ("knn", "linear")}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label_column_name", "breed"], "no column 'breed'; pass --label_column_name with one of image, label"),
        (["--neighbours", "0"], "--neighbours is at least 1"),
        (["--num_channels", "1"], "takes 3 channels, the images have 1"),
    ],
)
def test_mistakes_end_with_one_line(folder, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(["--model_name_or_path", str(folder / "vit"), "--train_dir", str(folder / "images"), *flags])
    assert message in capsys.readouterr().err
