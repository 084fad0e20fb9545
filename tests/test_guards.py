"""Numerical trouble: eta outside its stable range, and what is not finite."""

import json
import logging

import pytest
import torch
from test_pretraining import flags
from torch import Tensor

from hf_dbp.conversion import decorrelated_layers
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining
from hf_dbp.pretraining import main
from hf_dbp.update import measure_decorrelation, seed_sampling, update_decorrelation

PAPER_ETA = 5e-4


def images(kind: str, count: int = 16) -> Tensor:
    """A batch as the processor gives it: black is about -2."""
    black = torch.full((count, 3, 32, 32), -2.0)
    if kind == "black":
        return black
    if kind == "one_pixel":
        for image, row, column in zip(black, *torch.randint(32, (2, count)).tolist(), strict=True):
            image[:, row, column] = 2.0
        return black
    if kind == "constant":
        return torch.randn(count, 3, 1, 1).expand(-1, -1, 32, 32)
    assert kind == "correlated"
    coarse = 2 * torch.randn(count, 1, 4, 4).expand(-1, 3, -1, -1)
    return torch.nn.functional.interpolate(coarse, size=(32, 32)) + 0.05 * torch.randn(count, 3, 32, 32)


def train(model: DBPViTMAEForPreTraining, kind: str, *, eta: float, bound: bool, steps: int) -> list[dict[str, Tensor]]:
    """A hand-written loop; per step the loss, the worst decorrelation loss of a layer and the smallest share of eta."""
    optimizer, rows = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), []
    for step in range(steps):
        seed_sampling(model, seed=0, step=step)
        loss = model(images(kind)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        worst = torch.stack([decorrelation_loss for decorrelation_loss, _ in measure_decorrelation(model).values()])
        shares = torch.stack(list(update_decorrelation(model, eta=eta, bound=bound).values()))
        rows.append({"loss": loss.detach(), "decorrelation_loss": worst.max(), "share": shares.min()})
        if not loss.isfinite():
            break
    return rows


@pytest.mark.parametrize("kind", ["black", "one_pixel", "constant", "correlated"])
def test_an_eta_100_times_too_large_trains_on_and_would_diverge_without_the_bound(mae_config, kind) -> None:
    for bound in (True, False):
        torch.manual_seed(0)
        model = DBPViTMAEForPreTraining(mae_config()).train()
        rows = train(model, kind, eta=100 * PAPER_ETA, bound=bound, steps=40)
        first, highest, last = (rows[0]["decorrelation_loss"], max(row["decorrelation_loss"] for row in rows), rows[-1])
        assert all(row["loss"].isfinite() for row in rows)
        assert all(layer.decorrelation.R.isfinite().all() for _, layer in decorrelated_layers(model))
        if bound:
            assert highest == first
            assert last["decorrelation_loss"] < 0.2 * first
            losses = torch.stack([row["loss"] for row in rows])
            assert losses[-15:].mean() < losses[:15].mean()
            assert 0 < min(row["share"] for row in rows) < 0.5
        else:
            assert highest > 1e6 * first


def test_at_the_papers_eta_the_bound_changes_no_bit(tmp_path) -> None:
    states = []
    for bound in ("true", "false"):
        folder = tmp_path / bound
        record = main(flags(folder, bound_eta=bound, num_train_epochs=2, eta_schedule="constant", eta=PAPER_ETA))
        assert record.results["guards"] == {"reduced_eta": {}, "skipped_R": {}}
        states.append(DBPViTMAEForPreTraining.from_pretrained(folder).state_dict())
    assert any("decorrelation.R" in name for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_reduced_eta_is_told_and_counted_over_a_resume(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="hf_dbp")
    settings = {"eta": 0.9, "update_interval": 2, "eta_schedule": "constant", "logging_steps": 2, "num_train_epochs": 2}
    whole = main(flags(tmp_path / "whole", **settings)).results["guards"]["reduced_eta"]
    assert "eta is too large for" in caplog.text
    main(flags(tmp_path / "half", **settings))
    for file in (tmp_path / "half" / "checkpoint-6").iterdir():
        file.unlink()
    (tmp_path / "half" / "checkpoint-6").rmdir()
    resumed = main(flags(tmp_path / "half", **settings))
    assert resumed.results["guards"]["reduced_eta"] == whole
    layer = whole["vit.embeddings.patch_embeddings.projection"]
    assert 1 <= layer["steps"] <= 3
    assert layer["largest_factor"] > 1
    state = json.loads((tmp_path / "half" / "trainer_state.json").read_text())
    logged = [row for row in state["log_history"] if "loss" in row][-1]
    assert logged["reduced_eta_layers"] == len(whole)
    assert logged["reduced_eta_largest_factor"] == max(layer["largest_factor"] for layer in whole.values())
