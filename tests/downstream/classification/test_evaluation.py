"""What is written and printed of many classes."""

from pathlib import Path

import numpy as np

from hf_dbp.downstream.classification.evaluation import PRINTED, WHOLE, confusion, summary


def test_few_classes_have_a_matrix_and_many_its_entries():
    counts = np.zeros((WHOLE, WHOLE))
    counts[3, 4] = 2
    assert confusion(counts)["images"][3][4] == 2
    more = np.zeros((WHOLE + 1, WHOLE + 1))
    more[3, 4], more[100, 100] = 2, 7
    assert confusion(more) == {"entries": [[3, 4, 2], [100, 100, 7]]}


def test_of_many_classes_the_worst_are_printed():
    none = {"class 100": {"recall": None, "precision": None, "f1": None, "images": 0}}
    scores = {f"class {k}": {"recall": k / 100, "precision": 0.5, "f1": 0.5, "images": 4} for k in range(100)}
    record = {
        "accuracy": 0.5, "accuracy_interval_95": [0.4, 0.6], "majority_class_accuracy": 0.01, "balanced_accuracy": 0.5,
        "expected_calibration_error": 0.1, "loss": 1.0, "per_class": none | dict(reversed(scores.items())),
        "train_seconds": 1.0, "kwh": 0.0, "co2e_kg": 0.0, "asked_used": {}, "arguments": {}, "evaluations": [],
        "data": {"source": "x"},
        "best_checkpoint": None,
    }  # fmt: skip
    lines = summary(record, Path("run")).splitlines()
    shown = [line.split("  ")[2] for line in lines if line.startswith("    class")]
    assert shown == [f"class {k}" for k in range(PRINTED)]
    assert any(f"the {PRINTED} of 101 classes with the lowest recall" in line for line in lines)
    few = record | {"per_class": dict(list(scores.items())[::-1][:3])}
    shown = [line.split("  ")[2] for line in summary(few, Path("run")).splitlines() if line.startswith("    class")]
    assert shown == ["class 99", "class 98", "class 97"]
    assert not any("(best)" in line for line in lines)
    assert "  model (best)," in summary(record | {"best_checkpoint": "run/checkpoint-2"}, Path("run"))
