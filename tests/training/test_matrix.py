"""Drawn runs: whatever the settings, what lies on disk is what the run says.

Settings of evaluation, saving, best checkpoint, stop and resume, accumulation, optimizer, schedule and Trainer are
drawn; each case is a tiny run, and another one that nothing happens to where the first is stopped. Then

- the figure of the folder is that of its weights, evaluated by a Trainer of its own;
- the learning rates are those of the schedule's formula;
- the images counted are those of the source, the images trained are steps x images of a step;
- a run that was stopped and resumed is the undisturbed one, to the bit; with a schedule-free optimizer, which rounds
  whenever it changes between the weights that it trains and those that are saved, to a thousandth of the loss.

Twenty cases are drawn by default, always the same. `make truth` draws 200 others and prints the seed; a failing one is
drawn again by its two settings, TRUTH_RUNS=200 TRUTH_SEED=N python -m pytest tests/training/test_matrix.py.
"""

import json
import math
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_pretraining import flags
from test_resuming import at_step, losses, send
from test_truth import NoMeter, measured, plain, rates
from tiny import TINY

from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining
from hf_dbp.pretraining import main
from hf_dbp.training.saving import whole_checkpoints

RUNS, SEED = int(os.environ.get("TRUTH_RUNS", "20")), int(os.environ.get("TRUTH_SEED", "0"))
RATE, IMAGES = 1e-2, 12


