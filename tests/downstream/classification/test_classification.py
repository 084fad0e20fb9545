"""From flags to a folder that stock transformers loads, resumed to the bit, on any channels and depths."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from class_images import FLAGS, NAMES, class_folders, pixels
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ViTConfig, ViTModel

from hf_dbp.data.classes import ClassSource, load_classified
from hf_dbp.downstream.classification.arguments import ClassificationArguments
from hf_dbp.downstream.classification.finetuning import main
from hf_dbp.downstream.classification.model import build_classifier
from hf_dbp.downstream.classification.trainer import ClassificationTrainer
from hf_dbp.downstream.classification.views import Augmentation, CentralViews, TrainingViews, image_processor
from hf_dbp.downstream.predicting import predict
from hf_dbp.errors import UserError

ROOT = Path(__file__).parents[3]

# what a user types who has the folder alone
STOCK = """
import sys; sys.modules["hf_dbp"] = None
from PIL import Image
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder, file = sys.argv[1:]
model = AutoModelForImageClassification.from_pretrained(folder).eval()
processor = AutoImageProcessor.from_pretrained(folder)
with torch.no_grad():
    logits = model(**processor(Image.open(file), return_tensors="pt")).logits
print(type(model).__module__, model.config.id2label[int(logits.argmax())], *logits.softmax(dim=1)[0].tolist())
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return class_folders(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="module")
def run(images, blank_pictures):
    """A short run with real pictures: its folder and its record."""
    folder = images.parent / "run"
    blank_pictures.append(None)
    record = main([str(images), *FLAGS, "--output_dir", str(folder), "--max_steps", "30", "--eval_steps", "15"])
    blank_pictures.pop()
    return folder, record


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_learns_and_records_what_it_did(run):
    folder, record = run
    saved = json.loads((folder / "eval.json").read_text())
    assert saved == json.loads(json.dumps(record))
    assert record["accuracy"] == max(row["eval_accuracy"] for row in record["evaluations"])
    assert record["accuracy"] > record["majority_class_accuracy"] == pytest.approx(1 / 3)
    assert list(record["per_class"]) == list(NAMES)
    assert sum(map(sum, record["confusion"]["images"])) == 9 == record["data"]["validation_images"]
    assert record["data"]["classes"] == dict.fromkeys(NAMES, 6)
    low, high = record["accuracy_interval_95"]
    assert low <= record["accuracy"] <= high
    assert "top5_accuracy" not in record  # of three classes it says nothing
    assert record["train_seconds"] > 0 and "co2e_kg" in record
    assert record["asked_used"]["images of an epoch"] == {
        "asked": 18, "used": 16, "why": "the last ones do not fill a step; they differ in every epoch",
    }  # fmt: skip
    for picture in ("confusion.png", "calibration.png", "mistakes.png", "curves.png"):
        with Image.open(folder / picture) as figure:
            assert min(figure.size) > 200
    card = (folder / "README.md").read_text()
    for part in ("pipeline_tag: image-classification", "| striped |", "](confusion.png)", "emissions:", "model-index"):
        assert part in card


