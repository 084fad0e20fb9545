"""Folders and files with odd names are what they are called: as many images as under plain names, and every command
that a run prints for the next step can be pasted into a shell."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from class_images import NAMES, pixels
from PIL import Image
from transformers import ViTConfig, ViTModel

from hf_dbp.cli import main

#: characters that globs, URLs, shells, templates, figures or configuration files take for something else
ODD = "$x_$ [1]#%2 {y} 'b' \"c\" $HOME$;&|`^ *?!~ %41~é\u6570 back\\slash $y_$"

pytestmark = pytest.mark.filterwarnings("ignore:Glyph")  # the font of matplotlib lacks Chinese
QUICK = ["--report_to", "none", "--use_cpu", "--disable_tqdm", "true", "--max_steps", "1"]
QUICK += ["--per_device_train_batch_size", "2"]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "vit"
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    ViTModel(ViTConfig(**sizes, image_size=64, patch_size=16), add_pooling_layer=False).save_pretrained(folder)
    return folder


def labelled(folder: Path, name: str) -> None:
    """Five images and their masks; the files are called so too."""
    for number in range(5):
        mask = (np.arange(72) // (4 + number) % 3)[None].repeat(64, axis=0).astype(np.uint8)
        for kind, array in (("images", np.stack([mask * 80] * 3, axis=2)), ("masks", mask)):
            place = folder / f"{kind} {name}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place / f"{name} {number}.png")


def classes(folder: Path, name: str) -> None:
    """Four images of each of three classes; classes and files are called so too."""
    for kind, own in enumerate(NAMES):
        place = folder / f"images {name}" / f"{own} {name}"
        place.mkdir(parents=True)
        for number in range(4):
            Image.fromarray(pixels(kind, number, 3, np.uint8)).save(place / f"{name} {number}.png")


def follow(printed: str, images: Path, out: Path) -> None:
    """Run the command after ``next`` on these images, as a shell would read it."""
    line = next(line for line in reversed(printed.splitlines()) if line.strip().startswith("next"))
    program, *arguments = shlex.split(line.partition("hf-dbp")[1] + line.partition("hf-dbp")[2])
    assert program == "hf-dbp"
    main([{"IMAGES": str(images), "OUT": str(out)}.get(part, part) for part in arguments])


def test_fine_tuning(vit, tmp_path, capsys):
    labelled(tmp_path, ODD)
    images, masks, out = (tmp_path / f"{kind} {ODD}" for kind in ("images", "masks", "out"))
    sizes = ["--crop_size", "64", "--head_size", "8", "--auxiliary_head_size", "8"]
    (tmp_path / f"{ODD}.json").write_text(json.dumps([f"{ODD} {k}" for k in range(3)]))
    sizes += ["--id2label", str(tmp_path / f"{ODD}.json")]
    main(["finetune", "--train_dir", str(images), "--train_mask_dir", str(masks), "--output_dir", str(out),
          "--model_name_or_path", str(vit), "--do_train", *sizes, *QUICK])  # fmt: skip
    record = json.loads((out / "eval.json").read_text())
    assert [record["data"][f"{split}_images"] for split in ("train", "validation")] == [4, 1]
    assert record["data"]["left_out"]["count"] == 0
    assert [*record["per_class"]] == [f"{ODD} {k}" for k in range(3)]
    predicted = tmp_path / f"predicted {ODD}"
    follow(capsys.readouterr().out, images, predicted)
    assert json.loads((predicted / "predictions.json").read_text())["images"] == 5


def test_classify(vit, tmp_path, capsys):
    classes(tmp_path, ODD)
    images, out = (tmp_path / f"{kind} {ODD}" for kind in ("images", "out"))
    main(["classify", str(images), "--model_name_or_path", str(vit), "--do_train", "--output_dir", str(out), *QUICK])
    record = json.loads((out / "eval.json").read_text())
    assert [record["data"][f"{split}_images"] for split in ("train", "validation")] == [9, 3]
    assert [*record["data"]["classes"]] == sorted(f"{kind} {ODD}" for kind in NAMES)
    predicted = tmp_path / f"predicted {ODD}"
    follow(capsys.readouterr().out, images, predicted)
    assert json.loads((predicted / "predictions.json").read_text())["images"] == 12


def test_from_inspection_to_a_choice_of_images(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labelled(tmp_path, ODD)
    main(["inspect", f"images {ODD}", "--masks", f"masks {ODD}", "--output_dir", f"found {ODD}"])
    printed = capsys.readouterr().out
    assert "images     5 in 5 files" in printed and "masks      5; 0 images" in printed and "PROBLEM" not in printed
    pretrain, _, finetune = (shlex.split(line[11:])[1:] for line in printed.splitlines()[-3:])
    assert Path(finetune[-1]).is_file()
    main([*pretrain, *QUICK, "--model_size", "mini", "--dataloader_num_workers", "0",
          "--dataloader_persistent_workers", "false", "--output_dir", f"run {ODD}"])  # fmt: skip
    record = json.loads(Path(f"run {ODD}", "run.json").read_text())
    assert [record["data"][f"{split}_images"] for split in ("train", "validation")] == [4, 1]
    follow(capsys.readouterr().out, Path(), Path())
    main(["embed", f"run {ODD}-fused", f"images {ODD}", "--output_file", f"table {ODD}.parquet"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next"))
    assert shlex.split(line)[1:4] == ["hf-dbp", "select", f"table {ODD}.parquet"]
