"""Image-level detection, against scikit-learn; and the worst images."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score, roc_auc_score, roc_curve

from hf_dbp.downstream.segmentation.detection import ImageFigures, detection, image_figures, worst_images
from hf_dbp.downstream.segmentation.inference import ImageCounts


def figures(scores, holds_any, mean_ious=None):
    ious = mean_ious or [0.5] * len(scores)
    rows = enumerate(zip(scores, holds_any, ious, strict=True))
    return [ImageFigures(index, float(score), bool(any_), 0.9, iou) for index, (score, any_, iou) in rows]


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**31), positive=st.integers(1, 40), negative=st.integers(1, 40),
    recall=st.integers(1, 100).map(lambda percent: percent / 100), levels=st.sampled_from([3, 10, 10**6]),
)  # fmt: skip
@example(seed=0, positive=25, negative=5, recall=0.56, levels=10**6)  # 0.56 * 25 is above 14
def test_roc_auc_and_threshold_are_those_of_scikit_learn(seed, positive, negative, recall, levels):
    """Ties included: few levels of the score."""
    rng = np.random.default_rng(seed)
    holds_any = np.repeat([True, False], (positive, negative))
    scores = rng.integers(0, levels, positive + negative) / levels + 0.2 * holds_any
    found = detection(figures(scores, holds_any), recall)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(holds_any, scores), abs=1e-12)
    alarms, recalls, thresholds = roc_curve(holds_any, scores, drop_intermediate=False)
    best = np.argmax(recalls >= recall)  # thresholds fall: the first is the highest
    assert (found["threshold"], found["recall"]) == (thresholds[best], recalls[best])
    assert found["false_alarms"] == pytest.approx(alarms[best])
    predicted = scores >= found["threshold"]
    assert found["recall"] == pytest.approx(recall_score(holds_any, predicted))
    assert found["precision"] == pytest.approx(precision_score(holds_any, predicted))
    assert (found["images_with_any"], found["images_without"]) == (positive, negative)


@pytest.mark.parametrize("kind", [True, False])
def test_one_kind_of_images_decides_nothing(kind):
    assert detection(figures([0.1, 0.9], [kind, kind])) is None


def test_the_figures_of_an_image_follow_from_its_counts():
    """Which images hold a defect, what share is right, and the mean over the classes that are there or predicted."""
    counts = {
        3: ImageCounts(np.array([6, 1, 0]), np.array([8, 2, 0]), np.array([7, 3, 0]), 0.7),
        1: ImageCounts(np.array([4, 0, 0]), np.array([4, 0, 0]), np.array([4, 0, 0]), 0.2),
        2: ImageCounts(np.zeros(3, int), np.zeros(3, int), np.zeros(3, int), 0.1),
    }
    good, empty, bad = image_figures(counts)
    assert (good.index, good.holds_any, good.right, good.mean_iou, good.score) == (1, False, 1.0, 1.0, 0.2)
    assert (empty.index, empty.right, empty.mean_iou) == (2, None, None)
    assert (bad.index, bad.holds_any, bad.right) == (3, True, 0.7)
    assert bad.mean_iou == pytest.approx((6 / 9 + 1 / 4) / 2)


def test_the_worst_images_come_first_and_unlabelled_ones_not_at_all():
    ious = [0.4, None, 0.1, 0.4, 0.9, 0.2]
    found = worst_images(figures([0.5] * 6, [True] * 6, ious), 4)
    assert [image.index for image in found] == [2, 5, 0, 3]
