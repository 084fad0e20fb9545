"""MeanIoU against an independent plain implementation of the published formula, and its own promises."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dbp.downstream.segmentation import mean_iou
from hf_dbp.downstream.segmentation.mean_iou import MeanIoU, confusion_matrix


def published_scores(predictions, references, num_labels, ignore_index):
    """Sums of three histograms per image: intersection, predicted area, true area."""
    hits, predicted, true = (np.zeros(num_labels) for _ in range(3))
    for prediction, reference in zip(predictions, references, strict=True):
        for k in range(num_labels):
            counted = reference != ignore_index
            hits[k] += np.sum((prediction == k) & (reference == k) & counted)
            predicted[k] += np.sum((prediction == k) & counted)
            true[k] += np.sum((reference == k) & counted)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, accuracy = hits / (predicted + true - hits), hits / true
    return {
        "mean_iou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "overall_accuracy": hits.sum() / true.sum(),
        "per_category_iou": iou,
        "per_category_accuracy": accuracy,
    }


def assert_same_scores(scores, expected):
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(scores[name], value, rtol=0, atol=1e-9, equal_nan=True, err_msg=name)


def random_maps(rng, num_labels, ignore_index, shapes, dtype=np.int64):
    references = [rng.integers(0, num_labels, shape).astype(dtype) for shape in shapes]
    predictions = [
        np.where(rng.random(r.shape) < 0.6, r, rng.integers(0, num_labels, r.shape)).astype(dtype) for r in references
    ]
    for reference in references:
        reference[rng.random(reference.shape) < 0.1] = ignore_index
    return predictions, references


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_labels=st.sampled_from([1, 2, 5, 150, 255, 256, 300]),
    ignore_index=st.sampled_from([-100, 0, 3, 255, 400]),
    images=st.integers(1, 3),
)
def test_equals_the_published_formula(seed, num_labels, ignore_index, images):
    rng = np.random.default_rng(seed)
    shapes = [tuple(rng.integers(1, 20, 2)) for _ in range(images)]
    predictions, references = random_maps(rng, num_labels, ignore_index, shapes)
    references[0][0, 0] = num_labels - 1 if ignore_index != num_labels - 1 else max(0, num_labels - 2)
    if all((r == ignore_index).all() for r in references):
        return
    metric = MeanIoU(num_labels, ignore_index, allow_ignored_class=True)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert_same_scores(metric.compute(), published_scores(predictions, references, num_labels, ignore_index))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_dtype_tensor_and_batching_make_no_difference(dtype):
    predictions, references = random_maps(
        np.random.default_rng(0), 21, 255 if dtype != np.int16 else 99, [(600, 500)] * 3, dtype
    )
    ignore_index = 255 if dtype != np.int16 else 99
    one_call = MeanIoU(21, ignore_index).compute(predictions=np.stack(predictions), references=np.stack(references))
    assert_same_scores(one_call, published_scores(predictions, references, 21, ignore_index))
    if dtype != np.uint16:
        tensors = [[torch.from_numpy(m) for m in maps] for maps in (predictions, references)]
        assert_same_scores(MeanIoU(21, ignore_index).compute(predictions=tensors[0], references=tensors[1]), one_call)


@pytest.mark.parametrize("threads", [1, 3])
def test_layout_byte_order_and_threads_make_no_difference(threads, monkeypatch):
    """Several pieces of a map and several rounds of pieces; predictions and references are stored differently."""
    monkeypatch.setattr(mean_iou, "_AT_ONCE", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    predictions, references = random_maps(np.random.default_rng(0), 21, 255, [(700, 500)] * 3)
    expected = confusion_matrix(predictions, references, 21, 255)
    assert expected.sum() == sum(np.count_nonzero(reference != 255) for reference in references)
    for reference in references:
        reference.flags.writeable = False
    for store in (
        lambda ids: ids.astype(">i8"),
        lambda ids: ids.astype(">u2"),
        lambda ids: ids.astype("uint8"),
        lambda ids: np.repeat(ids, 2, axis=1)[:, ::2],
        np.asfortranarray,
        lambda ids: ids.astype("uint64"),
    ):
        np.testing.assert_array_equal(confusion_matrix(list(map(store, predictions)), references, 21, 255), expected)
        np.testing.assert_array_equal(confusion_matrix(predictions, list(map(store, references)), 21, 255), expected)
    predictions[2][-1, -1] = 21  # in the last piece alone
    with pytest.raises(ValueError, match=r"prediction holds ids \[21\] outside"):
        confusion_matrix(predictions, [np.zeros_like(ids) for ids in references], 21, 255)


def test_a_forked_process_counts_with_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    maps = np.zeros((4, 512, 512), np.uint8)
    expected = confusion_matrix(maps, maps, 2, 255)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(confusion_matrix(maps, maps, 2, 255)))
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert (queue.get() == expected).all()


def test_no_maps_are_no_counts():
    assert not confusion_matrix([], [], 2, 255).any()


def test_absent_classes_are_left_out_of_the_mean():
    scores = MeanIoU(4).compute(predictions=np.array([[[0, 0, 1, 1]]]), references=np.array([[[0, 0, 0, 1]]]))
    assert scores["mean_iou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert np.isnan(scores["per_category_iou"][2:]).all()


def test_compute_starts_anew():
    metric = MeanIoU(2)
    wrong, right = np.zeros((1, 4, 4), dtype=int), np.ones((1, 4, 4), dtype=int)
    assert metric.compute(predictions=wrong, references=right)["overall_accuracy"] == 0
    assert metric.compute(predictions=right, references=right)["overall_accuracy"] == 1


def test_ignore_index_that_is_a_class_is_refused_unless_asked_for():
    with pytest.raises(ValueError, match="ignore_index 0 is also a class id"):
        MeanIoU(3, ignore_index=0)
    assert MeanIoU(3, ignore_index=0, allow_ignored_class=True).ignore_index == 0


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (np.zeros((1, 4, 4), int), np.full((1, 4, 4), 7), r"reference holds ids \[7\] outside the classes 0..2"),
        (np.full((1, 4, 4), 3), np.zeros((1, 4, 4), int), r"prediction holds ids \[3\] outside"),
        (np.full((1, 4, 4), -1), np.zeros((1, 4, 4), int), r"prediction holds ids \[-1\] outside"),
        (np.full((1, 4, 4), 256), np.zeros((1, 4, 4), int), r"prediction holds ids \[256\] outside"),
        (np.full((1, 4, 4), -254), np.zeros((1, 4, 4), int), r"prediction holds ids \[-254\] outside"),
        (np.full((1, 4, 4), 2**40 + 1), np.zeros((1, 4, 4), int), r"prediction holds ids \[1099511627777\] outside"),
        (np.zeros((1, 4, 4), int), np.zeros((1, 4, 5), int), "resize the logits"),
        (np.zeros((2, 4, 4), int), np.zeros((1, 4, 4), int), "2 predictions but 1 references"),
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 4), int), "prediction holds float64"),
        (torch.zeros((1, 4, 4), dtype=torch.bfloat16), np.zeros((1, 4, 4), int), "prediction holds float32"),
        (np.full((1, 4, 4), 2**64 - 1, np.uint64), np.zeros((1, 4, 4), int), r"holds ids \[18446744073709551615\]"),
        (np.zeros((1, 4, 4), int), np.full((1, 4, 4), 255), "no labelled pixel"),
    ],
)
def test_wrong_maps_are_refused_with_the_remedy(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(3).compute(predictions=predictions, references=references)


def test_any_prediction_is_forgiven_where_the_reference_is_void():
    confusion = confusion_matrix(np.array([[[0, 99, 300]]]), np.array([[[0, 255, 255]]]), 2, 255)
    assert confusion.tolist() == [[1, 0], [0, 0]]


def _one_process(process_id, cache_dir, maps, queue, barrier):
    metric = MeanIoU(7, num_process=2, process_id=process_id, cache_dir=cache_dir, experiment_id="two", timeout=60)
    for _ in range(2):  # a second evaluation: nothing of the first may be left
        for prediction, reference in list(zip(*maps, strict=True))[process_id::2]:
            metric.add(prediction=prediction, reference=reference)
        queue.put((process_id, metric.compute()))
        barrier.wait()


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path: Path):
    maps = random_maps(np.random.default_rng(1), 7, 255, [(20, 30)] * 5)
    expected = MeanIoU(7).compute(predictions=maps[0], references=maps[1])
    context = multiprocessing.get_context("spawn")
    queue, barrier = context.Queue(), context.Barrier(2)
    workers = [context.Process(target=_one_process, args=(i, str(tmp_path), maps, queue, barrier)) for i in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in range(4)]
    for worker in workers:
        worker.join()
    for process_id, scores in results:
        if process_id == 0:
            assert_same_scores(scores, expected)
        else:
            assert scores is None
