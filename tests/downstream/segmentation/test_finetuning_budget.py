"""Fine-tuning takes a budget of time as pre-training does."""

import json
from types import SimpleNamespace

import pytest

from hf_dbp.downstream import finetuning as shared
from hf_dbp.downstream.segmentation import finetuning
from hf_dbp.training import budget

FLAGS = [
    *("wire_bonding", "--built_in_size", "48", "--max_train_samples", "8", "--max_eval_samples", "3"),
    *("--crop_size", "32", "--long_edge", "40", "--head_size", "8", "--auxiliary_head_size", "8"),
    *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2", "--learning_rate", "1e-3"),
    *("--use_cpu", "--report_to", "none", "--disable_tqdm", "1", "--logging_steps", "1"),
]


@pytest.mark.slow
def test_fine_tuning_ends_in_time_along_the_schedule(vit, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def look():
        clock.now += 0.1
        return clock.now

    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=look))
    monkeypatch.setattr(shared, "command_began", lambda: clock.now)
    vit(num_channels=2).save_pretrained(tmp_path / "vit")
    where = ["--model_name_or_path", str(tmp_path / "vit"), "--output_dir", str(tmp_path / "out")]
    record = finetuning.main([*FLAGS, *where, "--budget", "20s"])
    assert record["budget"]["seconds"] == 20
    assert 0.9 * 20 <= clock.now <= 1.05 * 20
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    rates = [row["learning_rate"] for row in state["log_history"] if "learning_rate" in row]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1e-3, rel=0.1)
    assert rates[0] < 0.5e-3 and peak < 0.3 * len(rates)
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and rates[-1] < 0.2e-3
    assert 2 <= len(record["evaluations"]) <= 4
