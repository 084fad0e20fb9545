"""`hf-dbp predict`: the figures of `eval.json` to all digits; whole files after a kill; stock models."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
import torch
from filelock import FileLock
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

import hf_dbp
from hf_dbp import locking, precision
from hf_dbp.data.labels.formats import coco_content
from hf_dbp.data.windows import open_rows
from hf_dbp.data.wire_bonding import render
from hf_dbp.downstream import predicting
from hf_dbp.downstream.segmentation import opened as opened_module
from hf_dbp.downstream.segmentation import predictor as predictor_module
from hf_dbp.downstream.segmentation import sliding
from hf_dbp.downstream.segmentation.components import class_pixels
from hf_dbp.downstream.segmentation.data import SegmentationSource, load_labelled_images
from hf_dbp.downstream.segmentation.finetuning import main as finetune
from hf_dbp.downstream.segmentation.opened import RowsView
from hf_dbp.downstream.segmentation.predictor import Segmenter, load
from hf_dbp.errors import UserError

ROOT = Path(__file__).parents[3]
CAMVID = ROOT.parent / "shared" / "data" / "camvid"
TRAINING = [
    *("--head_size", "8", "--auxiliary_head_size", "8", "--per_device_train_batch_size", "2", "--max_steps", "6"),
    *(
        "--per_device_eval_batch_size",
        "3",
        "--learning_rate",
        "3e-3",
        "--class_weights",
        "inverse",
        "--do_train",
        "--use_cpu",
        "--report_to",
        "none",
    ),
    *("--disable_tqdm", "1", "--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false"),
]


@pytest.fixture(scope="module")
def wafers(tmp_path_factory):
    """Folders of 16-bit two-channel TIFFs of mixed sizes with masks, split into training and validation."""
    root = tmp_path_factory.mktemp("wafers")
    for split, first, count in (("train", 0, 4), ("validation", 10_000_000, 5)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            image, mask = render(first + index, size=40 + 9 * (index % 3), bits=16)
            file = root / "images" / split / f"{index:03}.tif"
            tifffile.imwrite(file, np.moveaxis(image, 2, 0), photometric="minisblack")
            Image.fromarray(mask).save(root / "masks" / split / f"{index:03}.png")
    return root


@pytest.fixture(scope="module")
def segmenter(wafers, tmp_path_factory):
    """For each way to scale, a trained model and its record."""
    found = {}
    torch.manual_seed(0)
    for name, flags in {
        "native": ["--crop_size", "32", "--long_edge", "0"],
        "smaller": ["--crop_size", "32", "--long_edge", "36"],
        "padded": ["--crop_size", "64", "--long_edge", "0"],
    }.items():
        out = tmp_path_factory.mktemp(name)
        where = ["--train_dir", str(wafers / "images"), "--train_mask_dir", str(wafers / "masks")]
        model = ["--model_size", "mini", "--patch_size", "16", "--num_labels", "5"]
        found[name] = (out, finetune([*where, *model, *flags, *TRAINING, "--output_dir", str(out)]))
    return found


def size_of(file):
    with Image.open(file) as picture:
        return picture.size


def rows_of(folder):
    with (folder / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["native", "smaller", "padded"])
def test_it_gives_eval_json_to_all_digits(segmenter, wafers, tmp_path, name):
    """Whatever the threads; with another crop it does not, so the comparison can fail."""
    out, record = segmenter[name]
    images, masks = str(wafers / "images/validation"), str(wafers / "masks/validation")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = hf_dbp.predict(str(out), images, tmp_path / "out", masks=masks)
    finally:
        torch.set_num_threads(threads)
    assert sum(map(bool, (row["precision"] for row in record["per_class"].values()))) >= 2  # it does predict
    assert found.record["mean_iou"] == record["mean_iou"]
    assert found.record["per_class"] == record["per_class"]
    scores = {row["image"]: float(row["score"]) for row in rows_of(tmp_path / "out")}
    assert [scores[f"{index:03}"] for index in range(5)] == [image["score"] for image in record["images"]]
    other = hf_dbp.predict(str(out), images, tmp_path / "other", masks=masks, crop_size=48, long_edge=0)
    assert other.record["per_class"] != record["per_class"]


@pytest.mark.parametrize(("fast", "autocast"), [(True, "bfloat16"), (False, None)])
def test_a_cpu_that_is_slow_in_16_bits_predicts_in_float32_and_says_so(
    segmenter, wafers, tmp_path, monkeypatch, caplog, fast, autocast
):
    monkeypatch.setattr(precision, "cpu_is_fast", lambda dtype: fast)
    trained, record = segmenter["native"]
    out, images = shutil.copytree(trained, tmp_path / "model"), str(wafers / "images/validation")
    config = json.loads((out / "config.json").read_text())
    config["hf_dbp_evaluated"]["autocast"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config))
    kinds: set[torch.dtype] = set()  # of what the linear layers gave

    def seen(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear):
            kinds.add(output.dtype)

    with register_module_forward_hook(seen):
        found = hf_dbp.predict(str(out), images, tmp_path / "out", masks=str(wafers / "masks/validation"))
    assert found.record["autocast"] == autocast
    assert any("evaluated in bfloat16" in message for message in caplog.messages) == (autocast is None)
    assert kinds == {torch.bfloat16 if fast else torch.float32}
    if autocast is None:
        assert found.record["per_class"] == record["per_class"]


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}")
@pytest.mark.slow
def test_it_gives_eval_json_of_camvid_to_all_digits(tmp_path):
    """Photographs with ignored pixels, evaluated from parquet, scaled down; predicted from picture files."""
    data = {"train_dir": str(CAMVID), "num_labels": 11, "ignore_index": 11, "max_train_samples": 4}
    data["max_eval_samples"] = 3
    _, validation = load_labelled_images(SegmentationSource(**data))
    for index in range(3):
        for kind, array in zip(("images", "masks"), validation[index], strict=True):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(tmp_path / kind / f"{index}.png")
    flags = [part for name, value in data.items() for part in (f"--{name}", str(value))]
    flags += ["--model_size", "mini", "--crop_size", "64", "--long_edge", "160"]
    record = finetune([*flags, *TRAINING, "--output_dir", str(tmp_path / "model")])
    found = hf_dbp.predict(
        str(tmp_path / "model"), tmp_path / "images", tmp_path / "out", masks=str(tmp_path / "masks"), ignore_index=11
    )
    assert sum(bool(row["hits"]) for row in found.rows) >= 3  # it does predict
    assert (found.record["mean_iou"], found.record["per_class"]) == (record["mean_iou"], record["per_class"])


def test_masks_table_and_overlays_say_the_same(segmenter, wafers, tmp_path):
    found = hf_dbp.predict(str(segmenter["native"][0]), wafers / "images/validation", tmp_path, table="parquet")
    assert found.table.name == "predictions.parquet" and found.table.is_file()
    for index in range(5):
        with Image.open(tmp_path / f"masks/{index:03}.png") as picture:
            mask = np.asarray(picture)
        rows = [row for row in found.rows if row["image"] == f"{index:03}"]
        assert (
            mask.dtype == np.uint8
            and [row["pixels"] for row in rows] == np.bincount(mask.ravel(), minlength=5).tolist()
        )
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert all((row["mean_confidence"] is None) == (row["pixels"] == 0) for row in rows)
        assert all(0.2 <= row["mean_confidence"] <= 1 for row in rows if row["pixels"])
        assert size_of(tmp_path / f"overlays/{index:03}.jpg") == mask.shape[::-1]


def test_it_resumes_and_does_no_image_twice(segmenter, wafers, tmp_path, monkeypatch):
    """Stopped at the third image: two are done, and the repeated command opens the other three alone."""
    model, images, opened = str(segmenter["native"][0]), wafers / "images/validation", []
    write = Segmenter.write

    def failing(self, result, folder):
        if result.image.name == "002":
            raise KeyboardInterrupt
        return write(self, result, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Segmenter, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            hf_dbp.predict(model, images, tmp_path)
    assert not (tmp_path / "predictions.csv").exists()
    with (tmp_path / "done.jsonl").open("a") as journal:
        journal.write('{"image": "002", "ro')  # cut off in the middle of a line
    (tmp_path / "masks" / ".003.png.part").write_bytes(b"half")
    kept = (tmp_path / "masks" / "000.png").stat().st_mtime_ns
    original = Segmenter.open
    monkeypatch.setattr(
        Segmenter, "open", lambda self, name, files: (opened.append(name), original(self, name, files))[1]
    )
    found = hf_dbp.predict(model, images, tmp_path)
    assert sorted(opened) == ["002", "003", "004"]
    assert (tmp_path / "masks" / "000.png").stat().st_mtime_ns == kept
    assert not list(tmp_path.rglob(".*.part"))
    whole = hf_dbp.predict(model, images, tmp_path / "whole")
    assert found.rows == whole.rows and found.record["images"] == 5 and found.record["images_of_this_run"] == 3


def test_results_of_another_model_are_not_mixed(segmenter, wafers, tmp_path):
    hf_dbp.predict(str(segmenter["native"][0]), wafers / "images/validation/000.tif", tmp_path)
    with pytest.raises(UserError, match=r"holds predictions with .*give another --output_dir"):
        hf_dbp.predict(str(segmenter["padded"][0]), wafers / "images/validation", tmp_path)


def test_damaged_images_are_left_out_and_named(segmenter, wafers, tmp_path):
    folder = tmp_path / "images"
    (folder / "lot").mkdir(parents=True)
    (folder / "lot" / "a.tif").write_bytes((wafers / "images/validation/000.tif").read_bytes())
    (folder / "b.tif").write_bytes(b"II*\0 no more")
    found = hf_dbp.predict(str(segmenter["native"][0]), folder, tmp_path / "out")
    assert found.record["images"] == 1 and list(found.record["unreadable"]["images"]) == ["b"]
    assert (tmp_path / "out/masks/lot/a.png").is_file()
    assert "left out   1 that cannot be read" in predicting.report(found)
    (folder / "lot" / "a.tif").unlink()
    with pytest.raises(UserError, match=r"none of the 1 images can be read, e\.g\. .*b\.tif"):
        hf_dbp.predict(str(segmenter["native"][0]), folder, tmp_path / "none")
    assert (tmp_path / "none" / "predictions.json").is_file()


def test_exported_labels_are_the_masks_again(segmenter, wafers, tmp_path):
    """What is exported for correction scores 1 against itself, read as labels; so the way there and back is exact."""
    model, images = str(segmenter["padded"][0]), wafers / "images/validation"
    found = hf_dbp.predict(model, images, tmp_path / "out", export=["coco", "labelme"])
    assert {row["class"] for row in found.rows if row["pixels"]} > {"class 0"}
    for labels in ("coco.json", "labelme"):
        again = hf_dbp.predict(model, images, tmp_path / labels, masks=str(tmp_path / "out" / labels))
        assert again.record["mean_iou"] == 1.0
        assert sum(row["true"] for row in again.rows) == sum(row["pixels"] for row in found.rows)
    names = [entry["file_name"] for entry in json.loads((tmp_path / "out/coco.json").read_text())["images"]]
    assert names == [f"{index:03}.tif" for index in range(5)]
    with pytest.raises(UserError, match="export 'voc': choose from coco, labelme"):
        load(model, export=["voc"])


def test_labels_are_trained_on_as_their_masks_are(segmenter, wafers, tmp_path):
    """COCO in place of masks: the same pixels, so the same run; the names come along."""
    for split in ("train", "validation"):
        files = sorted((wafers / "masks" / split).iterdir())
        masks = ((f"{file.stem}.tif", np.asarray(Image.open(file))) for file in files)
        content = coco_content(masks, {k: f"class {k}" for k in range(5)})
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    flags = []
    for split in ("train", "validation"):
        flags += [
            f"--{split}_dir",
            str(wafers / "images" / split),
            f"--{split}_mask_dir",
            str(tmp_path / f"{split}.json"),
        ]
    model = ["--model_size", "mini", "--patch_size", "16", "--crop_size", "32", "--long_edge", "0"]
    record = finetune([*flags, *model, *TRAINING, "--output_dir", str(tmp_path / "out")])
    expected = segmenter["native"][1]
    assert record["per_class"]["background"] == expected["per_class"]["class 0"]
    assert record["mean_iou"] == expected["mean_iou"]


def test_a_stock_model_of_logits_at_a_quarter(tmp_path):
    """A SegFormer has no entry of ours, logits smaller than its input, and a size in its processor."""
    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8,
        num_labels=3,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "model")
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(tmp_path / "a.png")
    found = hf_dbp.predict(str(tmp_path / "model"), tmp_path / "a.png", tmp_path / "out")
    assert found.record["crop_size"] == 64 and found.record["long_edge"] is None
    assert size_of(tmp_path / "out/masks/a.png") == (90, 70)


def test_models_and_settings_that_cannot_be(tmp_path, segmenter):
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    with pytest.raises(UserError, match="is of ViTModel: predict takes models of"):
        hf_dbp.load_predictor(str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "nonsense", "architectures": ["NonsenseForSemanticSegmentation"]})
    )
    with pytest.raises(UserError, match=r"is not a known model for semantic segmentation|does not say at which size"):
        hf_dbp.load_predictor(str(tmp_path))
    with pytest.raises(UserError, match="crop_size is 0"):
        load(str(segmenter["native"][0]), crop_size=0)


@pytest.mark.parametrize("writer", [
    {}, {"tile": (64, 48)}, {"rowsperstrip": 7}, {"tile": (64, 48), "compression": "zlib"},
    {"rowsperstrip": 50, "compression": "zlib", "predictor": True}, {"byteorder": ">"},
])  # fmt: skip
@pytest.mark.parametrize(("name", "dtype"), [("native", np.uint16), ("smaller", np.uint16), ("native", np.uint8)])
@pytest.mark.slow
def test_rows_of_a_large_tiff_are_seen_as_the_whole(segmenter, tmp_path, monkeypatch, writer, name, dtype):
    """Every layout, two channels, read in rows: the crops of the image read whole."""
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.random((150, 110, 2)), (0, 0), 3)
    image = ((image - image.min()) / np.ptp(image) * np.iinfo(dtype).max).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig", **writer)
    predictor = load(str(segmenter[name][0]), device="cpu")
    whole = predictor.open("a", [str(tmp_path / "a.tif")])
    monkeypatch.setattr(predictor_module, "open_rows", lambda file: open_rows(file, least=1))
    rows = predictor.open("a", [str(tmp_path / "a.tif")])
    assert isinstance(rows.view, RowsView) and not isinstance(whole.view, RowsView)
    assert rows.view.size == whole.view.size and rows.view.target == (150, 110)
    for top, left in ((0, 0), (3, 2), (max(0, rows.view.size[0] - 20), 5), (0, 0)):
        torch.testing.assert_close(rows.view.crop(top, left, 32), whole.view.crop(top, left, 32), atol=2e-5, rtol=0)
    (result,) = predictor.predict([rows])
    (expected,) = predictor.predict([whole])
    assert (result.ids_HW == expected.ids_HW).mean() > 0.999
    rows.view.rows.close()


@pytest.mark.parametrize("name", ["native", "smaller"])
def test_windows_side_by_side_share_rows_that_are_read_a_few_at_a_time(segmenter, tmp_path, monkeypatch, name):
    """However far an image is scaled down, and whichever part of it a window sees."""
    image = np.random.default_rng(0).integers(0, 65536, (300, 220, 2), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr(predictor_module, "open_rows", lambda file: open_rows(file, least=1))
    predictor = load(str(segmenter[name][0]), device="cpu")
    (whole,) = predictor.predict([predictor.open("a", [str(tmp_path / "a.tif")])])
    view: Any = predictor.open("a", [str(tmp_path / "a.tif")]).view
    monkeypatch.setattr(opened_module, "BLOCK", 20 * 220 * 2)  # twenty rows
    opened: Any = predictor.open("a", [str(tmp_path / "a.tif")])
    read: list[tuple[int, int, int, int]] = []
    decoded: list[int] = []
    rows, band, side = opened.view.rows.rows, opened.view.rows._decoded, predictor.how.crop_size
    opened.view.rows.rows = lambda *part: read.append((*part, 0, 220)[:4]) or rows(*part)
    opened.view.rows._decoded = lambda number: decoded.append(number) or band(number)
    (blocks,) = predictor.predict([opened])
    assert (blocks.ids_HW == whole.ids_HW).mean() > 0.999
    monkeypatch.setattr(sliding, "LARGE", 0)
    again: Any = predictor.open("a", [str(tmp_path / "a.tif")])
    (columns,) = predictor.predict([again])
    assert np.array_equal(columns.ids_HW, blocks.ids_HW) and columns.score == blocks.score
    np.testing.assert_allclose(columns.confidence_K, blocks.confidence_K, rtol=1e-9)
    again.view.rows.close()
    if name == "native":
        tops, lefts = (sliding.window_origins(length, side) for length in view.size)
        assert sorted(read) == [(top, top + side, left, left + side) for top in tops for left in lefts]
        assert sorted(decoded) == sorted(set(decoded))  # once for all windows that share its rows
    else:
        assert max(bottom - top for top, bottom, _, _ in read) <= 20 + 4 * 300 / view.size[0] + 3
    for image_view in (view, whole.image.view, opened.view):
        image_view.rows.close()


def test_of_a_large_image_no_more_is_held_than_is_kept(segmenter, tmp_path):
    """A view's rows do not keep a whole band of tiles alive; counting makes no copy of eight bytes per pixel."""
    image = np.random.default_rng(0).integers(0, 256, (4000, 2000, 2), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack", planarconfig="contig", tile=(512, 512))
    rows = open_rows(str(tmp_path / "a.tif"), least=1)
    view = RowsView(rows, load(str(segmenter["native"][0]), device="cpu").preparation, 2)
    tracemalloc.start()
    try:
        small = view.small(1600)
        assert tracemalloc.get_traced_memory()[1] < 2 * image.nbytes
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        pixels = class_pixels(image[:, :, 0], 256)
        assert tracemalloc.get_traced_memory()[1] - before < image.size / 10
    finally:
        tracemalloc.stop()
        rows.close()
    assert np.array_equal(small, image[::3, ::3])
    assert np.array_equal(pixels, np.bincount(image[:, :, 0].ravel(), minlength=256))


def test_logits_in_bands_are_those_of_the_whole(segmenter, monkeypatch):
    """At the image's resolution, a few rows at a time, against `interpolate` over the whole."""
    model = load(str(segmenter["native"][0]), device="cpu").model
    pixels = torch.randn(2, 70, 50, generator=torch.Generator().manual_seed(0))
    for target in ((70, 50), (161, 120), (33, 21)):
        view = sliding.WholeView(pixels, target)
        whole = torch.cat([band.logits_KnW for band in sliding.logit_bands(model, [view], 32, classes=5)], dim=1)
        monkeypatch.setattr(sliding, "BAND", 5 * target[1] * 7)  # seven rows
        bands = list(sliding.logit_bands(model, [view], 32, classes=5))
        monkeypatch.undo()
        assert len(bands) > 3 and [band.last for band in bands] == [False] * (len(bands) - 1) + [True]
        assert max(band.logits_KnW.shape[1] for band in bands) <= 7
        tops = [band.top for band in bands]
        assert tops == np.cumsum([0, *(band.logits_KnW.shape[1] for band in bands[:-1])]).tolist()
        torch.testing.assert_close(torch.cat([band.logits_KnW for band in bands], dim=1), whole)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_every_image_once(segmenter, wafers, tmp_path):
    """SIGKILL at any moment leaves no half-written file and no image twice; the table is that of an undisturbed run.

    PREDICT_IMAGES=1000 in the environment: of so many images.
    """
    count = int(os.environ.get("PREDICT_IMAGES", "40"))
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:04}.tif").write_bytes((wafers / f"images/validation/{index % 5:03}.tif").read_bytes())
    command = [sys.executable, "-m", "hf_dbp.downstream.predicting", str(segmenter["native"][0]), str(folder)]
    command = [
        sys.executable,
        "-c",
        "import sys; from hf_dbp.cli import main; main(sys.argv[1:])",
        "predict",
        *command[3:],
    ]
    out, kills = tmp_path / "out", 0
    for wanted in (count * 3 // 40, count * 14 // 40, count * 27 // 40):
        process = subprocess.Popen([*command, "--output_dir", str(out)], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            done = out / "done.jsonl"
            if done.is_file() and done.read_bytes().count(b"\n") > wanted:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    subprocess.run([*command, "--output_dir", str(out)], cwd=ROOT, check=True, capture_output=True)
    names = [json.loads(line).get("image") for line in (out / "done.jsonl").read_text().splitlines()]
    assert sorted(names[1:]) == [f"{index:04}" for index in range(count)]  # each in one line: none was done twice
    assert not list(out.rglob(".*.part"))
    hf_dbp.predict(str(segmenter["native"][0]), folder, tmp_path / "whole")
    assert (out / "predictions.csv").read_bytes() == (tmp_path / "whole" / "predictions.csv").read_bytes()
    for file in sorted((tmp_path / "whole" / "masks").iterdir()):
        assert (out / "masks" / file.name).read_bytes() == file.read_bytes()


def test_what_would_give_wrong_figures_is_refused(segmenter, wafers, tmp_path, monkeypatch):
    """Masks of classes that the model lacks, flags without an effect, masks that would be images of the next run."""
    model, images = str(segmenter["native"][0]), wafers / "images/validation"
    for file in (wafers / "masks/validation").iterdir():
        ids = np.asarray(Image.open(file)).copy()
        ids[0, 0] = 77
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(ids).save(tmp_path / "masks" / file.name)
    masks = str(tmp_path / "masks")
    with pytest.raises(UserError, match=r"holds the id 77, but the model has classes 0 to 4 and 255 is ignored"):
        hf_dbp.predict(model, images, tmp_path / "out", masks=masks)
    found = hf_dbp.predict(model, images, tmp_path / "other", masks=masks, ignore_index=77)
    assert found.record["mean_iou"] is not None
    for flag in ({"palette": "binary"}, {"mask_suffix": "_m"}, {"ignore_index": 7}):
        with pytest.raises(UserError, match=rf"--{next(iter(flag))} says how to read true masks: give --masks too"):
            load(model, **flag)
    with pytest.raises(UserError, match=r"--device tpu9: .*; give cpu"):
        load(model, device="tpu9")
    monkeypatch.setattr(locking, "PATIENCE", 0.1)
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match=r"out: another process is writing there"):
        hf_dbp.predict(model, images, tmp_path / "out")
    with pytest.raises(UserError, match=r"lies in the folder of images.*give one outside"):
        hf_dbp.predict(model, images, images / "out")
    assert not (images / "out").exists()
