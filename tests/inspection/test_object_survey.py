"""`hf-dbp inspect IMAGES LABELS`: what detection would count, shown beforehand; a recipe by the objects; a sheet of
boxes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_images import NAMES, object_folder
from PIL import Image

from hf_dbp.data import images as lists
from hf_dbp.data.images import built_in_images
from hf_dbp.downstream.detection import finetuning
from hf_dbp.downstream.detection.arguments import GROUPS
from hf_dbp.downstream.detection.data import ObjectList, ObjectSource, load_objects
from hf_dbp.downstream.detection.objects import Objects, Oddities
from hf_dbp.downstream.segmentation.data import built_in_pairs
from hf_dbp.inspection import contact_sheet, reading
from hf_dbp.inspection.choices import Findings
from hf_dbp.inspection.folder import main as inspect
from hf_dbp.inspection.object_survey import choose_detector
from hf_dbp.recipes import parse_arguments, read_yaml

RECIPE = Path("outputs/inspection/detect.yaml")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def report(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    inspect([*flags])
    return capsys.readouterr().out


def marked(out: str) -> list[str]:
    return [line.removeprefix("PROBLEM    ") for line in out.splitlines() if line.startswith("PROBLEM")]


ODD = {
    "boxes without area, left out": [4, 4, 0, 9],
    "boxes outside their image, left out": [-20, 2, 8, 8],
    "boxes that reach beyond their image, cut off at its edge in training": [40, 3, 20, 9],
    "boxes drawn twice (the same class and corners), of which one is used": None,
    "boxes around a crowd, which are neither learned nor scored": [0, 0, 30, 30],
}


def test_what_is_odd_about_boxes_is_counted_as_training_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    object_folder(Path(), count=6)
    content = json.loads(Path("labels.json").read_text())
    first, last = content["images"][0], content["images"][-1]
    for number, (kind, box) in enumerate(ODD.items()):
        row = {"id": 900 + number, "image_id": first["id"], "category_id": 10, "iscrowd": int("crowd" in kind)}
        content["annotations"].append(row | {"bbox": box or content["annotations"][0]["bbox"]})
    row = {"id": 990, "image_id": first["id"], "category_id": 10, "bbox": [2, 2, 1, 1], "iscrowd": 0}
    content["annotations"] = [*(one for one in content["annotations"] if one["image_id"] != last["id"]), row]
    content["images"] = [one for one in content["images"] if one["file_name"] != "train/3.png"]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != 4]
    content["images"][1] |= {"height": 360, "width": 480}
    Path("labels.json").write_text(json.dumps(content))
    out = report(capsys, "images", "labels.json")
    problems = "\n".join(marked(out))
    for kind in ODD:
        assert f"1 {kind}" in (out if "crowd" in kind else problems)
        assert "crowd" not in problems
    train, validation = load_objects(ObjectSource(train_dir="images", train_mask_dir="labels.json"))
    for line in [*train.odd.lines(), *validation.odd.lines()]:
        assert line in out
    assert "1 of 10 boxes are thinner than 4 pixels as the model sees them" in problems
    assert "10 objects of 2 classes in 7 images; up to 3 in an image, 1 in the median one, none in 1; 1 images" in out
    assert "10 small, 0 medium and 0 large" in out and "8 in 6 images, thinner sides of" in out
    assert (
        "1 images differ in size from their labels and will be left out of training, e.g. images/train/1.png: it has "
        "36 x 48 pixels (height x width), its labels are for 360 x 480" in problems
    )


@pytest.mark.parametrize("labels", ["labels.json", "yolo", "labelme", "masks"])
def test_labels_of_every_form_give_a_recipe_that_detection_takes(
    labels: str, capsys: pytest.CaptureFixture[str]
) -> None:
    object_folder(Path(), count=4)
    out = report(capsys, "images", labels)
    assert "10 objects of 2 classes in 7 images; up to 2 in an image" in out and not marked(out)
    assert "hf-dbp detect --config outputs/inspection/detect.yaml" in out
    assert ("hf-dbp finetune" in out) is (labels == "masks")  # masks serve both
    model, data, training = parse_arguments(GROUPS, ["--config", str(RECIPE)], "")
    assert (data.train_dir, data.train_mask_dir, data.num_channels) == ("images", labels, 3)
    assert training.do_train and model.image_size is not None and model.model_name_or_path == "outputs/industrial-fused"
    names = [f"class {k + 1}" for k in range(2)] if labels == "masks" else NAMES
    assert [name in out for name in names] == [True, True]
    train, validation = load_objects(data.source(None, None))
    assert (len(train), len(validation)) == (4, 3)


@pytest.mark.slow
def test_the_recipe_trains_a_detector(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    object_folder(Path(), count=4)
    inspect(["images", "labels.json"])
    recipe = [line for line in RECIPE.read_text().splitlines() if not line.startswith("model_name_or_path")]
    RECIPE.write_text("\n".join([*recipe, "model_size: mini", "patch_size: 8"]))
    few = ["--max_steps", "2", "--eval_steps", "2", "--save_steps", "2", "--dataloader_num_workers", "0"]
    few += ["--dataloader_persistent_workers", "false", "--use_cpu", "--disable_tqdm", "1"]
    record = finetuning.main(["--config", str(RECIPE), *few])
    assert record["data"]["size"] == [int(read_yaml(RECIPE)["image_size"])] * 2 and record["step"] == 2


def test_objects_of_the_masks_of_a_data_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"max_train_samples": 8, "max_eval_samples": 4}
    pairs = lambda source: built_in_pairs(dataclasses.replace(source, **few))  # noqa: E731
    monkeypatch.setattr(reading, "built_in_pairs", pairs)
    monkeypatch.setattr("hf_dbp.downstream.segmentation.data.built_in_pairs", pairs)
    monkeypatch.setattr(lists, "built_in_images", lambda source: built_in_images(dataclasses.replace(source, **few)))
    out = report(capsys, "--dataset_name", "wire_bonding", "--task", "detection")
    recipe = read_yaml(RECIPE)
    assert "classes in 12 images" in out and recipe["dataset_name"] == "wire_bonding" and "train_dir" not in recipe


def test_a_split_that_leaves_every_class_in_both_parts(capsys: pytest.CaptureFixture[str]) -> None:
    object_folder(Path(), count=12)
    content = json.loads(Path("labels.json").read_text())
    kept = {one["id"] for one in content["images"] if one["file_name"] in ("train/1.png", "train/5.png")}
    content["annotations"] = [
        one for one in content["annotations"] if one["category_id"] == 10 or one["image_id"] in kept
    ]
    content["images"] = [one for one in content["images"] if one["file_name"].startswith("train")]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] <= 12]
    Path("labels.json").write_text(json.dumps(content))
    out = report(capsys, "images/train", "labels.json")
    seed = int(read_yaml(RECIPE)["subset_seed"])
    source = ObjectSource(train_dir="images/train", train_mask_dir="labels.json", subset_seed=seed, seed=seed)
    assert [part.counts_K.tolist() for part in load_objects(source)] == [[10, 1], [2, 1]]
    assert not marked(out)


def test_labels_that_training_refuses_are_a_problem_and_give_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    object_folder(Path(), count=4)
    report(capsys, "images", "labels.json")
    assert RECIPE.exists()
    Path("images/train/0.png").unlink()
    out = report(capsys, "images", "labels.json")
    assert "labels.json labels 'train/0.png', but no image has that name" in "\n".join(marked(out))
    assert not RECIPE.exists() and "hf-dbp detect" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["images", "labels.json", "--masks", "masks"], "labels are given twice, labels.json and --masks masks"),
        (["images", "--task", "detection"], "--task detection needs labels or masks of the objects"),
        (["images", "yolo", "--task", "segmentation"], "is a box without a segmentation"),
    ],
)
def test_mistakes_end_in_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    object_folder(Path(), count=2)
    with pytest.raises(SystemExit) as stop:
        inspect(flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]


def many(sides: list[float], count: int, size: tuple[int, int] = (200, 400)) -> ObjectList:
    """``count`` images with objects twice as wide as they are high, of these heights in turn."""
    corners = np.array([[2.0, 2.0, 2 + 2 * side, 2 + side] for side in sides])
    zeros = np.zeros(len(sides))
    one = Objects(size, corners, zeros.astype(np.int64), zeros + 1, zeros > 0)
    return ObjectList([one] * count, ["x"], Oddities())


@pytest.mark.parametrize(
    ("gpu", "height", "count", "wanted"),
    [
        (False, 100.0, 40, (128, "it is the encoder's own size")),  # half of the image
        (False, 10.0, 40, (320, "16.0 pixels, a patch has 16")),
        (False, 4.0, 40, (512, "800 would make that a patch (16), but take long without a GPU")),
        (True, 4.0, 40, (800, "16.0 pixels")),
        (True, 1.0, 40, (1024, "3200 would make that a patch (16), but take long")),
    ],
)
def test_the_view_follows_the_objects(
    gpu: bool, height: float, count: int, wanted: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    found = Findings(pretraining={"patch_size": 16, "image_size": 128, "num_channels": 3})
    choose_detector(many([height], count), 1, count, found)
    assert (found.detection["image_size"], "query_groups" in found.detection) == (wanted[0], not gpu)
    assert wanted[1] in "\n".join(found.lines)


@pytest.mark.parametrize(
    ("most", "trained", "queries", "batch", "epochs"),
    [
        (1, 4, 50, 2, 500),
        (30, 40, 90, 4, 100),
        (200, 400, 300, 4, 20),
        (300, 4000, 360, 4, 2),
        (200, 160, 300, 4, None),
    ],
)
def test_queries_and_length_follow_the_numbers(
    most: int, trained: int, queries: int, batch: int, epochs: int | None
) -> None:
    found = Findings(pretraining={"patch_size": 16, "image_size": 320, "num_channels": 3})
    choose_detector(many([100.0], 2), most, trained, found)
    chosen = found.detection
    assert (chosen["num_queries"], chosen["per_device_train_batch_size"]) == (queries, batch)
    assert chosen.get("num_train_epochs", 50) == (epochs or 50)
    assert bool(found.problems) is (most > 100)


@pytest.mark.usefixtures("real_pictures")
def test_boxes_are_drawn_on_the_thumbnails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("images").mkdir()
    Image.fromarray(np.zeros((300, 600, 3), np.uint8)).save("images/a.png")
    Image.fromarray(np.zeros((300, 600, 3), np.uint8)).save("images/b.png")
    images = [{"id": n, "file_name": f"{name}.png", "height": 300, "width": 600} for n, name in enumerate("ab")]
    rows = [{"id": n + 1, "image_id": n, "category_id": 1, "bbox": [60, 30, 120, 90], "iscrowd": 0} for n in (0, 1)]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "hole"}]}
    Path("labels.json").write_text(json.dumps(content))
    drawn: list[Any] = []
    monkeypatch.setattr(contact_sheet, "draw_objects", lambda axis, boxes, *rest: drawn.append(boxes.tolist()))
    out = report(capsys, "images", "labels.json")
    small = 256 / 600
    assert np.asarray(drawn) == pytest.approx(np.array([[[60, 30, 180, 120]]] * 2) * small)
    assert Path("outputs/inspection/contact_sheet.png").stat().st_size > 1000 and "contact_sheet.png" in out