@pytest.mark.slow
def test_a_process_without_hf_dbp_loads_it_and_predicts_the_same(run, images, tmp_path):
    folder, record = run
    found = predict(str(folder), images / "validation", tmp_path)
    rows = {row["image"]: row for row in found.rows}
    assert len(rows) == 9
    assert sum(row["class"] == name.split("/")[0] for name, row in rows.items()) / 9 == pytest.approx(
        record["accuracy"]
    )
    file = images / "validation" / "striped" / "1.png"
    command = [sys.executable, "-c", STOCK, str(folder), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    module, name, *chances = done.stdout.split()
    assert module.startswith("transformers.models.beit")
    row = rows["striped/1"]
    assert name == row["class"]
    assert list(map(float, chances)) == pytest.approx([row[f"p({one})"] for one in NAMES], abs=0.02)  # of two resizings
    with (tmp_path / "predictions.csv").open() as opened:
        assert {row["image"]: row["class"] for row in csv.DictReader(opened)} == {
            image: row["class"] for image, row in rows.items()
        }
    assert found.record["counts"] == {name: sum(row["class"] == name for row in found.rows) for name in NAMES}


def test_flags_of_segmentation_are_refused(run, images, tmp_path):
    with pytest.raises(UserError, match="--crop_size is for segmentation"):
        predict(str(run[0]), images / "validation", tmp_path, crop_size=32)


def test_stopped_and_started_again_it_is_the_same_to_the_bit(images, tmp_path):
    """Views, mixing, dropped paths and the optimizer resume where they were."""
    flags = [str(images), *FLAGS, "--lr_scheduler_type", "constant", "--drop_path", "0.5", "--output_dir"]
    flags += [str(tmp_path / "x"), "--load_best_model_at_end", "false"]
    place = flags.index(str(tmp_path / "x"))
    whole = main([*flags[:place], str(tmp_path / "whole"), *flags[place + 1 :]])
    main([*flags[:place], str(tmp_path / "parts"), *flags[place + 1 :], "--max_steps", "2"])
    again = main([*flags[:place], str(tmp_path / "parts"), *flags[place + 1 :]])
    same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    curves = [{row["step"]: row["eval_loss"] for row in one["evaluations"]} for one in (whole, again)]
    assert list(curves[0]) == [2, 4] and curves[0] == curves[1]


def test_two_micro_batches_are_one_batch(images, tmp_path):
    flags = [str(images), *FLAGS, "--max_steps", "2", "--optim", "sgd", "--learning_rate", "0.5", "--drop_path", "0"]
    flags += ["--mixup", "0", "--cutmix", "0", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
    main([*flags, "--output_dir", str(tmp_path / "one")])
    main([*flags, "--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2",
          "--gradient_accumulation_steps", "2"])  # fmt: skip
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("channels", "depth", "missing"),
    [
        (4, np.uint8, {"color"}),
        (1, np.uint16, {"color", "equalize", "posterize"}),
        (2, np.float32, {"color", "equalize", "posterize"}),
    ],
)
def test_other_channels_and_depths(channels, depth, missing, tmp_path, caplog):
    """Operations of RandAugment that do not suit them are left out, and the log, the record and the summary say so."""
    folder = class_folders(tmp_path / "images", channels=channels, depth=depth)
    record = main([str(folder), *FLAGS, "--output_dir", str(tmp_path / "run"), "--max_steps", "2"])
    assert record["data"]["channels"] == channels
    assert {name for name in record["asked_used"] if name.startswith("RandAugment")} == {
        f"RandAugment: {name}" for name in missing
    }
    for name in missing:
        assert f"RandAugment without {name}: " in caplog.text
    found = predict(str(tmp_path / "run"), folder / "validation", tmp_path / "found")
    hits = sum(row["class"] == row["image"].split("/")[0] for row in found.rows)
    assert hits / len(found.rows) == pytest.approx(record["accuracy"])


def test_the_image_processor_gives_what_evaluation_sees(tmp_path):
    folder = class_folders(tmp_path / "images", count=2)
    _, validation = load_classified(ClassSource(train_dir=str(folder), cache_dir=str(tmp_path / "cache")))
    data = CentralViews(validation, (16, 16), [0.4] * 3, [0.2] * 3)
    image_processor(data).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    square, oblong = (np.tile(ramp[None, :width, None], (20, 1, 3)) for width in (20, 40))
    for image, tolerance in ((square, 0.03), (oblong, 0.1)):  # in steps of 8 bits; half a pixel of the ramp
        validation.images.samples = [{"image": image}]
        found = processor(image, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(found, data[0][1], atol=tolerance, rtol=0)


def test_rare_classes_by_balanced_sampling_or_weights(tmp_path):
    """With 12 images of one class and 3 of another, the rare class is drawn half of the time, or weighs four times as
    much."""
    for name, count in (("common", 12), ("rare", 3)):
        place = tmp_path / "images" / name
        place.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(pixels(0, number, 3, np.uint8)).save(place / f"{number}.png")
    train, _ = load_classified(ClassSource(train_dir=str(tmp_path / "images"), train_val_split=0.1))
    how = {"mean": [0.5] * 3, "std": [0.25] * 3, "seed": 0}
    plain, balanced = (TrainingViews(train, (8, 8), Augmentation(), **how, balanced=on) for on in (False, True))
    drawn = [
        np.mean([int(data[epoch, index]["labels"]) for epoch in range(20) for index in range(len(data))])
        for data in (plain, balanced)
    ]
    assert drawn[0] == pytest.approx(train.counts_K[1] / len(train))
    assert abs(drawn[1] - 0.5) < 0.1
    flags = [str(tmp_path / "images"), *FLAGS, "--max_steps", "2", "--output_dir"]
    weighted = main([*flags, str(tmp_path / "weighted"), "--class_weights", "inverse"])
    balanced = main([*flags, str(tmp_path / "balanced"), "--balanced_sampling"])
    assert weighted["arguments"]["class_weights"] == "inverse" and balanced["arguments"]["balanced_sampling"]
    assert not torch.equal(*(weights(tmp_path / kind)["classifier.weight"] for kind in ("weighted", "balanced")))
    assert "| weights of the classes | inverse |" in (tmp_path / "weighted" / "README.md").read_text()


def test_the_learning_rate_follows_the_batch_unless_given(tmp_path):
    flags = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    assert ClassificationArguments(**flags).learning_rate == pytest.approx(5e-4 * 32 / 256)
    wide = ClassificationArguments(**flags, per_device_train_batch_size=64, gradient_accumulation_steps=16)
    assert wide.learning_rate == pytest.approx(5e-4 * 1024 / 256)  # He et al.'s
    assert ClassificationArguments(**flags, learning_rate=3e-3).learning_rate == 3e-3


def test_evaluation_alone_leaves_the_run_as_it_is(run, images, tmp_path, capsys):
    folder, record = run
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    alone = [flag for flag in FLAGS if flag != "--do_train"]
    found = main([str(images), *alone, "--do_eval", "--output_dir", str(folder)])
    assert found["eval_accuracy"] == pytest.approx(record["accuracy"])
    assert found["per_class"] == record["per_class"]
    (folder / "eval_results.json").unlink()
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    place = alone.index("--model_size")
    named = [*alone[:place], *alone[place + 2 :], "--model_name_or_path", str(folder)]
    shutil.copytree(images / "train", tmp_path / "other")
    (tmp_path / "other" / "striped").rename(tmp_path / "other" / "dotted")
    for flags, message in (
        ([str(tmp_path / "other"), *named, "--do_eval"], "does not know the class 'dotted'; its classes are bright"),
        ([str(images), *alone, "--eval_strategy", "no"], "nothing to do: give --do_train, --do_eval or both"),
        ([str(images), *alone, "--do_eval"], f"no classifier to evaluate: {tmp_path / 'none'} holds no model"),
        ([str(images), *alone, "--do_eval", "--push_to_hub"], "--push_to_hub pushes what --do_train trains"),
    ):
        with pytest.raises(SystemExit):
            main([*flags, "--output_dir", str(tmp_path / "none")])
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_encoder_gives_size_and_statistics(images, tmp_path):
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=24, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    flags = [*FLAGS[6:], "--max_steps", "2", "--model_name_or_path", str(tmp_path / "vit")]
    record = main([str(images), *flags, "--output_dir", str(tmp_path / "run")])
    assert record["data"]["size"] == [24, 24]
    scratch = main([str(images), *flags, "--from_scratch", "--output_dir", str(tmp_path / "scratch")])
    assert scratch["loss"] != record["loss"]
    with pytest.raises(SystemExit):  # another encoder: no run goes on from that checkpoint
        main([str(images), *flags, "--from_scratch", "--output_dir", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image_size", "20"], "image size 20 is not a multiple of patch size 8"),
        (["--per_device_train_batch_size", "32"], "18 training images do not fill one step of 32"),
        (["--mixup", "-1"], "--mixup is not negative"),
        (["--flip", "2"], "--flip is a share between 0 and 1"),
        (["--crop_scale", "0"], "--crop_scale is above 0"),
        (["--drop_path", "1"], "--drop_path is a probability"),
        (["--randaugment_magnitude", "30"], "--randaugment_magnitude is from 0 to 10"),
        (["--balanced_sampling", "--class_weights", "sqrt"], "give --balanced_sampling or --class_weights, not both"),
        (["--layer_decay", "0"], "layer_decay is 0"),
        (["--model_name_or_path", "nowhere"], "not both"),
        (["--num_channels", "7"], "cannot be read as 7 channels"),
        (["--metric_for_best_model", "f1"], "invalid choice: 'f1'"),
    ],
)
def test_mistakes_end_with_one_line(images, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        main([str(images), *FLAGS, "--output_dir", str(tmp_path / "out"), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error


def test_unreadable_images_are_skipped_and_named(tmp_path, caplog):
    folder = class_folders(tmp_path / "images")
    (folder / "train" / "dark" / "3.png").write_bytes(b"no picture")
    (folder / "validation" / "dark" / "1.png").write_bytes(b"no picture")
    record = main([str(folder), *FLAGS, "--output_dir", str(tmp_path / "run"), "--max_steps", "5"])
    assert record["data"]["unreadable"]["count"] == 2
    assert sum(map(sum, record["confusion"]["images"])) == 8


def test_a_step_that_is_not_finite_is_skipped_and_named(images, tmp_path, monkeypatch):
    """Once mixed with its neighbours, a NaN is in the loss of the whole batch; the weights never see it."""
    whole = TrainingViews.__getitem__

    def broken(self, index):
        view = whole(self, index)
        if index == (0, 3):
            view["pixel_values"][0, 2, 2] = float("nan")
        return view

    monkeypatch.setattr(TrainingViews, "__getitem__", broken)
    record = main([str(images), *FLAGS, "--output_dir", str(tmp_path)])
    assert record["guards"]["skipped_steps"] == 1 and record["guards"]["skipped"][0]["skipped"] == "loss"
    assert record["asked_used"]["optimizer steps"]["used"] == 3
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_the_most_confident_mistakes_are_kept(images, tmp_path, monkeypatch):
    """In order, whatever the batch size: the same as image by image over the whole validation set."""
    monkeypatch.setattr("hf_dbp.downstream.classification.trainer.SHOWN", 4)
    _, validation = load_classified(ClassSource(train_dir=str(images), cache_dir=str(tmp_path / "cache")))
    data = CentralViews(validation, (16, 16), [0.5] * 3, [0.25] * 3)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8
    )
    model = build_classifier(ViTModel(config, add_pooling_layer=False), validation.names).eval()
    torch.nn.init.normal_(model.classifier.weight)
    args = ClassificationArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True,
                                   per_device_eval_batch_size=2)  # fmt: skip
    trainer = ClassificationTrainer(model=model, args=args, eval_dataset=data)
    accuracy = trainer.evaluate()["eval_accuracy"]
    expected = []
    with torch.no_grad():
        for index, pixels, label in (data[number] for number in range(len(data))):
            confidence, predicted = model(pixels[None]).logits.softmax(dim=1)[0].max(dim=0)
            expected += [] if predicted == label else [(float(confidence), index, int(predicted), label)]
    assert accuracy == pytest.approx(1 - len(expected) / 9) and len(expected) > 4
    found = [(one.index, one.predicted, one.true) for one in trainer.mistakes]
    assert found == [row[1:] for row in sorted(expected, reverse=True)[:4]]


def test_a_neighbour_that_stands_in_brings_its_own_class(tmp_path):
    """An unreadable image of one class stands before images of the other."""
    folder = class_folders(tmp_path / "images", count=2, kinds=(0, 1))
    (folder / "train" / "bright" / "1.png").write_bytes(b"no picture")  # the last bright one: a dark one follows
    train, _ = load_classified(ClassSource(train_dir=str(folder), cache_dir=str(tmp_path / "cache")))
    plain = Augmentation(operations=0, erasing=0.0)
    views = TrainingViews(train, (8, 8), plain, mean=[0.0] * 3, std=[1.0] * 3, seed=0)
    for index in range(len(views)):
        view = views[0, index]
        assert (view["pixel_values"].mean() < 0.5) == (int(view["labels"]) == 1)


@pytest.mark.slow
def test_two_processes_make_one_model(images, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / "training_scripts" / "run_classification.py"), "--train_dir", str(images), *FLAGS,
               "--output_dir", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert record["hardware"]["processes"] == 2
    assert sum(map(sum, record["confusion"]["images"])) == 9  # each image once
    assert done.stdout.count("  accuracy ") == 1


def test_the_batch_that_fits_is_the_one_recorded(images, tmp_path, monkeypatch):
    """No more than six images fit; the learning rate follows."""
    stock, batches = ClassificationTrainer.training_step, []

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["pixel_values"]) > 6:
            raise RuntimeError("CUDA out of memory.")
        batches.append(len(inputs["pixel_values"]))
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ClassificationTrainer, "training_step", training_step)
    place = FLAGS.index("--learning_rate") if "--learning_rate" in FLAGS else None
    flags = FLAGS if place is None else [*FLAGS[:place], *FLAGS[place + 2 :]]
    batch = ["--per_device_train_batch_size", "8", "--auto_find_batch_size", "--base_learning_rate", "0.1"]
    given = ["--max_steps", "2", "--eval_steps", "2", "--output_dir", str(tmp_path)]
    record = main([str(images), *flags, *batch, *given])
    assert batches == [6, 6]
    used = {"per_device_train_batch_size": 6, "learning_rate": pytest.approx(0.1 * 6 / 256)}
    for found in (record, json.loads((tmp_path / "checkpoint-2" / "arguments.json").read_text())):
        assert {name: found["arguments"][name] for name in used} == used
    asked = {name: record["asked_used"][name]["asked"] for name in used}
    assert asked == {"per_device_train_batch_size": 8, "learning_rate": 0.1}
    assert record["data"]["feeding"]["step_images"] == 6
    assert "| images per optimizer step | 6 |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_budget_of_time_in_place_of_epochs(images, tmp_path):
    place = FLAGS.index("--max_steps")
    flags = [*FLAGS[:place], *FLAGS[place + 8 :]]
    record = main([str(images), *flags, "--budget", "12s", "--output_dir", str(tmp_path)])
    assert record["budget"]["seconds"] == 12 and record["asked_used"]["optimizer steps"]["used"] > 0