@st.composite
def cases(draw):
    """Settings that a run takes, as flags, and the step in which it is stopped (None: it is not)."""
    trainer = draw(st.sampled_from(["mae", "mae", "plain"]))
    steps = draw(st.integers(3, 7))
    every = draw(st.sampled_from([None, 1, 2, 3]))
    best = every is not None and draw(st.booleans())
    save = every * draw(st.sampled_from([1, 2])) if best else draw(st.sampled_from([None, 1, 2, 3]))
    optimizer = draw(st.sampled_from(["adamw", "sgd", "schedule_free_adamw", "muon"]))
    schedules = ["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]
    schedule = "constant" if optimizer == "schedule_free_adamw" else draw(st.sampled_from(schedules))
    warmup, started = draw(st.integers(0, 2)), every is not None and draw(st.booleans())
    given = {
        "max_steps": steps, "learning_rate": RATE, "lr_scheduler_type": schedule, "warmup_steps": warmup,
        "per_device_train_batch_size": draw(st.sampled_from([2, 4])), "logging_steps": 1,
        "gradient_accumulation_steps": draw(st.integers(1, 3)), "load_best_model_at_end": best,
        "eval_strategy": "no" if every is None else "steps", "save_strategy": "no" if save is None else "steps",
        "save_total_limit": draw(st.sampled_from([None, 1, 2])), "eval_on_start": started,
    }  # fmt: skip
    given |= {} if every is None else {"eval_steps": every}
    given |= {} if save is None else {"save_steps": save}
    if optimizer == "muon" and trainer == "mae":
        given["optimizer"] = "muon"
    elif optimizer != "muon":
        given["optim"] = "adamw_torch" if optimizer == "adamw" else optimizer
    stop = None if trainer == "plain" and save is None else draw(st.none() | st.integers(0, steps - 2))
    return trainer, given, stop


def rate(given, step):
    """The schedule's formula."""
    steps, warmup = given["max_steps"], given["warmup_steps"]
    kind = given["lr_scheduler_type"]
    if kind == "constant":
        return RATE
    if step < warmup:
        return RATE * step / warmup
    left = (steps - step) / (steps - warmup)
    polynomial = (RATE - 1e-7) * left + 1e-7
    cosine = RATE * (1 + math.cos(math.pi * (1 - left))) / 2
    return {"linear": RATE * left, "cosine": cosine, "constant_with_warmup": RATE, "polynomial": polynomial}[kind]


def weights(folder):
    return load_file(next(folder.glob("*.safetensors")))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rounds(given):
    """Whether the optimizer rounds the weights when they are evaluated or saved."""
    return given.get("optim") == "schedule_free_adamw"


def tolerance(given):
    return {"rel": 1e-3 if rounds(given) else 0, "abs": 0}


def stopped(stop):
    """Has a run stopped in a step by SIGTERM."""
    return at_step(stop, send(15)) if stop is not None else nullcontext()


def check_checkpoints(folder, given):
    limit = given["save_total_limit"]
    assert limit is None or len(whole_checkpoints(folder)) <= max(limit, 2)
    assert not (folder / ".unfinished").exists()


# ---- the command ----


def check_command(folder, given, stop):
    data = {"max_train_samples": IMAGES, "max_eval_samples": 3, "built_in_size": 32}
    options = data | {"num_train_epochs": None}
    arguments = flags(folder / "run", **options, **given)
    with stopped(stop):
        if stop is not None:
            with pytest.raises(SystemExit):
                main(arguments)
    record = main(arguments)
    run = json.loads((folder / "run" / "run.json").read_text())
    model = run["results"]["model"]
    assert model["eval_loss"] == pytest.approx(measured(folder / "run", folder, **data), rel=1e-6)
    evaluated = {row["step"]: row["eval_loss"] for row in run["rows"]}
    saved = evaluated.keys() & whole_checkpoints(folder / "run").keys()
    if given["load_best_model_at_end"] and saved:
        assert model["eval_loss"] == min(evaluated[step] for step in saved)
    else:
        assert model["step"] == given["max_steps"]
    step_images = given["per_device_train_batch_size"] * given["gradient_accumulation_steps"]
    assert run["results"]["input"]["images"] == given["max_steps"] * step_images
    assert run["data"]["train_images"] == IMAGES
    assert rates(folder / "run") == pytest.approx([rate(given, step) for step in range(given["max_steps"])])
    check_checkpoints(folder / "run", given)
    if stop is None:
        return
    undisturbed = main(flags(folder / "undisturbed", **options, **given))
    ours, theirs = dict(losses(record)), dict(losses(undisturbed))
    for step in theirs.keys() - {given["max_steps"]}:  # at a resume, --eval_on_start evaluates once more
        assert ours[step] == pytest.approx(theirs[step], **tolerance(given))
    if undisturbed.results["model"]["step"] != model["step"]:  # a stop saves once more, perhaps the best
        assert given["load_best_model_at_end"] and stop + 1 in (model["step"], *whole_checkpoints(folder / "run"))
    elif rounds(given):
        assert undisturbed.results["model"]["eval_loss"] == pytest.approx(model["eval_loss"], rel=1e-3)
    else:
        assert same(weights(folder / "run"), weights(folder / "undisturbed"))


# ---- the Trainer in Python ----


def check_trainer(folder, given, stop):
    config = DBPViTMAEConfig(**(TINY | {"num_hidden_layers": 1}))

    def trainer(name):
        return plain(folder / name, config, metric_for_best_model="loss", **given)

    run = trainer("run")
    with stopped(stop):
        if stop is not None:
            with pytest.raises(SystemExit):
                run.train()
            run = trainer("run")
    run.train(resume_from_checkpoint=stop is not None)
    run.save_model(str(folder / "saved"))
    run.save_state()
    evaluations = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    other = trainer("other")
    other.model.load_state_dict(DBPViTMAEForPreTraining.from_pretrained(folder / "saved").state_dict())
    figure = other.evaluate()["eval_loss"]
    if run.weights_step in evaluations:
        assert evaluations[run.weights_step] == pytest.approx(figure, rel=1e-6)
    if given["load_best_model_at_end"] and run.restored is not None:
        assert figure == pytest.approx(min(evaluations[step] for step in run.saved & evaluations.keys()), rel=1e-6)
    else:
        assert run.weights_step == given["max_steps"]
    assert rates(folder / "run") == pytest.approx([rate(given, step) for step in range(given["max_steps"])])
    check_checkpoints(folder / "run", given)
    if stop is None:
        return
    undisturbed = trainer("undisturbed")
    undisturbed.train()
    if undisturbed.weights_step != run.weights_step:  # a stop saves once more, perhaps the best
        assert given["load_best_model_at_end"] and stop + 1 in run.saved
    elif rounds(given):
        assert undisturbed.evaluate()["eval_loss"] == pytest.approx(figure, rel=1e-3)
    else:
        assert same(dict(run.model.state_dict()), dict(undisturbed.model.state_dict()))


@seed(SEED)
@settings(
    max_examples=RUNS, deadline=None, database=None, suppress_health_check=[*HealthCheck], phases=[Phase.generate]
)
@given(cases())
def test_what_lies_on_disk_is_what_a_run_says(case):
    trainer, given, stop = case
    note(f"drawn with TRUTH_RUNS={RUNS} TRUTH_SEED={SEED}")
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("hf_dbp.pretraining.plot_reconstructions"),
        patch("hf_dbp.pretraining.plot_curves"),
        patch("hf_dbp.training.clocked.EnergyMeter", lambda *_: NoMeter()),
    ):
        (check_command if trainer == "mae" else check_trainer)(Path(folder), given, stop)
