"""Segmentation by the nearest labelled patches."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

import hf_dbp
from hf_dbp.cli import main
from hf_dbp.downstream.segmentation import retrieval
from hf_dbp.downstream.segmentation.data import SegmentationSource, load_labelled_images
from hf_dbp.downstream.segmentation.detection import image_figures
from hf_dbp.downstream.segmentation.inference import WholeImages, count_pixels
from hf_dbp.downstream.segmentation.retrieval import RetrievalSegmenter, build_memory, class_shares, load_retrieval

CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Pictures of red, green and blue parts, of several sizes, masks that name them with a void border; and a ViT."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 3)):
        (tmp_path / part).mkdir()
        (tmp_path / f"{part}_masks").mkdir()
        for number in range(count):
            ids = np.kron(rng.integers(0, 3, (3, 4)), np.ones((16, 16), np.int64))[: 40 + number, :]
            if number == 0:
                ids = np.kron(np.arange(12).reshape(3, 4) % 3, np.ones((16, 16), np.int64))  # one has every class
            pixels = np.eye(3)[ids] * 200 + rng.integers(0, 40, (*ids.shape, 3))
            ids[:, -3:] = 255
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / part / f"{number}.png")
            Image.fromarray(ids.astype(np.uint8)).save(tmp_path / f"{part}_masks" / f"{number}.png")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**CONFIG), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.3, 0.3, 0.3]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(statistics))
    return tmp_path


def retrieve(folder, *flags):
    data = ["--train_dir", "train", "--train_mask_dir", "train_masks", "--validation_dir", "val",
            "--validation_mask_dir", "val_masks"]  # fmt: skip
    paths = [part if part.startswith("--") else str(folder / part) for part in data]
    own = ["--model_name_or_path", str(folder / "vit"), "--output_dir", str(folder / "out")]
    main(["retrieve", *own, *paths, "--num_labels", "3", "--long_edge", "0", *flags])
    return json.loads((folder / "out" / "eval.json").read_text())


def test_what_looks_alike_is_labelled_alike(real_pictures, folder, capsys):
    record = retrieve(folder)
    assert record["mean_iou"] > 0.8
    assert record["majority_class_mean_iou"] < 0.5
    assert record["data"]["train_images"] == 4 and record["memory"]["left_out"] == 0
    assert f"mean IoU    {record['mean_iou']:.4f}" in capsys.readouterr().out
    assert retrieve(folder, "--neighbours", "1")["mean_iou"] > 0.8
    for picture in ("predictions.png", "worst.png"):
        assert (folder / "out" / picture).stat().st_size > 1000
    assert isinstance(ViTModel.from_pretrained(folder / "out", add_pooling_layer=False), ViTModel)


def test_a_saved_model_gives_the_figures_that_were_written(folder):
    record = retrieve(folder, "--neighbours", "5", "--temperature", "0.2")
    model, settings = load_retrieval(folder / "out")
    assert (model.neighbours, model.temperature, settings["crop_size"]) == (5, 0.2, 32)
    source = SegmentationSource(
        train_dir=str(folder / "train"), train_mask_dir=str(folder / "train_masks"), num_labels=3,
        validation_dir=str(folder / "val"), validation_mask_dir=str(folder / "val_masks"),
    )  # fmt: skip
    images = load_labelled_images(source)[1]
    data = WholeImages(images, None, [0.5] * 3, [0.3] * 3)
    found = count_pixels(model, ([data[i]] for i in range(len(data))), num_labels=3, ignore_index=255, crop_size=32)
    confusion = found.confusion_KK
    again = retrieval.figures(confusion, {k: f"class {k}" for k in range(3)})
    assert {name: record[name] for name in again} == again
    assert set(again["per_class"]["class 1"]) == {"iou", "accuracy", "precision", "recall", "dice", "pixels"}
    assert record["images"] == [dataclasses.asdict(image) for image in image_figures(found.images)]
    assert record["detection"] is None  # every image holds more than background


@pytest.mark.parametrize(
    "flags", [[], ["--long_edge", "48", "--crop_size", "16", "--batch_size", "3", "--neighbours", "4"]]
)
def test_predict_gives_the_same_figures_to_all_digits(folder, flags):
    record = retrieve(folder, *flags)
    model, images, masks = (str(folder / name) for name in ("out", "val", "val_masks"))
    found = hf_dbp.predict(model, images, folder / "predicted", masks=masks)
    assert (found.record["mean_iou"], found.record["per_class"]) == (record["mean_iou"], record["per_class"])
    assert [row["score"] for row in found.rows[::3]] == [image["score"] for image in record["images"]]
    for name in ("0", "1", "2"):
        with (
            Image.open(folder / "predicted/masks" / f"{name}.png") as mask,
            Image.open(f"{images}/{name}.png") as image,
        ):
            assert (mask.mode, mask.size) == ("L", image.size)
        assert (folder / "predicted" / "overlays" / f"{name}.jpg").stat().st_size > 500
    other = hf_dbp.predict(model, images, folder / "other", masks=masks, crop_size=24, long_edge=0)
    assert other.record["per_class"] != record["per_class"]


def test_predictions_of_another_memory_are_not_mixed_in(folder):
    retrieve(folder)
    hf_dbp.predict(str(folder / "out"), folder / "val", folder / "predicted")
    retrieve(folder, "--memory", "20")
    with pytest.raises(ValueError, match="holds predictions with weights"):
        hf_dbp.predict(str(folder / "out"), folder / "val", folder / "predicted")


def test_a_patch_takes_the_weighted_shares_of_its_nearest():
    """Against the formula written out."""
    vit = ViTModel(ViTConfig(**CONFIG), add_pooling_layer=False).eval()
    memory, shares = torch.randn(50, 32), torch.rand(50, 4).softmax(dim=1)
    model = RetrievalSegmenter(vit, memory, shares, dict(enumerate("abcd")), neighbours=7, temperature=0.1)
    pixels = torch.randn(2, 3, 32, 48)
    logits = model(pixel_values=pixels).logits
    with torch.no_grad():
        tokens = vit(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:].double()
    grid = torch.zeros(2, 4, 4, 6, dtype=torch.float64)
    mean = memory.double().mean(dim=0)
    for image in range(2):
        for number, token in enumerate(tokens[image]):
            cosine = torch.nn.functional.cosine_similarity((token - mean)[None], memory.double() - mean)
            best = cosine.topk(7)
            weight = (best.values / 0.1).exp()
            grid[image, :, number // 6, number % 6] = (weight / weight.sum()) @ shares[best.indices].double()
    expected = torch.nn.functional.interpolate(grid, (32, 48), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits.exp().double() - 1e-6, expected, rtol=1e-4, atol=1e-5)


def test_shares_count_labelled_pixels_alone():
    mask = np.full((4, 8), -1, np.int32)
    mask[0, :4], mask[1, :2], mask[2, 4:] = 0, 1, 2
    shares, labelled = class_shares(mask, (4, 4), 3)
    assert labelled.tolist() == [6, 4]
    torch.testing.assert_close(shares, torch.tensor([[4 / 6, 2 / 6, 0], [0, 0, 1]]))


def test_the_ignored_label_is_no_class_even_below_their_number(folder):
    """Label 1 ignored among 3 classes: no patch holds it."""
    source = SegmentationSource(
        train_dir=str(folder / "train"), train_mask_dir=str(folder / "train_masks"), num_labels=256, ignore_index=1
    )
    data = WholeImages(load_labelled_images(source)[0], None, [0.5] * 3, [0.3] * 3)
    vit = ViTModel.from_pretrained(folder / "vit", add_pooling_layer=False)
    _, shares, _ = build_memory(vit, data, 32, 256, 10_000)
    assert shares[:, 1].sum() == 0 and shares[:, [0, 2]].sum() > 0


def test_too_many_patches_are_drawn_from_and_counted(folder, caplog):
    record = retrieve(folder, "--memory", "20")
    assert record["memory"]["patches"] == 20 and record["memory"]["left_out"] > 20
    assert "20 of" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--neighbours", "0"], "--neighbours is above 0"),
        (["--crop_size", "20"], "--crop_size 20 is not a multiple of the patch size 8"),
        (["--num_channels", "1"], "the ViT takes 3 channels, the images have 1"),
    ],
)
def test_mistakes_end_with_one_line(folder, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        retrieve(folder, *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_another_kind_or_a_wrong_memory_is_refused(folder):
    with pytest.raises(ValueError, match="is not a folder of `hf-dbp retrieve`"):
        load_retrieval(folder / "vit")
    retrieve(folder)
    settings = json.loads((folder / "out" / "retrieval.json").read_text())
    (folder / "out" / "retrieval.json").write_text(json.dumps(settings | {"id2label": {"0": "only"}}))
    with pytest.raises(ValueError, match="does not fit the ViT or the classes"):
        load_retrieval(folder / "out")
