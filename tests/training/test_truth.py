"""What a run says is true of what it leaves: figures of the weights, learning rates, batches, folders, logs."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from test_callbacks import mae_trainer
from test_pretraining import flags
from test_resuming import at_step, send
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_dbp.callbacks import DecorrelationArguments, DecorrelationCallback
from hf_dbp.conversion import decorrelated_layers
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining
from hf_dbp.pretraining import main
from hf_dbp.training import clocked
from hf_dbp.training.disk import SharedMemoryFull, disk_errors
from hf_dbp.training.guards import GuardCallback, NonFiniteError
from hf_dbp.training.resuming import ResumingTrainer
from hf_dbp.training.saving import rotate, whole_checkpoints
from hf_dbp.training.trainer import MAETrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "downstream" / "segmentation"))
from segmentation_runs import trainer as segmentation_trainer


class NoMeter:
    """Measures nothing, at once."""

    description = dict.fromkeys(("country", "cpu", "cpu_model", "ram", "gpu", "scope", "codecarbon"), "none")
    description |= {"carbon_intensity_g_per_kwh": 500.0}

    def start(self):
        """A segment begins."""

    def stop(self):
        return 0.0


@pytest.fixture(autouse=True)
def no_meter(monkeypatch):
    """Power counters have nothing to do with what is tested here."""
    monkeypatch.setattr(clocked, "EnergyMeter", lambda *_: NoMeter())


def steps(**changed):
    return {"eval_strategy": "steps", "save_strategy": "steps", "num_train_epochs": None, "logging_steps": 1} | changed


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def rates(folder):
    return [row["learning_rate"] for row in history(folder) if "learning_rate" in row]


def measured(folder, tmp_path, **data):
    """The validation loss of the weights in a folder, found by a separate command."""
    main(flags(tmp_path / "again", do_train=None, model_name_or_path=folder, config_overrides=None, **data))
    return json.loads((tmp_path / "again" / "eval_results.json").read_text())["eval_loss"]


# ---- the figure of the weights ----

#: a learning rate that ruins the model in the end, so that best, last and lowest differ
RUINS = {"learning_rate": 60.0, "warmup_steps": 1000}


@pytest.mark.parametrize(
    "settings",
    [
        steps(max_steps=12, eval_steps=1, save_steps=6, **RUINS),
        steps(max_steps=6, eval_steps=2, save_steps=2, load_best_model_at_end=False, **RUINS),
        steps(max_steps=5, eval_steps=3, save_steps=3, eval_on_start=True, **RUINS),
        steps(max_steps=5, eval_strategy="no", save_strategy="no"),
        steps(max_steps=6, eval_steps=2, save_steps=2, optim="schedule_free_adamw", lr_scheduler_type="constant"),
    ],
    ids=["saved less often", "the last", "from the start", "never evaluated", "schedule-free"],
)
def test_the_published_loss_is_that_of_the_weights(tmp_path, capsys, settings):
    run = tmp_path / "run"
    record = main(flags(run, **settings))
    said = capsys.readouterr().out
    found = measured(run, tmp_path)
    model = json.loads((run / "run.json").read_text())["results"]["model"]
    assert model["eval_loss"] == pytest.approx(found, rel=1e-6)
    (result,) = ModelCard.load(run / "README.md").data.eval_results
    assert result.metric_value == model["eval_loss"]
    assert f"{found:.4f} of the model in that folder, from step {model['step']}" in said
    assert [row["step"] for row in record.rows] == sorted({row["step"] for row in record.rows})
    lowest = min(record.rows, key=lambda row: row["eval_loss"])
    assert (f"{lowest['eval_loss']:.4f} at step {lowest['step']}, not kept" in said) == (
        lowest["step"] != model["step"]
    )
    for step, folder in whole_checkpoints(run).items():
        row = next((row for row in record.rows if row["step"] == step), {})
        results = json.loads((folder / "run.json").read_text())["results"]
        assert results["model"] == {"step": step} | ({"eval_loss": row["eval_loss"]} if row else {})


def test_the_best_of_the_saved_is_what_remains(tmp_path):
    """The lowest loss of all lies between two checkpoints."""
    record = main(flags(tmp_path, **steps(max_steps=12, eval_steps=1, save_steps=3), **RUINS))
    losses = {row["step"]: row["eval_loss"] for row in record.rows}
    best = min((step for step in losses if step % 3 == 0), key=lambda step: losses[step])
    assert record.results["model"] == {"step": best, "eval_loss": losses[best]}
    lowest = min(losses, key=lambda step: losses[step])
    kept = record.asked_used.get("step of the model", {"asked": best, "used": best})
    assert (kept["asked"], kept["used"]) == (lowest, best)


def test_what_was_asked_for_and_what_was_used_stand_side_by_side(tmp_path, capsys):
    """26 images in steps of 8; five more that the split leaves out of training are no fault and have no row."""
    record = main(flags(tmp_path, max_train_samples=26, num_train_epochs=1))
    rows = json.loads((tmp_path / "run.json").read_text())["asked_used"]
    assert rows == record.asked_used == {
        "images of an epoch": {"asked": 26, "used": 24, "why": rows["images of an epoch"]["why"]}
    }  # fmt: skip
    assert "images of an epoch: asked for 26, used 24 (the last ones do not fill a step" in capsys.readouterr().out


def test_schedule_free_weights_are_evaluated_and_saved_as_they_are_meant(tmp_path):
    """Saved in the optimizer's eval mode, in both tasks, whether or not there was an evaluation before."""
    free = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "learning_rate": 1e-2}
    main(flags(tmp_path / "mae", **steps(max_steps=4, eval_strategy="no", save_steps=2), **free))
    run = segmentation_trainer(tmp_path / "upernet", max_steps=4, save_strategy="steps", save_steps=2, **free)
    run.train()
    score = run.evaluate()["eval_loss"]
    run.weights_as_evaluated()
    assert run.evaluate()["eval_loss"] == score
    for folder in (tmp_path / "mae" / "checkpoint-2", tmp_path / "upernet" / "checkpoint-2"):
        groups = torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]
        assert not any(group["train_mode"] for group in groups)


