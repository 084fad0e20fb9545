"""README's and the card's lines and the command, run as written, give the mean IoU of `eval.json` to all digits."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
from huggingface_hub import ModelCard
from PIL import Image

import hf_dbp
from hf_dbp import cli
from hf_dbp.data.windows import open_rows
from hf_dbp.data.wire_bonding import render
from hf_dbp.downstream.segmentation import predictor
from hf_dbp.downstream.segmentation.finetuning import main as finetune

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = [
    *(
        "--model_size",
        "mini",
        "--patch_size",
        "8",
        "--head_size",
        "8",
        "--auxiliary_head_size",
        "8",
        "--max_steps",
        "4",
    ),
    *(
        "--per_device_train_batch_size",
        "2",
        "--learning_rate",
        "3e-3",
        "--class_weights",
        "inverse",
        "--num_labels",
        "5",
    ),
    *("--do_train", "--use_cpu", "--report_to", "none", "--disable_tqdm", "1", "--eval_strategy", "no"),
    *("--dataloader_num_workers", "0", "--dataloader_persistent_workers", "false", "--output_dir", "segmenter"),
    *("--train_dir", "train/photos", "--train_mask_dir", "train/masks", "--validation_dir", "photos"),
    *("--validation_mask_dir", "masks"),
]
CASES = {  # size of the image to predict, and how it is cropped and scaled
    "as large as a crop": (64, ["--crop_size", "64", "--long_edge", "0"]),
    "scaled": (150, ["--crop_size", "64", "--long_edge", "96"]),
    "a large mosaic": (330, ["--crop_size", "64", "--long_edge", "0"]),
}


def scene(folder, name, index, size):
    """A grey photograph as RGB and its mask."""
    image, mask = render(index, size=size)
    for part, array in (("photos", np.repeat(image[..., :1], 3, axis=2)), ("masks", mask)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / part / f"{name}.png")


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    """A folder with ``segmenter``, ``street.png``, ``photos`` and ``masks``; and the record of its training."""
    folder = tmp_path_factory.mktemp("case")
    size, flags = CASES[request.param]
    scene(folder / "train", "a", 0, 128)
    scene(folder / "train", "b", 1, 128)
    scene(folder, "street", 10_000_000, size)
    Image.open(folder / "photos/street.png").save(folder / "street.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finetune([*TRAINING, *flags])
    record = json.loads((folder / "segmenter/eval.json").read_text())
    assert sum(map(bool, (row["precision"] for row in record["per_class"].values()))) >= 2  # it does predict
    return folder, record


def scores(found, truth):
    """IoU of each class and their mean over those that are there, by the definition."""
    ious = []
    for number in range(5):
        union = ((found == number) | (truth == number)).sum()
        ious.append(((found == number) & (truth == number)).sum() / union if union else None)
    return ious, float(np.mean([iou for iou in ious if iou is not None]))


def check(folder, record):
    """The mask in ``predictions`` has the figures of the record."""
    with Image.open(folder / "predictions/masks/street.png") as found, Image.open(folder / "masks/street.png") as truth:
        ious, mean = scores(np.asarray(found), np.asarray(truth))
    assert [row["iou"] for row in record["per_class"].values()] == ious
    assert record["mean_iou"] == mean


def run_elsewhere(trained, tmp_path, monkeypatch):
    """The case in a separate, empty folder."""
    folder, record = trained
    for name in ("segmenter", "street.png", "photos", "masks"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return record


def test_the_lines_of_readme(trained, tmp_path, monkeypatch):
    record = run_elsewhere(trained, tmp_path, monkeypatch)
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "hf_dbp.predict" in code)
    exec(compile(code, "README.md", "exec"), {})
    check(tmp_path, record)


def test_the_lines_of_the_card(trained, tmp_path, monkeypatch):
    record = run_elsewhere(trained, tmp_path, monkeypatch)
    code = re.search(r"```python\n(.*?)```", ModelCard.load("segmenter/README.md").text, re.DOTALL)[1]
    names = {}
    exec(compile(code, "the card", "exec"), names)
    check(tmp_path, record)
    assert type(names["model"]).__module__.startswith("transformers.")


def test_the_command(trained, tmp_path, monkeypatch):
    """As README gives it; with masks the command itself prints the figures."""
    record = run_elsewhere(trained, tmp_path, monkeypatch)
    (line,) = (line for line in README.splitlines() if line.startswith("hf-dbp predict segmenter photos"))
    cli.main(shlex.split(line)[1:])
    check(tmp_path, record)
    cli.main([*shlex.split(line)[1:-1], "scored", "--masks", "masks"])
    found = json.loads(Path("scored/predictions.json").read_text())
    assert (found["mean_iou"], found["per_class"]) == (record["mean_iou"], record["per_class"])


def test_a_mosaic_that_is_read_in_rows(trained, tmp_path, monkeypatch):
    """As TIFF files too large for memory are; the figures are the same."""
    record = run_elsewhere(trained, tmp_path, monkeypatch)
    Path("tiffs").mkdir()
    with Image.open("street.png") as picture:
        tifffile.imwrite("tiffs/street.tif", np.asarray(picture), photometric="rgb", tile=(64, 48))
    opened = []
    monkeypatch.setattr(predictor, "open_rows", lambda file: opened.append(open_rows(file, least=1)) or opened[-1])
    found = hf_dbp.predict("segmenter", "tiffs", "predictions", masks="masks")
    assert opened[0] is not None
    assert (found.record["mean_iou"], found.record["per_class"]) == (record["mean_iou"], record["per_class"])
