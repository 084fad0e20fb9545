"""Every figure of a classifier against loops over the images, which follow the formulas word by word."""

import math

import numpy as np
import pytest
import torch

from hf_dbp.downstream.classification.metrics import BINS, ClassificationScores, Tally, class_figures
from hf_dbp.errors import UserError


def drawn(images: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are somewhat right about their classes; one class never occurs and one is common."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.integers(0, 2 * classes, images), classes - 2)
    logits = rng.normal(size=(images, classes)) * 2
    logits[np.arange(images), labels] += 1.5
    return torch.from_numpy(logits), torch.from_numpy(labels)


def by_hand(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    chance = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    truth, images, classes = labels.tolist(), len(labels), logits.shape[1]
    predicted = [int(row.argmax()) for row in chance]
    recalls = []
    for k in set(truth):
        own = [p for p, y in zip(predicted, truth, strict=True) if y == k]
        recalls.append(sum(p == k for p in own) / len(own))
    error = 0.0
    for b in range(BINS):
        inside = [n for n in range(images) if b / BINS < chance[n].max() <= (b + 1) / BINS]
        if inside:
            right = sum(predicted[n] == truth[n] for n in inside) / len(inside)
            confidence = sum(chance[n].max() for n in inside) / len(inside)
            error += len(inside) / images * abs(right - confidence)
    top = sum(truth[n] in np.argsort(-chance[n])[:5] for n in range(images)) / images
    return {
        "accuracy": sum(p == y for p, y in zip(predicted, truth, strict=True)) / images,
        "balanced_accuracy": sum(recalls) / len(recalls),
        "top5_accuracy": top if classes > 5 else None,
        "expected_calibration_error": error,
        "loss": sum(-math.log(chance[n][truth[n]]) for n in range(images)) / images,
    }


@pytest.mark.parametrize(("images", "classes"), [(200, 9), (30, 3), (1, 6)])
def test_the_figures_are_those_of_the_formulas(images, classes):
    logits, labels = drawn(images, classes)
    metric = ClassificationScores(classes)
    for part in torch.split(torch.arange(images), 7):  # in batches, as they come
        metric.add_batch(predictions=logits[part], references=labels[part])
    scores, expected = metric.compute(), by_hand(logits, labels)
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == (value if value is None else pytest.approx(value, rel=1e-12, abs=1e-12)), name  # type: ignore[literal-required]
    assert metric.compute(predictions=logits[:1], references=labels[:1])["accuracy"] in (0.0, 1.0)  # it began anew


def test_tallies_of_two_processes_are_one():
    logits, labels = drawn(50, 7)
    whole, parts = Tally(7), [Tally(7), Tally(7)]
    whole.add(logits, labels)
    for part, rows in zip(parts, (slice(0, 20), slice(20, None)), strict=True):
        part.add(logits[rows], labels[rows])
    together = Tally.of(parts[0].vector() + parts[1].vector(), 7)
    assert together.scores() == pytest.approx(whole.scores(), rel=1e-12)


def test_a_bin_holds_its_upper_edge():
    """Confidence 0.6 of two classes is 9 / 15 to rounding: it belongs to the ninth bin, not the tenth."""
    tally = Tally(2)
    tally.add(torch.tensor([[0.6, 0.4], [0.999999, 0.000001]], dtype=torch.float64).log(), torch.tensor([0, 1]))
    assert tally.bins_3B[0].nonzero()[0].tolist() == [8, 14]
    assert tally.scores()["expected_calibration_error"] == pytest.approx((0.4 + 0.999999) / 2)


def test_each_class_by_hand():
    confusion = np.array([[3, 1, 0], [2, 2, 0], [0, 0, 0]])
    found = class_figures(confusion, {0: "cat", 1: "dog", 2: "owl"})
    assert found["cat"] == {"recall": 3 / 4, "precision": 3 / 5, "f1": 6 / 9, "images": 4}
    assert found["dog"] == {"recall": 2 / 4, "precision": 2 / 3, "f1": 4 / 7, "images": 4}
    assert found["owl"] == {"recall": None, "precision": None, "f1": None, "images": 0}


def test_nothing_is_no_score():
    with pytest.raises(UserError, match="no image was evaluated"):
        ClassificationScores(3).compute()
    with pytest.raises(UserError, match="belong together"):
        ClassificationScores(3).compute(predictions=torch.zeros(1, 3))
