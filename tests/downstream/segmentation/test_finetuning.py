"""From flags to a folder that stock transformers loads and that predicts what evaluation scored."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from segmentation_runs import trainer as small_trainer
from transformers import AutoImageProcessor, UperNetForSemanticSegmentation, get_scheduler

from hf_dbp.data.augmentation import resized
from hf_dbp.data.left_out import LeftOut
from hf_dbp.downstream.segmentation.data import LabelledImages, SegmentationSource, load_labelled_images
from hf_dbp.downstream.segmentation.finetuning import (
    DataArguments,
    FinetuningArguments,
    ModelArguments,
    image_processor,
    main,
)
from hf_dbp.downstream.segmentation.inference import WholeImages, predict_labels
from hf_dbp.downstream.segmentation.trainer import SegmentationTrainer
from hf_dbp.recipes import parse_arguments, recipe_names

ROOT = Path(__file__).parents[3]
FLAGS = [
    *("--dataset_name", "wire_bonding", "--built_in_size", "48", "--max_train_samples", "8", "--max_eval_samples", "3"),
    *("--crop_size", "32", "--long_edge", "40", "--head_size", "8", "--auxiliary_head_size", "8"),
    *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2", "--learning_rate", "1e-3"),
    *("--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"),
    *(
        "--max_steps",
        "4",
        "--warmup_steps",
        "1",
        "--do_train",
        "--use_cpu",
        "--report_to",
        "none",
        "--disable_tqdm",
        "1",
    ),
]
NATIVE = ["--long_edge", "0", "--crop_size", "64"]  # images of 48 pixels: padded to the crop

# the README's ten lines, on a file
INFERENCE = """
import sys; sys.modules["hf_dbp"] = None
folder, file, out, crop = sys.argv[1:4] + [int(sys.argv[4])]
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
processor = AutoImageProcessor.from_pretrained(folder)
image = np.load(file)
pixels = processor(image.transpose(2, 0, 1), input_data_format="channels_first", return_tensors="pt").pixel_values
h, w = pixels.shape[2:]
with torch.no_grad():
    output = model(torch.nn.functional.pad(pixels, (0, max(0, crop - w), 0, max(0, crop - h))))
