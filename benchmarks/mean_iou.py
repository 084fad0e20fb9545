"""Speed and memory of MeanIoU compared with the published algorithm (three histograms per image), both in one run.

    python benchmarks/mean_iou.py [--output mean_iou.json]

Label maps are int64, 512 x 512, 150 classes. Memory: growth of the process's peak while 2,000 maps stream through
`add`. Speed: both count the same new batches of eight maps in turns; medians over the batches.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_dbp.downstream.segmentation.mean_iou import MeanIoU

CLASSES, IGNORED, SIDE = 150, 255, 512
LabelMap = npt.NDArray[np.int64]


def label_maps(rng: np.random.Generator, count: int) -> Iterator[tuple[LabelMap, LabelMap]]:
    """Yield (prediction, reference): regions of 32 x 32 pixels, 30 % of the pixels predicted wrong, 2 % void."""
    for _ in range(count):
        reference = np.kron(rng.integers(0, CLASSES, (16, 16)), np.ones((SIDE // 16, SIDE // 16), dtype=np.int64))
        wrong = rng.random(reference.shape) < 0.3
        prediction = np.where(wrong, rng.integers(0, CLASSES, reference.shape), reference)
        reference[:10] = IGNORED
        yield prediction, reference


class PublishedMeanIoU:
    """The published algorithm, step by step: per image its copies, its mask (made twice) and three histograms."""

    def __init__(self) -> None:
        self.areas = np.zeros((3, CLASSES))

    def add(self, prediction: LabelMap, reference: LabelMap) -> None:
        predicted, true = np.array(prediction), np.array(reference)
        counted = true != IGNORED
        counted = np.not_equal(true, IGNORED)
        predicted, true = predicted[counted], np.array(true)[counted]
        for row, ids in enumerate((predicted[predicted == true], predicted, true)):
            self.areas[row] += np.histogram(ids, bins=CLASSES, range=(0, CLASSES - 1))[0]

    def mean_iou(self) -> float:
        hits, predicted, true = self.areas
        return float(np.nanmean(hits / (predicted + true - hits)))


def peak_growth_mb(count: int) -> float:
    """Stream `count` maps through a metric; return by how much the process's peak memory rose, in MB."""
    rng, metric = np.random.default_rng(0), MeanIoU(CLASSES, IGNORED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for prediction, reference in label_maps(rng, count):
        metric.add(prediction=prediction, reference=reference)
    metric.compute()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def speed(rounds: int = 40, batch: int = 8) -> dict[str, Any]:
    """Both metrics count each new batch of maps, taking turns in going first."""
    rng, ours, published = np.random.default_rng(1), MeanIoU(CLASSES, IGNORED), PublishedMeanIoU()
    times: dict[str, list[float]] = {"published": [], "ours": []}
    for turn in range(rounds):
        predictions, references = zip(*label_maps(rng, batch), strict=True)

        def run_published(predictions: Any = predictions, references: Any = references) -> None:
            for prediction, reference in zip(predictions, references, strict=True):
                published.add(prediction, reference)

        def run_ours(predictions: Any = predictions, references: Any = references) -> None:
            ours.add_batch(predictions=predictions, references=references)

        runs = [("published", run_published), ("ours", run_ours)]
        for name, run in runs if turn % 2 else reversed(runs):
            times[name].append(seconds(run) / batch * 1e3)
    scores = ours.compute()
    assert scores is not None
    published_ms, ours_ms = (statistics.median(times[name]) for name in ("published", "ours"))
    return {
        "published_ms_per_map": published_ms,
        "ours_ms_per_map": ours_ms,
        "times_faster": published_ms / ours_ms,
        "mean_iou_difference": abs(scores["mean_iou"] - published.mean_iou()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    output = parser.parse_args().output
    setting = {"maps": f"int64 {SIDE} x {SIDE}", "classes": CLASSES, "threads": torch.get_num_threads()}
    result = {**setting, "machine": platform.machine(), "peak_growth_mb_2000_maps": peak_growth_mb(2000), **speed()}
    for name, value in result.items():
        print(f"{name:>26}  {value:.4g}" if isinstance(value, float) else f"{name:>26}  {value}")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
