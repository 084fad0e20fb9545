"""EoMT's loss: the stock one, cut into micro-batches as asked; masks annealed as published."""

import pytest
import torch
from segmentation_runs import same_points, trainer
from tiny import fused

from hf_dbp.downstream.segmentation.eomt import build_eomt
from hf_dbp.downstream.segmentation.mask_loss import MaskLoss, mask_chances

NAMES = {k: f"class {k}" for k in range(3)}


def test_masks_are_annealed_by_the_published_steps():
    """Those of Cityscapes (19902 steps, three blocks) and of COCO (88692 steps, four blocks)."""
    published = [
        (19902, [3317, 8292, 13268], [6634, 11609, 16585]),
        (88692, [14782, 29564, 44346, 59128], [29564, 44346, 59128, 73910]),
    ]
    for steps, starts, ends in published:
        for block, (start, end) in enumerate(zip(starts, ends, strict=True)):
            chances = {step: mask_chances(step / steps, len(starts))[block] for step in range(0, steps, 97)}
            assert all(chance == 1 for step, chance in chances.items() if step < start)
            assert all(chance == 0 for step, chance in chances.items() if step > end + 1)
            middle = mask_chances((start + end) / 2 / steps, len(starts))[block]
            assert middle == pytest.approx(0.5**0.9, rel=1e-3)
    assert mask_chances(0.0, 1) == [1.0] and mask_chances(1.0, 1) == [0.0]


def model_and_inputs():
    torch.manual_seed(0)
    model = build_eomt(fused().float(), NAMES, crop_size=32, num_queries=5)
    labels = torch.randint(0, 3, (4, 32, 32))
    labels[1][labels[1] == 2] = 0
    labels[2] = 255
    labels[:, :5] = 255
    return model.train(), {"pixel_values": torch.randn(4, 3, 32, 32), "labels": labels}


def test_of_a_whole_step_it_is_the_stock_loss_of_the_labelled_images(monkeypatch):
    monkeypatch.setattr(torch, "rand", same_points)
    model, inputs = model_and_inputs()
    kept = [0, 1, 3]
    classes = [torch.tensor(ids) for ids in ([0, 1, 2], [0, 1], [0, 1, 2])]
    masks = [(inputs["labels"][k][None] == ids[:, None, None]).float() for k, ids in zip(kept, classes, strict=True)]
    model.attn_mask_probs.fill_(1)
    stock = model(pixel_values=inputs["pixel_values"][kept], mask_labels=masks, class_labels=classes).loss
    loss = MaskLoss(model)
    counts = loss.labelled(inputs["labels"])
    torch.testing.assert_close(counts, torch.tensor([8.0, 8 + 0.1 * (3 * 5 - 8)]))
    found, _ = loss(model, inputs, torch.ones(2), 0.0)
    torch.testing.assert_close(found, stock)
    torch.testing.assert_close(loss(model, inputs, torch.tensor([0.25, 0.25]), 0.0)[0], stock / 4)
    apart = loss(model, inputs, torch.tensor([1.0, 0.0]), 0.0)[0] + loss(model, inputs, torch.tensor([0.0, 1.0]), 0)[0]
    torch.testing.assert_close(apart, stock)


def test_without_any_label_it_is_zero_and_has_gradients():
    model, inputs = model_and_inputs()
    inputs["labels"].fill_(255)
    loss = MaskLoss(model)
    assert loss.labelled(inputs["labels"]).tolist() == [0, 0]
    found, _ = loss(model, inputs, torch.zeros(2), 0.0)
    found.backward()
    assert found == 0 and all(parameter.grad is not None for parameter in model.parameters())


def test_masks_act_while_it_trains_alone(tmp_path):
    """The steps of a run see the chances of their share of it; evaluations and checkpoints see none."""
    run, seen = trainer(tmp_path, head="eomt", max_steps=6, eval_strategy="steps", eval_steps=2), []
    run.model.register_forward_pre_hook(
        lambda model, *given: seen.append((model.training, model.attn_mask_probs.tolist())), with_kwargs=True
    )
    run.train()
    steps = [chances for training, chances in seen if training]
    assert steps == [pytest.approx(mask_chances(step / 6, 2)) for step in range(6)]
    assert steps[0] == [1, 1] and steps[-1] == [0, 0]
    others = [chances for training, chances in seen if not training]
    assert others and all(chances == [0, 0] for chances in others)
    assert run.model.state_dict()["attn_mask_probs"].tolist() == [0, 0]


@pytest.mark.slow
def test_it_learns(tmp_path):
    run = trainer(tmp_path, head="eomt", count=16, max_steps=60, learning_rate=3e-3)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    assert after["eval_mean_iou"] > 0.4  # three classes in stripes: one of them everywhere scores 0.13