output.logits = output.logits[..., :h, :w]
ids = processor.post_process_semantic_segmentation(output, target_sizes=[image.shape[:2]])[0]
np.save(out, ids.numpy())
"""


@pytest.fixture
def encoder(vit, tmp_path):
    vit(num_channels=2).save_pretrained(tmp_path / "vit")
    return ["--model_name_or_path", str(tmp_path / "vit")]


@pytest.mark.slow
def test_two_processes_make_one_model(encoder, tmp_path):
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / "training_scripts" / "run_upernet.py"), *FLAGS, *encoder]
    command += ["--output_dir", str(out)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((out / "eval.json").read_text())
    assert record["hardware"]["processes"] == 2
    assert record["data"]["validation_pixels"] == 3 * 48 * 48  # each image once
    assert done.stdout.count("mean IoU") == 1
    assert len(UperNetForSemanticSegmentation.from_pretrained(out).config.id2label) == 5


def test_what_is_evaluated_is_saved_without_being_asked(encoder, tmp_path):
    """Only --eval_steps is given; otherwise the best model would be lost."""
    unasked = [part for pair in zip(FLAGS[::2], FLAGS[1::2], strict=False) for part in pair if "save" not in pair[0]]
    record = main([*unasked, *encoder, "--output_dir", str(tmp_path)])
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert record["best_checkpoint"] is not None
    assert record["mean_iou"] == max(row["eval_mean_iou"] for row in record["evaluations"])


@pytest.mark.slow
def test_the_worst_images_are_shown_beside_the_others(real_pictures, encoder, tmp_path, monkeypatch):
    """Those of the lowest mean IoU, in order, with the figures that eval.json has."""
    shown = {}

    def noted(figure, path, **options):
        shown[Path(path).name] = [text.get_text() for axis in figure.axes for text in axis.texts]
        save(figure, path, **options)

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", noted)
    record = main([*FLAGS, *encoder, "--output_dir", str(tmp_path), "--max_eval_samples", "10"])
    expected = sorted(record["images"], key=lambda image: image["mean_iou"])[:8]
    assert len({image["mean_iou"] for image in record["images"]}) > 1
    assert shown["worst.png"] == [f"image {image['index']}: {image['mean_iou']:.4f}" for image in expected]
    assert shown["predictions.png"] == []
    assert "](worst.png)" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("real_pictures")
def test_from_a_vit_to_scores_picture_and_a_stock_model(encoder, tmp_path):
    out = tmp_path / "out"
    record = main([*FLAGS, *encoder, "--output_dir", str(out), *NATIVE, "--layer_decay", "0.8"])
    saved = json.loads((out / "eval.json").read_text())
    assert saved == json.loads(json.dumps(record))
    assert list(saved["per_class"]) == ["background", "wire", "ball", "wedge", "epoxy"]
    assert saved["mean_iou"] == max(row["eval_mean_iou"] for row in saved["evaluations"])
    assert [row["step"] for row in saved["evaluations"]] == [2, 4]  # without that of the best one at the end
    assert saved["data"] == {
        "source": "wire_bonding",
        "train_images": 8,
        "validation_images": 3,
        "validation_pixels": 3 * 48 * 48,
        "background_images": {"train": 0, "validation": 0},
        "unreadable": {"count": 0, "images": {}},
        "left_out": LeftOut().record(),
    }
    with Image.open(out / "predictions.png") as figure:
        assert figure.size[0] > 500

    data, model = prepared(out)
    image_HWC, _ = data.images[0]
    np.save(tmp_path / "image.npy", image_HWC)
    command = [sys.executable, "-c", INFERENCE, str(out), str(tmp_path / "image.npy"), str(tmp_path / "ids.npy"), "64"]
    subprocess.run(command, check=True, capture_output=True)
    expected = predict_labels(model, data, image_HWC, crop_size=64).numpy()
    assert (np.load(tmp_path / "ids.npy") == expected).mean() > 0.999


@pytest.mark.parametrize(("channels", "scales"), [(1, True), (2, False), (3, True), (4, False)])
def test_the_image_processor_gives_what_evaluation_sees(channels, scales):
    image = np.random.default_rng(0).integers(0, 256, (50, 70, channels), dtype=np.uint8)
    images = LabelledImages([{"image": image, "annotation": image[..., 0]}], ("image", "annotation"), num_labels=256,
                            ignore_index=999)  # fmt: skip
    data = WholeImages(images, 40, [0.4] * channels, [0.2] * channels)
    processor = image_processor(data)
    assert processor.do_resize == scales  # PIL would blend two or four channels as if the last were transparency
    view = image if scales else resized(image, (28, 40), (0, 0, 70, 50))
    pixels = processor(view.transpose(2, 0, 1), input_data_format="channels_first", return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels[0], data[0][0], rtol=0, atol=1e-5)


def prepared(folder):
    source = SegmentationSource(dataset_name="wire_bonding", max_train_samples=1, max_eval_samples=3, built_in_size=48)
    processor = AutoImageProcessor.from_pretrained(folder)
    data = WholeImages(load_labelled_images(source)[1], None, processor.image_mean, processor.image_std)
    return data, UperNetForSemanticSegmentation.from_pretrained(folder).eval()


@pytest.mark.slow
def test_stopped_and_started_again_it_continues(encoder, tmp_path):
    flags = [*FLAGS, *encoder, "--lr_scheduler_type", "constant", "--output_dir"]
    whole = main([*flags, str(tmp_path / "whole")])
    main([*flags, str(tmp_path / "parts"), "--max_steps", "2"])
    again = main([*flags, str(tmp_path / "parts")])
    curves = [{row["step"]: row["eval_loss"] for row in run["evaluations"]} for run in (whole, again)]
    assert list(curves[0]) == [2, 4]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_repeated_with_other_arguments_it_is_refused_or_told(encoder, tmp_path, capsys, caplog):
    """A checkpoint cannot continue another model, and other changes are reported and recorded."""
    flags = [*FLAGS, *encoder, "--output_dir", str(tmp_path / "run")]
    main([*flags, "--max_steps", "2"])
    before = contents(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(tmp_path / "vit", tmp_path / "other")
    for changed, message in (
        (["--model_name_or_path", str(tmp_path / "other")], f"--model_name_or_path {tmp_path / 'vit'}, not "),
        (["--from_scratch"], "--from_scratch False, not True"),
        (["--max_train_samples", "7"], "--max_train_samples 8, not 7: to resume, give --max_train_samples 8"),
        (["--crop_size", "40"], "--crop_size 32, not 40"),
        (["--seed", "1"], "--seed 42, not 1"),
        (["--layer_decay", "0.9"], "--layer_decay 1.0, not 0.9"),
        (["--num_channels", "2"], "--num_channels None, not 2: to resume, leave --num_channels out; to start over"),
    ):
        with pytest.raises(SystemExit):
            main([*flags, *changed])
        assert f"error: {checkpoint} was trained with {message}" in capsys.readouterr().err.strip().splitlines()[-1]
    assert contents(tmp_path / "run") == before
    for _ in range(2):  # as it goes on, and once it is finished
        record = main([*flags, "--learning_rate", "2e-3"])
        assert record["resumed_with"] == {"2": {"learning_rate": [1e-3, 2e-3], "max_steps": [2, 4]}}
    assert caplog.text.count("resumes with other settings") == 1
    assert (
        f"{checkpoint} resumes with other settings: --max_steps 2 -> 4, --learning_rate 0.001 -> 0.002" in caplog.text
    )
    kept = tmp_path / "run" / "checkpoint-4" / "arguments.json"
    kept.write_text("[1]".ljust(kept.stat().st_size))
    with pytest.raises(SystemExit):
        main(flags)
    assert "arguments.json does not hold the arguments of a run" in capsys.readouterr().err


@pytest.mark.slow
def test_what_training_alone_cost_is_recorded_and_adds_up_over_a_resume(encoder, tmp_path, monkeypatch):
    """The clock stops during evaluations, however slow they are."""
    stock, stood = SegmentationTrainer.get_eval_dataloader, []

    def slow(self, *args):
        before = self.cost.clock.seconds
        time.sleep(0.2)
        stood.append(self.cost.clock.seconds == before)
        return stock(self, *args)

    monkeypatch.setattr(SegmentationTrainer, "get_eval_dataloader", slow)
    flags = [*FLAGS, *encoder, "--country", "NLD", "--output_dir", str(tmp_path / "run")]
    first = main([*flags, "--max_steps", "2"])
    kept = json.loads((tmp_path / "run" / "checkpoint-2" / "arguments.json").read_text())["costs"]
    assert first["energy"]["country"] == "NLD"
    assert 0 < kept["train_seconds"] <= first["train_seconds"] and kept["kwh"] > 0 and kept["co2e_kg"] > 0
    second = main(flags)
    assert all(second[name] > kept[name] for name in ("train_seconds", "kwh", "co2e_kg"))
    assert stood == [True] * 4
    assert "emissions" in (tmp_path / "run" / "README.md").read_text()


def test_the_batch_that_fits_is_the_one_recorded(encoder, tmp_path, monkeypatch):
    """No more than six images fit, and each attempt takes a thousand seconds."""
    stock, batches, now = SegmentationTrainer.training_step, [], [0.0]
    monkeypatch.setattr("hf_dbp.training.measurement.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["pixel_values"]) > 6:
            now[0] += 1000.0
            raise RuntimeError("CUDA out of memory.")
        now[0] += 1.0
        batches.append(len(inputs["pixel_values"]))
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SegmentationTrainer, "training_step", training_step)
    batch = ["--per_device_train_batch_size", "8", "--auto_find_batch_size", "--max_train_samples", "12"]
    record = main([*FLAGS, *encoder, *batch, "--output_dir", str(tmp_path / "run")])
    assert batches == [6] * 4
    assert record["arguments"]["per_device_train_batch_size"] == 6
    kept = json.loads((tmp_path / "run" / "checkpoint-4" / "arguments.json").read_text())
    assert kept["arguments"]["per_device_train_batch_size"] == 6
    why = "what fits in memory (--auto_find_batch_size)"
    assert record["asked_used"]["per_device_train_batch_size"] == {"asked": 8, "used": 6, "why": why}
    assert "images of an epoch" not in record["asked_used"]  # two steps of six are all of them
    assert record["train_seconds"] == 4
    assert "| images per optimizer step | 6 |" in (tmp_path / "run" / "README.md").read_text()
    rows = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert rows[-1]["step"] == 4 and rows[-1]["epoch"] == 2


def test_what_was_asked_for_and_what_was_used_stand_side_by_side(encoder, tmp_path, capsys):
    """Ten images in steps of four, a schedule without warm-up, and a resume from a checkpoint of the model alone."""
    flags = [*FLAGS, *encoder, "--max_train_samples", "10", "--save_only_model", "--lr_scheduler_type", "constant"]
    flags += ["--output_dir", str(tmp_path / "run"), "--load_best_model_at_end", "false"]
    main([*flags, "--max_steps", "2"])
    capsys.readouterr()
    record = main(flags)
    rows = record["asked_used"]
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["asked_used"] == rows
    best = max(record["evaluations"], key=lambda row: row["eval_mean_iou"])["step"]
    found = {name: (row["asked"], row["used"]) for name, row in rows.items()}
    expected = {
        "warmup_steps": (1, 0),
        "images of an epoch": (10, 8),
        "optimizer state at step 2": (["optimizer.pt", "scheduler.pt"], []),
    } | ({} if best == 4 else {"step of the model": (best, 4)})
    assert found == expected
    said = capsys.readouterr().out
    assert "images of an epoch: asked for 10, used 8 (the last ones do not fill a step" in said
    assert all(f"  {name}: asked for {row['asked']}, used {row['used']} ({row['why']})" in said
               for name, row in rows.items())  # fmt: skip


@pytest.mark.parametrize(("metric", "mode"), [("eval_mean_iou", "max"), ("eval_loss", "min")])
@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_the_metric_knows_which_way_is_better(tmp_path, metric, mode, schedule):
    options = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric, "max_steps": 2}
    run = small_trainer(tmp_path, lr_scheduler_type=schedule, **options)
    run.create_optimizer_and_scheduler(2)
    assert run.lr_scheduler.mode == mode


@pytest.mark.slow
def test_random_weights_of_the_same_shape_and_gradient_checkpointing(encoder, tmp_path):
    flags = [*FLAGS, *encoder, "--from_scratch", "--gradient_checkpointing", "--output_dir", str(tmp_path / "a")]
    assert main(flags)["mean_iou"] > 0
    plain = main([*FLAGS, *encoder, "--from_scratch", "--output_dir", str(tmp_path / "b")])
    checked = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert checked["loss"] == pytest.approx(plain["loss"], rel=1e-5)  # recomputing changes nothing
    trained = main([*FLAGS, *encoder, "--output_dir", str(tmp_path / "c")])
    assert abs(trained["loss"] - plain["loss"]) > 1e-4


def test_a_random_mini_model_needs_no_checkpoint(tmp_path):
    flags = [*FLAGS, "--model_size", "mini", "--patch_size", "8", "--output_dir", str(tmp_path), "--max_steps", "2"]
    record = main([*flags, "--eval_strategy", "no", "--save_strategy", "no"])
    assert (record["best_checkpoint"], record["evaluations"]) == (None, [])
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop_size", "30"], "crop_size 30 is not a multiple of the patch size 8"),
        (["--per_device_train_batch_size", "1"], "at least 2 images"),
        (["--ignore_index", "2"], "ignore_index 2 is the class 'ball'"),
        (["--model_size", "mini"], "not both"),
        (["--train_dir", "nowhere"], "not both"),
        (["--layer_decay", "0"], "layer_decay is 0"),
        (["--warmup_steps", "4"], "polynomial cannot cover 4 steps, 4 of them warm-up"),
    ],
)
def test_mistakes_end_with_one_line(encoder, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        main([*FLAGS, *encoder, "--output_dir", str(tmp_path / "out"), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_a_vit_of_other_channels_is_refused(vit, tmp_path, capsys):
    vit(num_channels=3).save_pretrained(tmp_path / "rgb")
    with pytest.raises(SystemExit):
        main([*FLAGS, "--model_name_or_path", str(tmp_path / "rgb"), "--output_dir", str(tmp_path / "out")])
    assert "takes 3 channels, the images have 2" in capsys.readouterr().err


def test_the_recipe_holds_the_papers_values():
    assert {"ade20k10_upernet.yaml", "demo_upernet.yaml"} <= set(recipe_names())
    parsers = (ModelArguments, DataArguments, FinetuningArguments)
    override = ["--model_name_or_path", "vit", "--bf16", "false", "--train_dir", "data"]
    _, data, args = parse_arguments(parsers, ["--config", "ade20k10_upernet.yaml", *override])
    assert (data.num_labels, data.reduce_labels, data.max_train_samples, data.crop_size) == (150, True, 1021, 512)
    assert data.scaled_long_edge == 512
    assert (args.learning_rate, args.weight_decay, args.adam_beta1, args.adam_beta2) == (2.5e-5, 0.05, 0.9, 0.999)
    assert (args.warmup_steps, args.num_train_epochs, args.per_device_train_batch_size) == (500, 125, 16)
    assert (str(args.lr_scheduler_type.value), args.lr_scheduler_kwargs["lr_end"]) == ("polynomial", 0.0)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, 500, 1000, args.lr_scheduler_kwargs)
    rates = []
    for _ in range(1000):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == rates[500] == pytest.approx(2.5e-5)
    assert schedule.get_last_lr()[0] == 0.0


def contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_evaluation_alone_leaves_a_trained_segmenter_as_it_is(encoder, tmp_path, capsys):
    """The output folder's own UperNet is evaluated, an unfinished run's best checkpoint too, or the one named."""
    run, evaluation = tmp_path / "run", [flag for flag in FLAGS if flag != "--do_train"]
    trained = main([*FLAGS, *encoder, "--output_dir", str(run)])
    before = contents(run)
    for source in (run, Path(trained["best_checkpoint"])):
        found = main([*evaluation, *encoder, "--output_dir", str(run)])
        assert (found["eval_mean_iou"], found["model"]) == (pytest.approx(trained["mean_iou"]), str(source))
        assert found["per_class"] == trained["per_class"]
        assert json.loads((run / "eval_results.json").read_text()) == json.loads(json.dumps(found))
        (run / "eval_results.json").unlink()
        assert contents(run) == before
        (run / "config.json").unlink(missing_ok=True)  # as of a run that is not at its end
        before.pop(run / "config.json", None)
    other = tmp_path / "other"
    named = ["--model_name_or_path", trained["best_checkpoint"], "--output_dir", str(other)]
    assert main([*evaluation, *named])["eval_loss"] == found["eval_loss"]
    assert [file.name for file in contents(other)] == ["eval_results.json"]
    (tmp_path / "names.json").write_text(json.dumps(["background", "ball", "wire", "wedge", "epoxy"]))
    capsys.readouterr()
    for flags, message in (
        (["--eval_strategy", "no"], "nothing to do: give --do_train, --do_eval or both"),
        (["--push_to_hub"], "--push_to_hub pushes what --do_train trains"),
        ([], f"no segmentation model to evaluate: {tmp_path / 'none'} holds no model"),
        ([*named[:2], "--id2label", str(tmp_path / "names.json")], "give those of its training"),
        (["--output_dir", str(tmp_path / "vit")], "is not that of a UperNet"),
    ):
        with pytest.raises(SystemExit):
            main([*evaluation, *encoder, "--output_dir", str(tmp_path / "none"), *flags])
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "none").exists()