# ---- the schedule after a resume ----


def cosine(rate, step, warmup, total):
    if step < warmup:
        return rate * step / warmup
    return rate * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def test_a_checkpoint_of_the_model_alone_goes_on_with_its_schedule(tmp_path, caplog):
    settings = steps(max_steps=8, eval_strategy="no", save_steps=5, save_only_model=True, warmup_steps=4)
    with at_step(4, send(15)), pytest.raises(SystemExit):
        main(flags(tmp_path, **settings))
    main(flags(tmp_path, **settings))
    assert rates(tmp_path) == pytest.approx([cosine(1e-3, step, 4, 8) for step in range(8)])
    assert (
        "lacks optimizer.pt and scheduler.pt (--save_only_model): the optimizer starts without its moments"
        in caplog.text
    )
    rows = json.loads((tmp_path / "run.json").read_text())["asked_used"]
    assert rows["optimizer state at step 5"]["asked"] == ["optimizer.pt", "scheduler.pt"]


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": '{"patience": 0, "threshold": 10.0}'}


def test_a_schedule_that_follows_the_loss_is_not_guessed(tmp_path, capsys):
    settings = steps(max_steps=6, eval_steps=2, save_steps=2, save_only_model=True, **PLATEAU)
    with at_step(2, send(15)), pytest.raises(SystemExit):
        main(flags(tmp_path, **settings))
    with pytest.raises(SystemExit) as stop:
        main(flags(tmp_path, **settings))
    assert stop.value.code == 2
    assert "which --lr_scheduler_type" in capsys.readouterr().err


def test_a_plateau_goes_on_with_the_settings_of_now(tmp_path):
    """The first evaluation that is no better cuts the rate to a tenth; then the run resumes with a lower rate and more
    patience."""
    settings = steps(max_steps=10, eval_steps=2, save_steps=2, **PLATEAU)
    with at_step(4, send(15)), pytest.raises(SystemExit):
        main(flags(tmp_path, **settings))
    settings["lr_scheduler_kwargs"] = '{"patience": 10, "threshold": 10.0}'
    main(flags(tmp_path, learning_rate=1e-4, **settings))
    before, after = rates(tmp_path)[:5], rates(tmp_path)[5:]
    assert before[0] == 1e-3 and before[-1] < 1e-3
    assert after == pytest.approx([before[-1] / 10] * 5)


# ---- batches, labels, folders ----


class Labelled(torch.utils.data.Dataset):
    """Views with the noise of their masks and a label, as in data sets on the Hub."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.pixels, self.noise = (torch.randn(count, *shape, generator=generator) for shape in ((3, 32, 32), (16,)))

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "noise": self.noise[index], "label": index % 3}


def plain(folder, config, trainer_class=ResumingTrainer, callbacks=None, **options):
    """README's Trainer: nothing but a folder, data and our callback."""
    torch.manual_seed(0)
    given = {"max_steps": 2, "per_device_train_batch_size": 8, "report_to": "none", "disable_tqdm": True, "seed": 3}
    given |= {"use_cpu": True, "save_strategy": "no", "logging_steps": 1, "dataloader_pin_memory": False}
    given |= {"remove_unused_columns": False}
    args = TrainingArguments(folder, **(given | options))
    callbacks = [DecorrelationCallback(DecorrelationArguments(update_interval=1))] if callbacks is None else callbacks
    data = {"train_dataset": Labelled(16), "eval_dataset": Labelled(4)}
    return trainer_class(DBPViTMAEForPreTraining(config), args, callbacks=callbacks, **data)


