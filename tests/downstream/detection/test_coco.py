"""Average precision is pycocotools' own of the same files, to all digits."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hf_dbp.data.labels.formats import read_labels
from hf_dbp.downstream.detection import runs as runs_module
from hf_dbp.downstream.detection.coco import FIGURES, Found, coco_scores
from hf_dbp.downstream.detection.objects import Objects, Oddities, labelled_objects
from hf_dbp.errors import UserError

NAMES = ("cat", "dog", "bird")


def drawn(rng: np.random.Generator, size: tuple[int, int], count: int) -> list[list[float]]:
    height, width = size
    x, y = rng.uniform(0, width - 12, count), rng.uniform(0, height - 12, count)
    w = rng.uniform(2, 1 + (width - x) * rng.choice([0.2, 1.0], count))
    h = rng.uniform(2, 1 + (height - y) * rng.choice([0.2, 1.0], count))
    return quarters(np.stack([x, y, np.minimum(w, width - x), np.minimum(h, height - y)], axis=1))


def quarters(values: Any) -> Any:
    """In whole quarters of pixels, so that left + width - left is width to the last bit."""
    return ((np.asarray(values) * 4).round() / 4).tolist()


def polygon(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y + h / 3, x + 0.7 * w, y + h, x, y + 0.8 * h]


def content_of(seed: int, images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO file with crowds and images without objects, and a file of results: moved boxes, wrong classes, noise."""
    rng = np.random.default_rng(seed)
    truth: dict[str, Any] = {"images": [], "annotations": []}
    truth["categories"] = [{"id": k + 3, "name": name} for k, name in enumerate(NAMES)]
    results = []
    for image in range(1, images + 1):
        size = (int(rng.integers(40, 160)), int(rng.integers(40, 160)))
        truth["images"].append({"id": image, "file_name": f"{image}.png", "height": size[0], "width": size[1]})
        for box in drawn(rng, size, int(rng.integers(0, 6))):
            category = int(rng.integers(3, 6))
            truth["annotations"].append({
                "id": len(truth["annotations"]) + 1, "image_id": image, "category_id": category, "bbox": box,
                "segmentation": [polygon(box)], "area": round(box[2] * box[3] * 0.7, 3),
                "iscrowd": int(rng.random() < 0.1),
            })  # fmt: skip
            for _ in range(int(rng.integers(0, 3))):
                moved = (np.array(box) + rng.normal(0, 2, 4)).clip([0, 0, 2, 2], [size[1] - 3, size[0] - 3, 200, 200])
                guess = category if rng.random() < 0.8 else int(rng.integers(3, 6))
                results.append((image, guess, float(rng.random()), quarters(moved)))
        results += [(image, int(rng.integers(3, 6)), float(rng.random()), box) for box in drawn(rng, size, 2)]
    results.sort(key=lambda row: -row[2])
    rows = [{"image_id": i, "category_id": c, "score": s, "bbox": b} for i, c, s, b in results]
    return truth, rows


def stock_stats(truth: Path, results: Path, kind: str) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        judged = COCOeval(coco, coco.loadRes(str(results)), kind)
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return [float(value) for value in judged.stats]


def ours(truth: Path, rows: list[dict[str, Any]], masks: bool) -> Any:
    """The same files through our readers."""
    images, names = read_labels(str(truth), lambda name: (0, 0))
    assert names == list(NAMES)
    ids = {name: k for k, name in enumerate(names)}
    objects = {
        number + 1: labelled_objects(labelled, ids, Oddities(), instances=masks)
        for number, labelled in enumerate(images)
    }
    found = {}
    for image in objects:
        mine = [row for row in rows if row["image_id"] == image]
        sides = np.array([row["bbox"] for row in mine]).reshape(-1, 4)
        corners = np.concatenate([sides[:, :2], sides[:, :2] + sides[:, 2:]], axis=1)
        size = images[image - 1].size
        packed = [runs_module.packed_polygons(row["segmentation"], size) for row in mine] if masks else []
        classes = np.array([row["category_id"] - 3 for row in mine], np.int64)
        found[image] = Found(corners, classes, np.array([row["score"] for row in mine]), packed)
    return coco_scores(objects, found, len(NAMES), masks=masks)


@pytest.mark.parametrize("masks", [False, True])
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 8))
def test_figures_are_those_of_pycocotools(
    masks: bool, seed: int, images: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("coco")
    truth, rows = content_of(seed, images)
    if masks:
        sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
        for row in rows:
            row["segmentation"] = [polygon(row["bbox"])]
        results = [  # without boxes, as pycocotools would take their area
            {key: row[key] for key in ("image_id", "category_id", "score")}
            | {"segmentation": text(runs_module.packed_polygons(row["segmentation"], sizes[row["image_id"]]))}
            for row in rows
        ]
    else:
        results = rows
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    expected = stock_stats(folder / "truth.json", folder / "results.json", "segm" if masks else "bbox")
    scores = ours(folder / "truth.json", rows, masks)
    found = [-1.0 if scores.figures[name] is None else scores.figures[name] for name in FIGURES]
    assert found == expected
    classes = [row["ap"] for row in scores.classes if row["ap"] is not None]
    if classes:
        assert np.mean(classes) == pytest.approx(scores.figures["map"])
    counts = [sum(a["category_id"] == k + 3 and not a["iscrowd"] for a in truth["annotations"]) for k in range(3)]
    assert [row["objects"] for row in scores.classes] == counts


def text(runs: runs_module.Runs) -> dict[str, Any]:
    return {"size": list(runs.size), "counts": runs.counts.decode()}


def test_perfect_none_and_empty() -> None:
    boxes = np.array([[1.0, 2, 30, 40], [50, 60, 150, 180]])
    ones = np.zeros(2, np.int64)
    truth = {0: Objects((200, 200), boxes, ones, np.array([1102.0, 12000]), np.zeros(2, bool))}
    perfect = coco_scores(truth, {0: Found(boxes, ones, np.array([0.9, 0.8]))}, 1).figures
    for name in ("map", "map_large", "map_medium", "mar_100"):
        assert perfect[name] == pytest.approx(1.0)
    assert perfect["map_small"] is None and perfect["mar_1"] == 0.5
    nothing = coco_scores(truth, {0: Found(np.zeros((0, 4)), ones[:0], np.zeros(0))}, 1)
    assert nothing.figures["map"] == 0.0 and nothing.classes == [{"ap": 0.0, "ap_50": 0.0, "recall": 0.0, "objects": 2}]


def test_without_pycocotools_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    monkeypatch.delitem(__import__("sys").modules, "pycocotools.cocoeval", raising=False)
    with pytest.raises(UserError, match="pip install pycocotools"):
        runs_module.tools("cocoeval")
