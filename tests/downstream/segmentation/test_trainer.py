"""The Trainer's promises: one batch's gradient however it is cut, no NaN, complete resume, two processes as one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from segmentation_runs import labelled, one_step, same_points, trainer
from transformers import EomtForUniversalSegmentation, UperNetForSemanticSegmentation

from hf_dbp.downstream.segmentation.data import TrainingCrops

HEADS = {"upernet": UperNetForSemanticSegmentation, "eomt": EomtForUniversalSegmentation}


def assert_same_weights(states, expected, **tolerance):
    assert states.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(states[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)  # type: ignore[misc]


@pytest.mark.parametrize("head", HEADS)
def test_four_micro_batches_give_the_gradient_of_one_batch(tmp_path, head, monkeypatch):
    monkeypatch.setattr(torch, "rand", same_points)
    whole = one_step(tmp_path, void=0.7, head=head, per_device_train_batch_size=8)
    parts = one_step(tmp_path, void=0.7, head=head, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    start = trainer(tmp_path, head=head).model.state_dict()
    assert any((whole[name] - start[name]).abs().max() > 1e-2 for name in whole)
    assert_same_weights(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_that_is_the_whole_step_has_all_of_its_loss(tmp_path, head):
    run = trainer(tmp_path, void=0.7, head=head)
    batch = next(iter(run.get_train_dataloader()))
    _, items = run.get_batch_samples(iter([batch]), 1, run.args.device)
    assert (run.step_share(batch["labels"], items) == 1).all()


@pytest.mark.parametrize("head", HEADS)
def test_an_all_void_batch_changes_nothing_and_is_no_nan(tmp_path, head):
    options = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 2, "weight_decay": 0.0}
    run = trainer(tmp_path, void=1.0, head=head, frozen=True, **options)
    run.train_dataset = TrainingCrops(
        labelled(8, 1.0), run.train_dataset.augmentation, mean=[0.5] * 3, std=[0.2] * 3, seed=0
    )
    for sample in run.train_dataset.images.samples:
        sample["annotation"] = sample["annotation"] * 0 + 255
    batch = [run.train_dataset[0, index] for index in range(2)]
    inputs = {key: torch.stack([sample[key] for sample in batch]) for key in batch[0]}
    assert run.compute_loss(run.model, inputs) == 0
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    result = run.train()
    assert result.training_loss == 0
    assert_same_weights(run.model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_an_all_void_micro_batch_leaves_the_others_their_gradient(tmp_path, head, monkeypatch):
    """Two of the four images are void; alone in their micro-batch or among the others, the gradient is the same."""
    monkeypatch.setattr(torch, "rand", same_points)
    options = {"count": 4, "void": 1.0, "head": head}
    whole = one_step(tmp_path, **options, per_device_train_batch_size=4)
    parts = one_step(tmp_path, **options, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same_weights(parts, whole, rtol=1e-4, atol=1e-6)
    assert all(value.isfinite().all() for value in whole.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 1}, "at least 2 images"),
        ({"per_device_train_batch_size": 16}, "8 training images do not fill one step of 16"),
        (
            {"per_device_train_batch_size": 7, "dataloader_drop_last": False},
            "8 training images in .* leave a single image",
        ),
    ],
)
def test_batches_that_cannot_be_are_refused_before_training(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [4, 4]), (False, [4, 4, 2])])
def test_the_last_images_of_an_epoch_are_dropped_or_not_as_asked(tmp_path, drop_last, sizes):
    run = trainer(tmp_path, count=10, dataloader_drop_last=drop_last, num_train_epochs=1)
    seen = [len(batch["labels"]) for batch in run.get_train_dataloader()]
    assert seen == sizes
    run.train()
    assert run.state.global_step == len(sizes)


def test_a_head_that_normalises_no_batch_takes_single_images(tmp_path):
    run = trainer(tmp_path, head="eomt", per_device_train_batch_size=1, max_steps=1)
    run.train()
    assert run.state.global_step == 1


@pytest.mark.parametrize("head", HEADS)
def test_resume_restores_every_tensor_and_continues_the_curve(tmp_path, head):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "head": head}
    undisturbed = trainer(tmp_path / "a", **options)
    undisturbed.train()
    resumed = trainer(tmp_path / "b", **options)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()  # whatever the checkpoint does not restore would stay so
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_same_weights(resumed.model.state_dict(), undisturbed.model.state_dict(), rtol=0, atol=0)
    curves = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (undisturbed, resumed)]
    assert len(curves[0]) == 5
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_it_learns_and_ends_with_the_best_checkpoint(tmp_path):
    run = trainer(
        tmp_path,
        count=16,
        max_steps=40,
        learning_rate=5e-3,
        eval_strategy="steps",
        eval_steps=10,
        save_strategy="steps",
        save_steps=10,
        load_best_model_at_end=True,
        metric_for_best_model="eval_mean_iou",
        greater_is_better=True,
    )
    run.train()
    scores = [row["eval_mean_iou"] for row in run.state.log_history if "eval_mean_iou" in row]
    assert max(scores) > 0.4  # three classes in stripes: one of them everywhere scores 0.13
    assert run.evaluate()["eval_mean_iou"] == max(scores)
    with safe_open(f"{run.state.best_model_checkpoint}/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(run.model.state_dict())  # the stock Trainer, too, would restore all of them
    best = UperNetForSemanticSegmentation.from_pretrained(run.state.best_model_checkpoint)
    assert_same_weights(run.model.state_dict(), best.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_evaluation_takes_one_image_at_a_time_and_an_odd_number(tmp_path, head):
    one, many = (trainer(tmp_path, head=head, per_device_eval_batch_size=size).evaluate() for size in (1, 4))
    for name in ("eval_mean_iou", "eval_loss", "eval_overall_accuracy"):
        assert one[name] == pytest.approx(many[name], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_two_processes_are_one(tmp_path, head, monkeypatch):
    script = Path(__file__).with_name("segmentation_runs.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--standalone", str(script), str(tmp_path), head]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert finished.returncode == 0, finished.stderr[-2000:]
    metrics = [json.loads((tmp_path / f"metrics{rank}.json").read_text()) for rank in range(2)]
    run = trainer(tmp_path / "one", head=head)
    run.model.load_state_dict(HEADS[head].from_pretrained(tmp_path / "model").state_dict())
    for name, value in run.evaluate().items():
        if name != "eval_runtime":
            assert math.isclose(metrics[0][name], value, rel_tol=1e-6) or name == "epoch", name
            assert metrics[0][name] == metrics[1][name]
    assert metrics[0]["pixels"] == run.confusion_KK.sum()
    monkeypatch.setattr(torch, "rand", same_points)
    whole = one_step(tmp_path / "one", void=0.7, head=head, per_device_train_batch_size=4)
    assert_same_weights(torch.load(tmp_path / "weights.pt"), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("where", ["image", "gradient"])
def test_what_is_not_finite_skips_its_step_and_reaches_no_running_statistics(tmp_path, where, head, monkeypatch):
    run, seen = trainer(tmp_path, head=head, max_steps=4, logging_steps=1), []
    training_step = type(run).training_step
    name = "decode_head.classifier.weight" if head == "upernet" else "class_predictor.weight"

    def step(self, model, inputs, *args, **kwargs):
        optimizer = [v.clone() for state in self.optimizer.state_dict()["state"].values() for v in state.values()]
        seen.append([*(value.clone() for value in model.state_dict().values()), *optimizer])
        bad, hooks = self.state.global_step == 1, []
        if bad and where == "image":
            inputs["pixel_values"][0, 0, 5, 5] = math.nan
        if bad and where == "gradient":
            hooks.append(model.get_parameter(name).register_hook(lambda grad: grad * math.nan))
        loss = training_step(self, model, inputs, *args, **kwargs)
        for hook in hooks:
            hook.remove()
        return loss

    monkeypatch.setattr(type(run), "training_step", step)
    run.train()
    assert all(torch.equal(*pair) for pair in zip(seen[1], seen[2], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(seen[2], seen[3], strict=True))
    cause, layer = ("loss", "the batch's pixel_values") if where == "image" else ("gradient", name)
    assert run.skipped_steps() == {"skipped_steps": 1, "skipped": [{"step": 2, "skipped": cause, "layer": layer}]}
    assert all(value.isfinite().all() for value in run.model.state_dict().values())
    assert math.isfinite(run.evaluate()["eval_loss"])