@pytest.mark.parametrize("trainer_class", [ResumingTrainer, Trainer])
def test_labels_do_not_multiply_the_loss_by_the_accumulation_steps(tmp_path, mae_config, trainer_class):
    rows = []
    for size, parts in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "max_steps": 1}
        trainer = plain(tmp_path, mae_config(), trainer_class, **options)
        trainer.train()
        rows.append(next(row for row in trainer.state.log_history if "loss" in row))
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4)
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-3)


def test_readmes_trainer_evaluates_without_label_names(tmp_path, mae_config):
    trainer = plain(tmp_path, mae_config(), eval_strategy="steps", eval_steps=1, metric_for_best_model="loss")
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_search_has_a_folder_a_trial(tmp_path, mae_config):
    pytest.importorskip("optuna", reason="no optuna: no search to test")
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = plain(tmp_path, mae_config(), **options)
    trainer.model_init = lambda trial=None: DBPViTMAEForPreTraining(mae_config())
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=2, backend="optuna"
    )
    assert best.run_id in ("0", "1") and math.isfinite(best.objective)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["run-0", "run-1"]
    assert all([*whole_checkpoints(tmp_path / name)] == [1, 2] for name in ("run-0", "run-1"))


def test_a_second_run_of_one_trainer_begins_anew(tmp_path, mae_config):
    trainer = plain(tmp_path, mae_config())
    trainer.model_init = lambda trial=None: DBPViTMAEForPreTraining(mae_config())
    losses = []
    for _ in range(2):
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]


def test_the_batch_that_fits_is_the_one_recorded(tmp_path, monkeypatch):
    stock, batches = MAETrainer.training_step, []

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["pixel_values"]) > 6:
            raise RuntimeError("CUDA out of memory.")
        batches.append(len(inputs["pixel_values"]))
        return stock(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MAETrainer, "training_step", training_step)
    record = main(flags(tmp_path, auto_find_batch_size=True, base_learning_rate=0.1, num_train_epochs=1))
    assert batches == [6] * 4
    assert record.arguments["per_device_train_batch_size"] == 6
    assert record.arguments["learning_rate"] == pytest.approx(0.1 * 6 / 256)
    assert rates(tmp_path)[0] <= 0.1 * 6 / 256
    assert record.results["input"]["images"] == 24
    assert record.data["feeding"]["step_images"] == 6
    assert record.asked_used["per_device_train_batch_size"]["asked"] == 8
    assert record.asked_used["per_device_train_batch_size"]["used"] == 6
    assert record.asked_used["learning_rate"]["used"] == record.arguments["learning_rate"]
    assert "| images per optimizer step | 6 |" in (tmp_path / "README.md").read_text()


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path, mae_config):
    mae_trainer(tmp_path, mae_config(num_hidden_layers=1)).train()
    again = mae_trainer(tmp_path, mae_config(num_hidden_layers=1), learning_rate=1e-3)
    with pytest.raises(ValueError, match="holds checkpoints of another run, up to step 6: resume from them with"):
        again.train()
    assert again.state.global_step == 0


def test_rotation_is_by_step_whatever_the_times_of_the_files(tmp_path, mae_config):
    mae_trainer(tmp_path / "run", mae_config(num_hidden_layers=1)).train()
    for age, folder in enumerate(whole_checkpoints(tmp_path / "run").values()):
        os.utime(folder, (1e9 - age, 1e9 - age))  # as a copy may leave them
    rotate(tmp_path / "run", 2, {tmp_path / "run" / "checkpoint-6"})
    assert [*whole_checkpoints(tmp_path / "run")] == [4, 6]


# ---- R in a plain Trainer ----


