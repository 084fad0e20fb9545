"""Numerical trouble: eta outside its stable range, and what is not finite."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_pretraining import flags
from torch import Tensor

from hf_dbp.callbacks import ShareCounts
from hf_dbp.conversion import decorrelated_layers
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining
from hf_dbp.pretraining import main
from hf_dbp.records import RunRecord
from hf_dbp.training.guards import first_non_finite_output
from hf_dbp.training.trainer import MAETrainer
from hf_dbp.update import measure_decorrelation, seed_sampling, update_decorrelation

PAPER_ETA = 5e-4
NOTHING = {"skipped_steps": 0, "skipped": [], "reduced_eta": {}, "skipped_R": {}}
LAYER = "vit.layers.1.mlp.fc1"
NAN = float("nan")


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
@pytest.mark.slow
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
        assert record.results["guards"] == NOTHING
        states.append(DBPViTMAEForPreTraining.from_pretrained(folder).state_dict())
    assert any("decorrelation.R" in name for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_only_an_eta_that_is_often_reduced_is_worth_a_warning(caplog) -> None:
    """Told once per affected layer, however long it goes on; the counts are there from the first."""
    caplog.set_level(logging.WARNING, logger="hf_dbp")
    counts = ShareCounts()
    for step in range(200):
        early, half = torch.tensor(0.125 if step < 10 else 1.0), torch.tensor(0.25 if step % 2 else 1.0)
        counts.add({"early": early, "half": half, "never": torch.tensor(1.0)})
        logged = counts.logs()
        assert ("eta is too large for 1 layers, most often for half" in caplog.text) == (step >= 21)
    assert logged["reduced_eta_layers"] == 2 and logged["reduced_eta_steps"] == 110
    assert len(caplog.records) == 1 and "by a factor of up to 4." in caplog.text


def test_an_expert_is_judged_by_its_own_updates(caplog) -> None:
    """It sees tokens in one of 16 steps, and eta is reduced in all of those."""
    counts = ShareCounts()
    for step in range(200):
        counts.add({"dense": torch.tensor(1.0)} | ({} if step % 16 else {"expert": torch.tensor(0.5)}))
        counts.logs()
    assert "most often for expert" in caplog.text and len(caplog.records) == 1


@pytest.mark.slow
def test_a_reduced_eta_is_told_and_counted_over_a_resume(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="hf_dbp")
    settings = {"eta": 0.9, "update_interval": 2, "eta_schedule": "constant", "logging_steps": 2, "num_train_epochs": 2}
    whole = main(flags(tmp_path / "whole", **settings)).results["guards"]["reduced_eta"]
    assert "eta is too large for" not in caplog.text  # six updates of it are no reason for a warning
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


def contents(trainer) -> dict[str, bytes]:
    """Weights, R, buffers and the optimizer's state, to the bit."""
    found = {name: tensor.numpy().tobytes() for name, tensor in trainer.model.state_dict().items()}
    state = trainer.optimizer.state_dict()
    for part in (state["muon"], state["adamw"]) if "muon" in state else (state,):
        for index, values in part["state"].items():
            found |= {f"{len(found)} {index} {key}": value.numpy().tobytes() for key, value in values.items()}
    return found


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.fixture
def injected(monkeypatch):
    """``injected(where, steps)``: a NaN there at these steps (from 0); what there was before each step."""

    def inject(where: str, steps: set[int]) -> list[dict[str, bytes]]:
        seen, kept = [], []
        training_step = MAETrainer.training_step

        def step(self, model, inputs, *args, **kwargs):
            layer = model.get_submodule(LAYER)
            bad = self.state.global_step in steps
            if kept:
                layer.decorrelation.R.copy_(kept.pop())
            seen.append(contents(self))
            if bad and where == "batch":
                inputs["pixel_values"][1, 0, 3, 4] = NAN
            if bad and where == "R":
                kept.append(layer.decorrelation.R.clone())
                layer.decorrelation.R[2, 3] = NAN
            hooks = [layer.weight.register_hook(lambda grad: grad * NAN)] if bad and where == "gradient" else []
            loss = training_step(self, model, inputs, *args, **kwargs)
            if bad and where == "rows":
                layer.decorrelation.rows[0, 1] = NAN
            for hook in hooks:
                hook.remove()
            return loss

        monkeypatch.setattr(MAETrainer, "training_step", step)
        return seen

    return inject


