"""Losses for rare classes: against their formulas, and the stock loss where nothing is asked for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hf_dbp.downstream.class_weights import class_weights
from hf_dbp.downstream.segmentation.losses import UperNetLoss, soft_dice
from hf_dbp.errors import UserError


def batch():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=rng)
    labels = torch.randint(0, 3, (2, 4, 5), generator=rng)
    labels[0, 0] = 255
    return logits, labels


def test_dice_is_its_formula_over_the_classes_that_occur():
    logits, labels = batch()
    labels[labels == 1] = 2  # class 1 does not occur
    p, labelled, dice = logits.softmax(1), labels != 255, []
    for k in (0, 2):
        true = (labels == k).float()
        p_k = p[:, k] * labelled
        dice.append(2 * (p_k * true).sum() / (p_k.sum() + true.sum()))
    torch.testing.assert_close(soft_dice(logits, labels, 255), 1 - torch.stack(dice).mean())
    exact = nn.functional.one_hot(labels.clamp(max=2), 3).movedim(-1, 1) * 100.0
    assert soft_dice(exact, labels, 255) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("kind", "power"), [("sqrt", 0.5), ("inverse", 1.0)])
def test_weights_are_the_power_of_the_share_and_keep_the_mean(kind, power):
    pixels = np.array([900, 90, 10, 0])
    weights = np.array(class_weights(pixels, kind))
    share = pixels / pixels.sum()
    assert (share * weights).sum() == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(10**power)
    assert weights[3] == 1
    assert class_weights(pixels, "none") is None
    with pytest.raises(UserError, match="no pixel"):
        class_weights(pixels * 0, kind)


def test_without_weights_and_dice_it_is_the_stock_loss_of_both_heads(upernet):
    model = upernet().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    pixels, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))
    labels[:, :9] = 255
    stock = model(pixel_values=pixels, labels=labels).loss
    loss = UperNetLoss(model)
    torch.testing.assert_close(loss(model(pixel_values=pixels).logits, labels), stock)
    both = UperNetLoss(model, dice=True)
    assert both(model(pixel_values=pixels).logits, labels) > stock


def test_a_weight_scales_the_pixels_of_its_class_alone():
    logits, labels = batch()
    model = SimpleNamespace(auxiliary_head=None, config=SimpleNamespace(loss_ignore_index=255))
    each = nn.functional.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    weights = torch.tensor([1.0, 2.0, 5.0])
    expected = (each * weights[labels.clamp(max=2)]).sum() / (labels != 255).sum()
    torch.testing.assert_close(UperNetLoss(model, weights=weights.tolist())(logits, labels), expected)