class Reporter(TrainerCallback):
    """As TensorBoard, W&B and MLflow: sees the logs when they are logged."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("trainer_class", [ResumingTrainer, Trainer])
def test_figures_of_r_reach_reporters_that_come_first(tmp_path, mae_config, trainer_class):
    reporter = Reporter()
    trainer = plain(
        tmp_path,
        mae_config(),
        trainer_class,
        [reporter, DecorrelationCallback(DecorrelationArguments(update_interval=1))],
    )
    trainer.train()
    seen = [logs for logs in reporter.seen if "loss" in logs]
    assert len(seen) == 2 and all(logs["decorrelation_loss"] > 0 for logs in seen)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["decorrelation_loss"] for row in rows] == [logs["decorrelation_loss"] for logs in seen]


class Spoil(TrainerCallback):
    """Makes a row that was gathered for R NaN, in every step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        _, layer = next(decorrelated_layers(model))
        if layer.decorrelation.rows is not None:
            layer.decorrelation.rows[0, 0] = math.nan


@pytest.mark.parametrize("interval", [1, 5])
def test_r_is_guarded_in_readmes_trainer_and_in_a_stock_one(tmp_path, mae_config, interval):
    """The update of step 5 k is judged at the next step."""
    of_r = DecorrelationCallback(DecorrelationArguments(sample_fraction=1.0, update_interval=interval))
    options = {"max_steps": 5 * interval + 6}
    trainers = [
        plain(tmp_path, mae_config(), ResumingTrainer, [Spoil(), of_r], **options),
        plain(tmp_path, mae_config(), Trainer, [Spoil(), of_r, GuardCallback(decorrelation=of_r)], **options),
    ]
    for trainer in trainers:
        with pytest.raises(
            NonFiniteError, match=f"5 updates of R in a row up to step {5 * interval + 1} were not finite"
        ):
            trainer.train()


def test_updates_of_r_that_fail_now_and_then_do_not_end_a_run(tmp_path, mae_config):
    """Two of three fail, so the row ends at every third."""
    of_r = DecorrelationCallback(DecorrelationArguments(sample_fraction=1.0, update_interval=2))

    class Sometimes(Spoil):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step // 2 % 3:
                super().on_pre_optimizer_step(args, state, control, model, **kwargs)

    trainer = plain(tmp_path, mae_config(), ResumingTrainer, [Sometimes(), of_r], max_steps=20)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "skipped" in row] == [5, 7, 11, 13, 17, 19]


def test_a_row_of_failed_updates_ends_when_r_is_trained_no_longer(tmp_path, mae_config):
    arguments = DecorrelationArguments(sample_fraction=1.0, update_interval=2, eta_stop=0.5)
    guard = GuardCallback(decorrelation=(of_r := DecorrelationCallback(arguments)))
    trainer = plain(tmp_path, mae_config(), Trainer, [Spoil(), of_r, guard], max_steps=8)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "skipped" in row] == [3, 5]
    assert guard.skipped_in_a_row == 0


@pytest.mark.parametrize("trainer_class", [ResumingTrainer, Trainer])
def test_the_clock_counts_training_alone_in_any_trainer(tmp_path, mae_config, monkeypatch, trainer_class):
    """A second in a step; a thousand in every evaluation, save and the loading of the best model."""
    now = [0.0]
    monkeypatch.setattr("hf_dbp.training.measurement.time.perf_counter", lambda: now[0])
    clock = clocked.ClockCallback()

    class Slow(trainer_class):  # type: ignore[misc, valid-type]
        pass

    for name, seconds in (("training_step", 1), ("prediction_step", 1000), ("_save", 1000), ("_load_best_model", 1000)):

        def slow(self, *args, name=name, seconds=seconds, **kwargs):
            now[0] += seconds
            return getattr(super(Slow, self), name)(*args, **kwargs)

        setattr(Slow, name, slow)
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"label_names": ["pixel_values"], "eval_on_start": True}
    trainer = plain(tmp_path, mae_config(decorrelated_layers="none"), Slow, [clock], **options)
    trainer.train()
    assert clock.clock.seconds == 4 and now[0] > 4000


# ---- shared memory ----


@pytest.mark.parametrize(
    "message",
    [
        "unable to write to file </torch_123_456_0>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_a_small_dev_shm_is_not_called_a_full_disk(tmp_path, message):
    with pytest.raises(SharedMemoryFull, match=r"/dev/shm .*--shm-size 8g"), disk_errors(tmp_path):
        raise RuntimeError(message)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["16k", "256k"])
def test_a_small_dev_shm_is_named_by_a_run(tmp_path, size):
    """There is no room for the workers' locks, or none for their batches."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False).returncode:
        pytest.skip("no mount namespace can be made here: a small /dev/shm is not tested")
    command = [sys.executable, "-W", "ignore", "-m", "hf_dbp.pretraining", *flags(tmp_path, dataloader_num_workers=2)]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *command],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert "no room left in shared memory, /dev/shm" in done.stderr


logging.getLogger("optuna").setLevel(logging.ERROR)