@pytest.mark.parametrize(
    ("where", "optimizer", "cause", "layer"),
    [
        ("batch", "adamw", "loss", "the batch's pixel_values"),
        ("batch", "muon", "loss", "the batch's pixel_values"),
        ("gradient", "adamw", "gradient", f"{LAYER}.weight"),
        ("gradient", "muon", "gradient", f"{LAYER}.weight"),
        ("R", "adamw", "loss", f"{LAYER}.decorrelation.R, which is not finite itself"),
        ("rows", "adamw", "R", LAYER),
    ],
)
def test_a_nan_is_caught_at_its_step_and_spreads_nowhere(
    tmp_path, caplog, injected, where, optimizer, cause, layer
) -> None:
    before = injected(where, {1, 4})
    record = main(flags(tmp_path, optimizer=optimizer, num_train_epochs=2, max_grad_norm=1.0))
    after_rows = where == "rows"  # of which the next step tells
    rows = [{"step": step + after_rows, "skipped": cause, "layer": layer} for step in (2, 5)]
    guards = record.results["guards"]
    assert guards["skipped"] == rows
    assert guards["skipped_steps"] == 2
    assert guards["skipped_R"] == ({LAYER: 2} if after_rows else {})
    assert f"first in {layer}" in caplog.text
    for step in range(5):
        differing = changed(before[step], before[step + 1])
        if after_rows and step in (1, 4):
            assert f"{LAYER}.decorrelation.R" not in differing
            assert f"{LAYER}.weight" in differing
        else:
            assert bool(differing) == (step not in (1, 4)), step
    assert all(value.isfinite().all() for value in DBPViTMAEForPreTraining.from_pretrained(tmp_path).parameters())
    logged = [row for row in json.loads((tmp_path / "trainer_state.json").read_text())["log_history"] if "loss" in row]
    assert [row.get("skipped_steps") for row in logged] == [1, 2]
    assert all(0 < row["loss"] < 10 for row in logged)
    assert all(0 < row["train_loss"] < 10 for row in record.rows)


def test_steps_that_are_skipped_do_not_count_in_the_training_loss(tmp_path, injected) -> None:
    """Two of the first three steps, when there is no finite loss yet."""
    injected("batch", {0, 1})
    (row,) = main(flags(tmp_path, num_train_epochs=1)).rows
    assert row["train_loss"] == pytest.approx(row["eval_loss"], rel=0.3)


def test_five_in_a_row_stop_the_run_and_leave_good_checkpoints(tmp_path, capsys, injected) -> None:
    before = injected("R", set(range(2, 12)))
    with pytest.raises(SystemExit) as stop:
        main(flags(tmp_path))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "5 steps in a row up to step 7 had a loss that is not finite" in error
    assert f"first in {LAYER}.decorrelation.R" in error
    assert "lower --learning_rate" in error
    assert not changed(before[2], before[6])
    results = RunRecord.read(tmp_path / "run.json").results
    assert results["guards"]["skipped_steps"] == 5
    assert results["stopped"] in error
    assert "finished" not in results


def test_a_skipped_step_now_and_then_is_counted_over_a_resume(tmp_path, injected) -> None:
    """Never two in a row, so that even a limit of 2 is not reached."""
    injected("batch", {0, 2, 4})
    settings = {"num_train_epochs": 2, "max_skipped_steps": 2}
    whole = main(flags(tmp_path, **settings)).results["guards"]
    assert [row["step"] for row in whole["skipped"]] == [1, 3, 5]
    for file in (tmp_path / "checkpoint-6").iterdir():
        file.unlink()
    (tmp_path / "checkpoint-6").rmdir()
    assert main(flags(tmp_path, **settings)).results["guards"] == whole


def test_the_first_layer_is_found_and_the_model_left_as_it_was(mae_config) -> None:
    model = DBPViTMAEForPreTraining(mae_config()).train()
    model.decoder.eval()
    modes = [module.training for module in model.modules()]
    batch = {"pixel_values": images("correlated"), "noise": torch.rand(16, 16)}
    assert first_non_finite_output(model, batch) is None
    with torch.no_grad():
        model.vit.layers[1].attention.o_proj.bias.fill_(3e38).mul_(10)
    assert first_non_finite_output(model, batch) == "vit.layers.1.attention.o_proj"
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
def test_processes_decide_alike(tmp_path) -> None:
    """The loss of one process alone is infinite, the gradients are not: both skip, with equal weights."""
    script = Path(__file__).with_name("guarded_process.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--standalone", str(script), str(tmp_path)]  # fmt: skip
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert finished.returncode == 0, finished.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["skipped"] == [{"step": 3, "skipped": "loss", "layer": "another process"}]
    assert second["skipped"] == [{"step": 3, "skipped": "loss", "layer": "the loss itself"}]
    for found in (first, second):
        assert torch.equal(found["weights"][2], found["weights"][3])
        assert not torch.equal(found["weights"][3], found["weights"][4])
    assert torch.equal(first["weights"], second["weights"])


def test_a_limit_that_cannot_be_is_refused(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(flags(tmp_path, max_skipped_steps=0))
    assert "--max_skipped_steps is a number of steps, at least 1, got 0" in capsys.readouterr().err
