"""A detector applied to new images: the table, the COCO file, overlays, resumed; the figures of its evaluation."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from object_images import FLAGS, NAMES, object_folder
from PIL import Image
from pycocotools.coco import COCO

from hf_dbp.downstream.detection.coco import FIGURES, Found, coco_scores
from hf_dbp.downstream.detection.data import ObjectSource, load_objects
from hf_dbp.downstream.detection.figures import draw_objects
from hf_dbp.downstream.detection.finetuning import main
from hf_dbp.downstream.detection.postprocessing import found_in
from hf_dbp.downstream.detection.runs import Runs
from hf_dbp.downstream.predicting import main as predict_main
from hf_dbp.downstream.predicting import predict
from hf_dbp.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, and detectors of boxes and of masks after a few steps on them."""
    folder = object_folder(tmp_path_factory.mktemp("objects"), count=4)
    for name, more in (("boxes", []), ("masks", ["--instances"])):
        out = ["--max_steps", "2", "--output_dir", str(folder / "model" / name), *more]
        main([str(folder / "images"), str(folder / "labels.json"), *FLAGS, *out])
    return folder


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_predictions_on_the_validation_images_have_the_scores_of_evaluation(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    record = json.loads((folder / "model" / kind / "eval.json").read_text())
    found = predict(str(folder / "model" / kind), folder / "images" / "validation", tmp_path, threshold=0.0)
    source = ObjectSource(
        train_dir=str(folder / "images"), train_mask_dir=str(folder / "labels.json"), instances=kind == "masks",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    truth = {index: one for index, one in enumerate(load_objects(source)[1].objects) if one is not None}
    boxes = {}
    for index in range(3):
        rows = [row for row in found.rows if row["image"] == str(index)]
        corners = np.array([[row[side] for side in ("left", "top", "right", "bottom")] for row in rows])
        runs = [Runs((36, 48), row["runs"].encode()) for row in rows] if kind == "masks" else []
        scores = np.array([row["score"] for row in rows])
        boxes[index] = Found(corners, np.array([row["class_id"] for row in rows]), scores, runs)
    figures = coco_scores(truth, boxes, 2).figures
    assert {name: record[name] for name in figures} == pytest.approx(figures)
    if kind == "masks":
        figures = coco_scores(truth, boxes, 2, masks=True).figures
        assert {name: record[f"mask_{name}"] for name in figures} == pytest.approx(figures)
    with (tmp_path / "predictions.csv").open() as opened:
        assert [row["class"] for row in csv.DictReader(opened)] == [row["class"] for row in found.rows]
    coco = COCO(str(tmp_path / "coco.json"))
    assert len(coco.anns) == len(found.rows) and [cat["name"] for cat in coco.cats.values()] == list(NAMES)
    if kind == "masks":
        pixels = [int(coco.annToMask(one).sum()) for one in coco.anns.values()]
        assert pixels == [row["pixels"] for row in found.rows]
    with Image.open(tmp_path / "overlays" / "0.jpg") as overlay:
        assert overlay.size == (48, 36)
    assert sum(found.record["counts"].values()) == len(found.rows)


def test_an_image_without_objects_has_a_row_and_a_killed_run_resumes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = str(folder / "model" / "masks"), str(folder / "images" / "validation")
    record = predict_main([model, images, "--output_dir", str(tmp_path), "--threshold", "1", "--no_overlays"])
    assert record["empty"] == 3 and record["counts"] == {"block": 0, "stripe": 0}
    best = max(row["score"] for row in predict(model, images, tmp_path / "all", threshold=0.0, no_overlays=True).rows)
    advice = f"no object has a score of 1 or more (the highest is {best:.2g}): train the detector for longer"
    assert record["next"].startswith(advice)
    assert json.loads((tmp_path / "coco.json").read_text())["annotations"] == []
    assert not (tmp_path / "overlays").exists()
    lines = (tmp_path / "done.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "done.jsonl").write_text("".join(lines[:2]))
    again = predict(model, images, tmp_path, threshold=1.0, no_overlays=True)
    assert again.record["images_of_this_run"] == 2 and len(again.rows) == 3
    with pytest.raises(UserError, match=r"holds predictions with threshold 1\.0, not 0\.5"):
        predict(model, images, tmp_path, threshold=0.5, no_overlays=True)
    assert "next" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_given_labels_score_predictions_as_evaluation_does(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """To all digits; labels of other images are not used, and said so."""
    model, images = str(folder / "model" / kind), folder / "images" / "validation"
    labels = labels_near(predict(model, images, tmp_path / "found", threshold=0.0).folder, folder)
    evaluated = ["--do_eval", "--use_cpu", "--report_to", "none", "--output_dir", str(tmp_path / "evaluated")]
    evaluated += ["--model_name_or_path", model, "--per_device_eval_batch_size", "4"]
    record = main([str(folder / "images"), str(labels), *evaluated])
    given = [model, str(images), "--output_dir", str(tmp_path / "scored"), "--no_overlays"]
    scored = predict_main([*given, "--masks", str(labels)])
    names = [*FIGURES, *(f"mask_{name}" for name in FIGURES if kind == "masks")]
    assert {name: scored[name] for name in names} == {name: record.get(f"eval_{name}") for name in names}
    assert 0 < scored["map"] < 1 and scored["scored_images"] == 3 and scored["threshold"] == 0.0
    assert "labels 4 images that are not in" in caplog.text
    assert f"mAP        {record['eval_map']:.4f}" in capsys.readouterr().out


def labels_near(found: Path, folder: Path) -> Path:
    """Labels whose validation objects are every fifth prediction, moved by a fiftieth of its width."""
    content = json.loads((folder / "labels.json").read_text())
    predicted = json.loads((found / "coco.json").read_text())
    own = {one["file_name"]: one["id"] for one in content["images"]}
    files = {one["id"]: f"validation/{one['file_name']}" for one in predicted["images"]}
    trained = {number for file, number in own.items() if file.startswith("train")}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in trained]
    for one in predicted["annotations"][::5]:
        left, top, width, height = one["bbox"]
        moved = {
            "id": 1000 + one["id"],
            "image_id": own[files[one["image_id"]]],
            "bbox": [left + width / 50, top, width, height],
        }
        content["annotations"].append(one | moved | {"category_id": 10 * one["category_id"]})
    (found / "labels.json").write_text(json.dumps(content))
    return found / "labels.json"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": "MASKS"}, "a detector's predictions are scored by labels"),
        ({"threshold": 2.0}, "--threshold is a score between 0 and 1, got 2.0"),
        ({"crop_size": 32}, "--crop_size is for segmentation"),
        ({"export": ["labelme"]}, "export 'labelme': the objects of a detector are exported as coco"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    settings = {name: str(folder / "masks") if value == "MASKS" else value for name, value in settings.items()}
    with pytest.raises(UserError, match=message):
        predict(str(folder / "model" / "boxes"), folder / "images" / "validation", tmp_path, **settings)


def test_the_best_scores_of_queries_and_classes_are_what_is_found() -> None:
    """Two classes of one query are two predictions; boxes are cut at the edge of the image."""

    class Output:
        logits = torch.tensor([[[2.0, 1.0], [-1.0, 3.0], [-5.0, -5.0]]])
        pred_boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.2], [0.9, 0.1, 0.4, 0.4], [0.5, 0.5, 1.0, 1.0]]])

    (found,) = found_in(Output(), [(100, 200)], limit=3)
    assert found.classes_M.tolist() == [1, 0, 1]
    np.testing.assert_allclose(found.scores_M, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    np.testing.assert_allclose(found.boxes_M4, [[140, 0, 200, 30], [50, 40, 150, 60], [50, 40, 150, 60]], atol=1e-4)
    (sure,) = found_in(Output(), [(100, 200)], threshold=0.9)
    assert len(sure) == 1


def test_boxes_are_drawn_along_the_edges_of_pixels() -> None:
    axis = Figure().subplots()
    draw_objects(axis, np.array([[2.0, 3, 6, 9]]), np.array([0]), np.array([[1.0, 0, 0]]))
    (box,) = axis.patches
    assert isinstance(box, Rectangle)
    assert box.get_xy() == (1.5, 2.5) and (box.get_width(), box.get_height()) == (4.0, 6.0)
