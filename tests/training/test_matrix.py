"""Random runs: for any settings, the files on disk match what the run reports.

Settings of evaluation, saving, best checkpoint, stop and resume, accumulation, optimizer and schedule are drawn for
seven Trainers: the command of pre-training, README's `ResumingTrainer`, a stock Trainer with our callback, and the
commands of fine-tuning on made-up masks, classes, boxes and outlines. Each case is a tiny run, and another one that
nothing happens to where the first is stopped. Then

- the figure of the folder is that of its weights, evaluated by a Trainer or a command of its own, and so is that of
  each checkpoint in it;
- the learning rates are those of the schedule's formula; with a plateau schedule, those that follow from the
  evaluations;
- the images counted are those of the source, the images trained are steps x images of a step, and the loss of a step is
  the mean over its images, labelled pixels or objects, in however many parts they came;
- a run that was stopped and resumed is the undisturbed one, to the bit; with a schedule-free optimizer, which rounds
  whenever it changes between the weights that it trains and those that are saved, to a thousandth of the loss;
- the summary calls the model the best only where a best checkpoint was restored;
- what a Trainer cannot do is refused before the first step.

Two cases of each are drawn by default, and in the slow tier five, always the same. `make truth` draws 200 others in
all and prints the seed; a failing one is drawn again by its settings and the name of its Trainer,

    TRUTH_RUNS=200 TRUTH_SEED=N python -m pytest tests/training/test_matrix.py -k finetuning
"""

import io
import json
import math
import os
import random
import tempfile
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from class_images import NAMES, class_folders
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from object_images import object_folder
from PIL import Image
from safetensors.torch import load_file
from test_pretraining import flags
from test_resuming import at_step, losses, send
from test_truth import NoMeter, measured, plain, rates
from tiny import TINY
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    BeitForImageClassification,
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    Trainer,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.downstream.classification import finetuning as classifying
from hf_dbp.downstream.classification.augmentation import Mixing
from hf_dbp.downstream.detection import finetuning as detecting
from hf_dbp.downstream.segmentation import finetuning
from hf_dbp.errors import UserError
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining
from hf_dbp.pretraining import main
from hf_dbp.training.resuming import ResumingTrainer
from hf_dbp.training.saving import whole_checkpoints

SEED = int(os.environ.get("TRUTH_SEED", "0"))
RATE, IMAGES, VOID = 1e-2, 12, 255
CONFIG = DBPViTMAEConfig(**(TINY | {"num_hidden_layers": 1}))


@st.composite
def cases(draw, trainer):
    """Settings that a run takes, as flags, and the step in which it is stopped (None: it is not).

    One number is drawn, and the settings by it: all are alike likely, where hypothesis prefers the first of each.
    """
    chance = random.Random(draw(st.integers(0, 2**64 - 1)))
    steps, every = chance.randint(3, 7), chance.choice([None, 1, 2, 3])
    best = every is not None and chance.random() < 0.5
    save = every * chance.choice([1, 2]) if best else chance.choice([None, 1, 2, 3])
    optimizers = {"pretraining": ["schedule_free_adamw", "muon"], "stock": []}.get(trainer, ["schedule_free_adamw"])
    optimizer = chance.choice(["adamw_torch", "sgd", *optimizers])
    schedules = ["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]
    schedules += [] if every is None else ["reduce_lr_on_plateau"] * 3
    given = {
        "max_steps": steps, "learning_rate": RATE, "warmup_steps": chance.randint(0, 2),
        "lr_scheduler_type": "constant" if optimizer == "schedule_free_adamw" else chance.choice(schedules),
        "per_device_train_batch_size": chance.choice([2, 4]), "gradient_accumulation_steps": chance.randint(1, 3),
        "logging_steps": 1, "load_best_model_at_end": best, "save_total_limit": chance.choice([None, 1, 2]),
        "eval_strategy": "no" if every is None else "steps", "save_strategy": "no" if save is None else "steps",
        "eval_on_start": every is not None and chance.random() < 0.5,
    }  # fmt: skip
    given |= {} if every is None else {"eval_steps": every}
    given |= {} if save is None else {"save_steps": save}
    given |= {"optimizer": "muon"} if optimizer == "muon" else {"optim": optimizer}
    if given["lr_scheduler_type"] == "reduce_lr_on_plateau":  # some wait for more than any run learns
        how = {"patience": chance.randint(0, 1), "threshold": chance.choice([1e-4, 0.5]), "factor": 0.5}
        given["lr_scheduler_kwargs"] = json.dumps(how)
    if trainer in TASKS:
        given["layer_decay"] = chance.choice([1.0, 0.65])
    if trainer == "classify":
        given |= {"metric_for_best_model": chance.choice(["accuracy", "balanced_accuracy", "loss"])}
        given |= {"mixup": chance.choice([0.0, 0.8]), "cutmix": chance.choice([0.0, 1.0])}
        given |= {"label_smoothing_factor": chance.choice([0.0, 0.1]), "drop_path": chance.choice([0.0, 0.3])}
        given |= chance.choice([{}, {"balanced_sampling": True}, {"class_weights": "sqrt"}])
    if trainer in ("detect", "instances"):
        prefix = "mask_" if trainer == "instances" else ""
        given |= {"metric_for_best_model": chance.choice([f"{prefix}map", f"{prefix}map_50", "loss"])}
        given |= {"flip": chance.choice([0.0, 0.5])}
    stoppable = trainer != "stock" and (trainer != "readme" or save is not None)
    return given, chance.choice([None, chance.randint(0, steps - 2)]) if stoppable else None


# ---- what is expected ----


def formula(given, step):
    """The learning rate of a step by the schedule's formula."""
    steps, warmup = given["max_steps"], given["warmup_steps"]
    kind = given["lr_scheduler_type"]
    if kind == "constant":
        return RATE
    if step < warmup:
        return RATE * step / warmup
    left = (steps - step) / (steps - warmup)
    end = given.get("lr_end", 1e-7)
    polynomial = (RATE - end) * left + end
    cosine = RATE * (1 + math.cos(math.pi * (1 - left))) / 2
    return {"linear": RATE * left, "cosine": cosine, "constant_with_warmup": RATE, "polynomial": polynomial}[kind]


def expected_rates(given, evaluated, *, higher=False):
    """The learning rate of each step; ``evaluated`` is what a plateau schedule follows, by step."""
    if given["lr_scheduler_type"] != "reduce_lr_on_plateau":
        return [formula(given, step) for step in range(given["max_steps"])]
    how = json.loads(given["lr_scheduler_kwargs"])
    sign = -1 if higher else 1
    found, rate, best, waited = [], RATE, math.inf, 0
    for step in range(1, given["max_steps"] + 1):
        found.append(rate)
        if step % given["eval_steps"]:
            continue
        value = sign * evaluated[step]
        if value < best - how["threshold"] * abs(best if math.isfinite(best) else 0.0):
            best, waited = value, 0
        else:
            waited += 1
        if waited > how["patience"]:
            rate, waited = rate * how["factor"], 0
    return found


class Part(NamedTuple):
    """A micro-batch that was trained on: its images, the mean loss, and the weight of that in the mean of its step."""

    images: int
    loss: float
    weight: int


@contextmanager
def trained_parts():
    """Every micro-batch of a training step, as the models see them; a classifier's, with the targets of its images."""
    parts, targets, mixed = [], [], Mixing.__call__

    def mix(self, *args):
        pixels_BCHW, targets_BK = mixed(self, *args)
        targets.append(targets_BK)
        return pixels_BCHW, targets_BK

    def see(module, args, kwargs, output):
        if isinstance(module, ViTMAEForPreTraining | UperNetForSemanticSegmentation) and torch.is_grad_enabled():
            images, labels = len(kwargs["pixel_values"]), kwargs.get("labels")
            weight = images if isinstance(module, ViTMAEForPreTraining) else int((labels != VOID).sum())
            parts.append(Part(images, output.loss.item(), weight))
        elif isinstance(module, BeitForImageClassification) and torch.is_grad_enabled():
            loss = -(targets[-1] * output.logits.log_softmax(dim=1)).sum(dim=1).mean()
            parts.append(Part(len(output.logits), loss.item(), len(output.logits)))
        elif isinstance(module, RfDetrForObjectDetection | RfDetrForInstanceSegmentation) and torch.is_grad_enabled():
            objects = sum(len(one["class_labels"]) for one in kwargs["labels"])
            parts.append(Part(len(kwargs["pixel_values"]), output.loss.item(), objects))

    handle = register_module_forward_hook(see, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixing, "__call__", mix)
        yield parts
    handle.remove()


def check_parts(parts, given, history, images, *, drop_last):
    """Every epoch has all images, the images are steps x images of a step, and the log has the mean loss of each
    step."""
    size, count = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    used = images - images % (size * count) if drop_last else images
    epoch = [size] * (used // size)
    steps = [epoch[first : first + count] for first in range(0, len(epoch), count)]
    wanted = [steps[number % len(steps)] for number in range(given["max_steps"])]
    assert [part.images for part in parts] == [images for step in wanted for images in step]
    logged = [row["loss"] for row in history if "loss" in row]
    assert len(logged) == len(wanted)
    for step, loss in zip(wanted, logged, strict=True):
        mine, parts = parts[: len(step)], parts[len(step) :]
        mean = sum(part.loss * part.weight for part in mine) / sum(part.weight for part in mine)
        assert loss == pytest.approx(mean, rel=1e-5)


def history_of(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def weights(folder):
    return load_file(next(folder.glob("*.safetensors")))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rounds(given):
    """Whether the optimizer rounds the weights when they are evaluated or saved."""
    return given.get("optim") == "schedule_free_adamw"


def tolerance(given):
    return {"rel": 1e-3 if rounds(given) else 0, "abs": 0}


@contextmanager
def stopped(stop):
    """Stop a run in a step by SIGTERM, which must end it."""
    with at_step(stop, send(15)), pytest.raises(SystemExit) as end:
        yield
    assert end.value.code == 143


def check_checkpoints(folder, given):
    limit = given["save_total_limit"]
    assert limit is None or len(whole_checkpoints(folder)) <= max(limit, 2)
    assert not (folder / ".unfinished").exists()


def check_same_end(given, stop, run, undisturbed, folders):
    """Check that a resumed run ends like the undisturbed one; both are (step, figure) of the weights in their
    folder."""
    if undisturbed[0] != run[0]:  # a stop saves once more, perhaps the best
        assert given["load_best_model_at_end"] and stop + 1 in (run[0], *whole_checkpoints(folders[0]))
    elif rounds(given):
        assert undisturbed[1] == pytest.approx(run[1], rel=1e-3)
    else:
        assert undisturbed[1] == run[1]
        assert same(*map(weights, folders))


# ---- the command of pre-training ----


def check_pretraining(folder, given, stop, parts, made):
    data = {"max_train_samples": IMAGES, "max_eval_samples": 3, "built_in_size": 32}
    options = data | {"num_train_epochs": None}
    arguments = flags(folder / "run", **options, **given)
    if stop is not None:
        with stopped(stop):
            main(arguments)
    record = main(arguments)
    check_parts(parts, given, history_of(folder / "run"), IMAGES, drop_last=True)
    run = json.loads((folder / "run" / "run.json").read_text())
    model = run["results"]["model"]
    assert model["eval_loss"] == pytest.approx(measured(folder / "run", folder, **data), rel=1e-6)
    evaluated = {row["step"]: row["eval_loss"] for row in run["rows"]}
    saved = evaluated.keys() & whole_checkpoints(folder / "run").keys()
    if given["load_best_model_at_end"] and saved:
        assert model["eval_loss"] == min(evaluated[step] for step in saved)
    else:
        assert model["step"] == given["max_steps"]
    for step, checkpoint in whole_checkpoints(folder / "run").items():
        of_it = json.loads((checkpoint / "run.json").read_text())["results"]["model"]
        # evaluated after it was written: by a resume, or at the end of a run that never evaluates
        later = given["eval_on_start"] and stop is not None and step == stop + 1
        later = later or (given["eval_strategy"] == "no" and step == given["max_steps"])
        assert of_it["step"] == step
        assert of_it.get("eval_loss") == evaluated.get(step) or (later and "eval_loss" not in of_it)
    assert run["results"]["input"]["images"] == sum(part.images for part in parts)
    assert run["data"]["train_images"] == IMAGES
    assert rates(folder / "run") == pytest.approx(expected_rates(given, evaluated))
    check_checkpoints(folder / "run", given)
    if stop is None:
        return
    undisturbed = main(flags(folder / "undisturbed", **options, **given))
    ours, theirs = dict(losses(record)), dict(losses(undisturbed))
    for step in theirs.keys() - {given["max_steps"]}:  # at a resume, --eval_on_start evaluates once more
        assert ours[step] == pytest.approx(theirs[step], **tolerance(given))
    ends = [(one["step"], one["eval_loss"]) for one in (model, undisturbed.results["model"])]
    check_same_end(given, stop, *ends, (folder / "run", folder / "undisturbed"))  # type: ignore[call-arg]


# ---- Trainers in Python ----


def python_trainer(folder, given, kind=ResumingTrainer, **more):
    return plain(folder, CONFIG, kind, metric_for_best_model="loss", **given, **more)


def figure_of(folder, given):
    """The loss of the weights in a folder, from a separate Trainer."""
    with tempfile.TemporaryDirectory() as apart:
        other = python_trainer(Path(apart), given)
        other.model.load_state_dict(DBPViTMAEForPreTraining.from_pretrained(folder).state_dict())
        return other.evaluate()["eval_loss"]


def check_trainer(folder, given, stop, parts, made):
    run = python_trainer(folder / "run", given)
    if stop is not None:
        with stopped(stop):
            run.train()
        run = python_trainer(folder / "run", given)
    run.train(resume_from_checkpoint=stop is not None)
    run.save_model(str(folder / "saved"))
    run.save_state()
    history = history_of(folder / "run")
    check_parts(parts, given, history, 16, drop_last=False)
    evaluated = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    figure = figure_of(folder / "saved", given)
    if run.weights_step in evaluated:
        assert evaluated[run.weights_step] == pytest.approx(figure, rel=1e-6)
    if given["load_best_model_at_end"] and run.restored is not None:
        assert figure == pytest.approx(min(evaluated[step] for step in run.saved & evaluated.keys()), rel=1e-6)
    else:
        assert run.weights_step == given["max_steps"]
    for step, checkpoint in whole_checkpoints(folder / "run").items():
        if step in evaluated:
            assert figure_of(checkpoint, given) == pytest.approx(evaluated[step], rel=1e-6)
    assert rates(folder / "run") == pytest.approx(expected_rates(given, evaluated))
    check_checkpoints(folder / "run", given)
    if stop is None:
        return
    undisturbed = python_trainer(folder / "undisturbed", given)
    undisturbed.train()
    undisturbed.save_model(str(folder / "other"))
    ends = [(one.weights_step, figure_of(at, given)) for one, at in ((run, folder / "saved"),
                                                                    (undisturbed, folder / "other"))]  # fmt: skip
    if ends[0][0] != ends[1][0]:
        assert given["load_best_model_at_end"] and stop + 1 in run.saved
    else:
        check_same_end(given, stop, *ends, (folder / "saved", folder / "other"))  # type: ignore[call-arg]


def check_stock(folder, given, stop, parts, made):
    """A stock Trainer cannot restore our checkpoints: that is refused; all else holds."""
    run = python_trainer(folder / "run", given, Trainer, label_names=["pixel_values"])
    if given["load_best_model_at_end"]:
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        with pytest.raises(UserError, match="load_best_model_at_end"):
            run.train()
        assert same(before, run.model.state_dict()) and not parts and not [*folder.glob("run/checkpoint-*")]
        given = given | {"load_best_model_at_end": False}
        run = python_trainer(folder / "run", given, Trainer, label_names=["pixel_values"])
    run.train()
    run.save_model(str(folder / "saved"))
    run.save_state()
    history = history_of(folder / "run")
    check_parts(parts, given, history, 16, drop_last=False)
    evaluated = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    there = {int(path.name.rpartition("-")[2]): path for path in folder.glob("run/checkpoint-*")}
    for step, place in [*there.items(), (given["max_steps"], folder / "saved")]:
        if step in evaluated:
            assert figure_of(place, given) == pytest.approx(evaluated[step], rel=1e-6)
    assert rates(folder / "run") == pytest.approx(expected_rates(given, evaluated))
    if there:
        again = python_trainer(folder / "run", given, Trainer, label_names=["pixel_values"])
        with pytest.raises(ValueError, match="valid checkpoint"):  # by transformers itself
            again.train(resume_from_checkpoint=str(there[max(there)]))


# ---- the commands of fine-tuning ----


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny ViT; images whose channels show the ids of their masks, each in stripes of its own width; images of three
    classes, one of them striped; and images of blocks and stripes with their outlines."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder / "vit")
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("validation", 3)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            mask = (np.arange(40) // (4 + number % 5) % 3)[None].repeat(40, axis=0).astype(np.uint8)
            image = np.stack([mask * 80 + rng.integers(0, 40, mask.shape)] * 3, axis=2).astype(np.uint8)
            mask[:8, : 4 * (number % 4)] = VOID  # so that images weigh differently
            Image.fromarray(image).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{number}.png")
    class_folders(folder / "classes")
    for split, kept in (("train", (6, 4, 2)), ("validation", (3, 2, 2))):  # IMAGES, unevenly, and seven
        for name, count in zip(NAMES, kept, strict=True):
            for file in sorted((folder / "classes" / split / name).iterdir())[count:]:
                file.unlink()
    object_folder(folder / "objects", count=IMAGES)
    return folder


def as_flags(**given):
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 2}
    return [part for key, value in (fixed | given).items() if value is not None for part in (f"--{key}", str(value))]


def finetuning_flags(output, made, **given):
    data = {f"{split}{kind}_dir": made / split / name for split in ("train", "validation")
            for kind, name in (("", "images"), ("_mask", "masks"))}  # fmt: skip
    sizes = {"crop_size": 32, "long_edge": 0, "head_size": 8, "auxiliary_head_size": 8, "num_labels": 3}
    return as_flags(output_dir=output, **data, **sizes, **given)


def classify_flags(output, made, **given):
    return as_flags(output_dir=output, train_dir=made / "classes", **given)


def detect_flags(output, made, **given):
    data = {"train_dir": made / "objects" / "images", "train_mask_dir": made / "objects" / "labels.json"}
    sizes = {"image_size": 32, "num_queries": 8, "query_groups": 2, "decoder_layers": 1, "decoder_width": 32}
    return as_flags(output_dir=output, crop_scale=1.0, **data, **sizes, **given)


def instances_flags(output, made, **given):
    return detect_flags(output, made, instances=True, **given)


class Task(NamedTuple):
    """A command of fine-tuning: its main, its flags, the figure that it publishes first, where polynomials end."""

    main: Any
    flags: Any
    figure: str
    lr_end: float


TASKS = {
    "finetuning": Task(finetuning.main, finetuning_flags, "mean_iou", 0.0),
    "classify": Task(classifying.main, classify_flags, "accuracy", 1e-7),
    "detect": Task(detecting.main, detect_flags, "map", 1e-7),
    "instances": Task(detecting.main, instances_flags, "mask_map", 1e-7),
}


def check_finetuning(task, folder, given, stop, parts, made):
    options = given | {"do_train": True, "model_name_or_path": made / "vit"}
    metric = f"eval_{given.get('metric_for_best_model', task.figure)}"
    sign = -1 if metric == "eval_loss" else 1
    arguments = task.flags(folder / "run", made, **options)
    if stop is not None:
        with stopped(stop):
            task.main(arguments)
    with redirect_stdout(io.StringIO()) as printed:
        task.main(arguments)
    history = history_of(folder / "run")
    check_parts(parts, given, history, IMAGES, drop_last=True)
    run = json.loads((folder / "run" / "eval.json").read_text())
    again = task.main(task.flags(folder / "alone", made, do_eval=True, model_name_or_path=folder / "run"))
    assert run["loss"] == pytest.approx(again["eval_loss"], rel=1e-6)
    assert (run[task.figure], run["per_class"]) == (again[f"eval_{task.figure}"], again["per_class"])
    evaluated = {row["step"]: row for row in run["evaluations"]}
    saved = whole_checkpoints(folder / "run")
    restored = given["load_best_model_at_end"] and bool(evaluated.keys() & saved.keys())
    assert (run["best_checkpoint"] is not None, "(best)" in printed.getvalue()) == (restored, restored)
    if restored:
        best = max(sign * evaluated[step][metric] for step in evaluated.keys() & saved.keys())
        assert sign * run[metric.removeprefix("eval_")] == best
    else:
        assert run["step"] == given["max_steps"]
    if run["step"] in evaluated:
        assert run["loss"] == evaluated[run["step"]]["eval_loss"]
    best = max(evaluated.values(), key=lambda row: sign * row[metric], default={"step": run["step"]})["step"]
    row = run["asked_used"].get("step of the model", {"asked": run["step"], "used": run["step"]})
    assert (row["asked"], row["used"]) == (best, run["step"])
    for step in saved.keys() & evaluated.keys():
        alone = task.main(task.flags(folder / "alone", made, do_eval=True, model_name_or_path=saved[step]))
        assert alone["eval_loss"] == pytest.approx(evaluated[step]["eval_loss"], rel=1e-6)
    assert run["data"]["train_images"] == IMAGES
    followed = {step: row[metric] for step, row in evaluated.items()}
    wanted = expected_rates(given | {"lr_end": task.lr_end}, followed, higher=sign > 0)
    assert rates(folder / "run") == pytest.approx(wanted)
    check_checkpoints(folder / "run", given)
    if stop is None:
        return
    undisturbed = task.main(task.flags(folder / "undisturbed", made, **options))
    for theirs in undisturbed["evaluations"]:
        ours = evaluated[theirs["step"]]
        for name in ("eval_loss", metric):
            assert ours[name] == pytest.approx(theirs[name], **tolerance(given))
    ends = [(one["step"], one["loss"]) for one in (run, undisturbed)]
    check_same_end(given, stop, *ends, (folder / "run", folder / "undisturbed"))  # type: ignore[call-arg]


CHECKS = {"pretraining": check_pretraining, "readme": check_trainer, "stock": check_stock}
CHECKS |= {name: partial(check_finetuning, task) for name, task in TASKS.items()}


#: how many runs of each are drawn: of those asked for in all, else few, and in the slow tier more
RUNS: list[Any] = [1, pytest.param(5, marks=pytest.mark.slow)]
if "TRUTH_RUNS" in os.environ:
    RUNS = [int(os.environ["TRUTH_RUNS"]) // len(CHECKS)]


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize(
    "trainer",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("detect", "instances") else name for name in CHECKS],
)
def test_what_lies_on_disk_is_what_a_run_says(trainer, runs, made, monkeypatch):
    monkeypatch.setattr("hf_dbp.training.clocked.EnergyMeter", lambda *_: NoMeter())

    @seed(SEED)
    @settings(
        max_examples=runs, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )  # fmt: skip
    @given(cases(trainer))
    def drawn(case):
        note(f"drawn with TRUTH_RUNS={runs * len(CHECKS)} TRUTH_SEED={SEED}, -k {trainer}")
        with tempfile.TemporaryDirectory() as folder, trained_parts() as parts:
            CHECKS[trainer](Path(folder), *case, parts, made)  # type: ignore[call-arg]

    drawn()
