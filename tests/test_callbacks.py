"""When R is updated: schedule, interval, stop, skipped steps, logging, and any Trainer."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_dbp.callbacks import DecorrelationArguments, DecorrelationCallback
from hf_dbp.conversion import convert_to_decorrelated, decorrelated_layers
from hf_dbp.correlations import mean_correlations
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining
from hf_dbp.training.restoring import restore_weights
from hf_dbp.training.resuming import ResumingTrainer
from hf_dbp.update import update_decorrelation

STEPS = 8
EVERY_STEP = DecorrelationArguments(update_interval=1)


class Regression(nn.Module):
    """A decorrelated network that a stock Trainer can train."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 1))

    def forward(self, x, labels):
        x = x.to(self.layers[0].weight.dtype)
        return {"loss": (self.layers(x) - labels).square().mean()}


def dataset(count=64):
    x = torch.randn(count, 6) @ torch.randn(6, 6)
    return [{"x": row, "labels": row.sum()[None]} for row in x]


def trained(tmp_path, callback, trainer_class=Trainer, resume=None, **arguments):
    torch.manual_seed(0)
    model = convert_to_decorrelated(Regression())
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 8, "report_to": "none", "disable_tqdm": True}
    defaults |= {"use_cpu": True, "save_strategy": "no", "logging_steps": 4, "learning_rate": 1e-2}
    args = TrainingArguments(tmp_path, **(defaults | arguments))
    trainer = trainer_class(model, args, train_dataset=dataset(), eval_dataset=dataset(8), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_trained_in_16_bits_are_told_of(tmp_path, caplog, kind):
    """What it says is true of bfloat16: with steps of 1e-4 most weights stay as they were."""
    model = convert_to_decorrelated(Regression()).to(kind)
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    args = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, learning_rate=1e-4, max_grad_norm=0)
    Trainer(model, args, train_dataset=dataset(), callbacks=[DecorrelationCallback(EVERY_STEP)]).train()
    told = [message.split(",")[0] for message in caplog.messages if message.startswith("weights are trained in ")]
    name = str(kind).removeprefix("torch.")
    assert told == ([] if kind == torch.float32 else [f"weights are trained in {name}"])
    if kind == torch.bfloat16:
        after = [p for p in model.parameters() if p.requires_grad]
        same = [(p == old)[old != 0] for p, old in zip(after, before, strict=True)]
        assert torch.cat([part.flatten() for part in same]).float().mean() > 0.5


@pytest.fixture
def etas(monkeypatch):
    """Records the eta of every update and passes it on."""
    seen = []

    def record(model, *, eta, **options):
        seen.append(eta)
        return update_decorrelation(model, eta=eta, **options)

    monkeypatch.setattr("hf_dbp.callbacks.update_decorrelation", record)
    return seen


def test_eta_follows_the_decay_of_the_learning_rate_but_not_its_warm_up(tmp_path, etas):
    callback = DecorrelationCallback(DecorrelationArguments(eta=0.01, update_interval=1))
    trained(tmp_path, callback, lr_scheduler_type="linear", warmup_steps=3)
    decay = [1 - k / 5 for k in range(5)]  # linear over the 5 steps after the warm-up
    assert etas == pytest.approx([0.01] * 3 + [0.01 * d for d in decay])


def test_without_a_learning_rate_r_stays(tmp_path, etas):
    """Weights that stay cannot make up for a change of R."""
    callback = DecorrelationCallback(DecorrelationArguments(eta=0.01, update_interval=1))
    trained(tmp_path, callback, lr_scheduler_type="linear", warmup_steps=0, learning_rate=0.0)
    assert etas == [0.0] * 8


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "constant_with_warmup", "inverse_sqrt"])
def test_eta_follows_schedules_that_do_not_note_their_peak_too(tmp_path, etas, monkeypatch, schedule):
    """The plateau's learning rate falls to a tenth after the first evaluation that is no better, here the second."""
    rates = []
    monkeypatch.setattr(
        DecorrelationCallback,
        "on_pre_optimizer_step",
        lambda self, *_, optimizer, **__: rates.append(optimizer.param_groups[0]["lr"]),
        raising=False,
    )
    plateau = {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_kwargs": {"patience": 0, "threshold": 10.0}}
    options = {"lr_scheduler_type": schedule} | (plateau if schedule == "reduce_lr_on_plateau" else {})
    trained(tmp_path, DecorrelationCallback(DecorrelationArguments(eta=0.01, update_interval=1)), **options)
    assert etas == pytest.approx(rates)  # the peak of both is 0.01
    if schedule == "reduce_lr_on_plateau":
        assert rates[-1] < 0.5 * rates[0] == 0.005


def test_the_papers_eta_is_constant_and_can_stop(tmp_path, etas):
    arguments = DecorrelationArguments(eta=0.01, eta_schedule="constant", eta_stop=0.75, update_interval=1)
    model, _ = trained(tmp_path, DecorrelationCallback(arguments))
    assert etas == [0.01] * 6
    assert all(layer.decorrelation.rows is None for _, layer in decorrelated_layers(model))


def test_an_interval_takes_larger_steps_less_often(tmp_path, etas):
    trained(
        tmp_path, DecorrelationCallback(DecorrelationArguments(eta=0.01, eta_schedule="constant", update_interval=3))
    )
    assert etas == pytest.approx([0.03] * 2)


@pytest.mark.parametrize(
    ("steps", "stop", "warned"), [(4, 1.0, True), (5, 1.0, False), (8, 0.5, True), (10, 0.5, False)]
)
def test_a_run_without_an_update_of_r_says_so(tmp_path, etas, caplog, steps, stop, warned):
    trained(tmp_path, DecorrelationCallback(DecorrelationArguments(eta_stop=stop)), max_steps=steps)
    assert bool(etas) != warned
    assert any("R was never updated" in message for message in caplog.messages) == warned


def test_no_update_of_r_is_no_surprise_without_eta_or_after_a_resume(tmp_path, caplog):
    trained(tmp_path / "off", DecorrelationCallback(DecorrelationArguments(eta=0.0)), max_steps=4)
    options = {"save_strategy": "steps", "save_steps": 6}
    trained(tmp_path / "on", DecorrelationCallback(), ResumingTrainer, **options)
    trained(tmp_path / "on", DecorrelationCallback(), ResumingTrainer, resume=True, **options)
    assert not any("never updated" in message for message in caplog.messages)


def test_a_skipped_optimizer_step_leaves_r_and_drops_its_rows(monkeypatch):
    model = convert_to_decorrelated(Regression()).train()
    callback = DecorrelationCallback(DecorrelationArguments(eta=0.1, sample_fraction=1.0, update_interval=1))
    args = SimpleNamespace(gradient_accumulation_steps=1, world_size=1, logging_strategy="no", process_index=0)
    args.torch_compile, args.n_gpu, args.fsdp, args.deepspeed = False, 0, None, None
    state = SimpleNamespace(global_step=3, max_steps=10)
    callback.on_train_begin(args, state, None, model)
    for skipped in ("scaler", "gradients", None):
        model.zero_grad()
        callback.on_step_begin(args, state, None, model)
        model(torch.randn(16, 6), torch.zeros(16, 1))["loss"].backward()
        monkeypatch.setattr(callback, "decay", lambda *_: 1.0)
        optimizer = SimpleNamespace(step_was_skipped=skipped == "scaler")
        if skipped == "gradients":
            model.zero_grad()
        callback.on_optimizer_step(args, state, None, model, optimizer=optimizer)
        R = model.layers[0].decorrelation.R
        assert torch.equal(R, torch.eye(6)) == (skipped is not None)
        assert model.layers[0].decorrelation.rows is None


def test_correlations_join_the_logs_and_fall(tmp_path):
    callback = DecorrelationCallback(
        DecorrelationArguments(eta=0.02, eta_schedule="constant", sample_fraction=1.0, update_interval=1)
    )
    _, trainer = trained(tmp_path, callback, max_steps=40)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    losses = [row["decorrelation_loss"] for row in logged]
    assert losses[-1] < 0.5 * losses[0]
    assert set(callback.per_layer) == {"layers.0", "layers.2"}
    assert mean_correlations(callback.per_layer)["mean_squared_correlation"] == pytest.approx(
        logged[-1]["mean_squared_correlation"]
    )


@pytest.mark.parametrize(
    ("logging", "measured"),
    [
        ({"logging_steps": 0.25}, [0, 1, 3, 5, 7]),
        ({"logging_steps": 3}, [0, 2, 5]),
        ({"logging_strategy": "epoch"}, [0, 3, 7]),
        ({"logging_strategy": "epoch", "gradient_accumulation_steps": 3}, [0, 1, 3, 5, 7]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_correlations_are_measured_where_the_trainer_logs(tmp_path, monkeypatch, logging, measured):
    """At the first step too; 4 batches an epoch."""
    callback, steps = DecorrelationCallback(EVERY_STEP), []
    update = callback.on_optimizer_step

    def on_optimizer_step(args, state, *rest, **kwargs):
        callback.measured = {}
        update(args, state, *rest, **kwargs)
        steps.extend([state.global_step] * bool(callback.measured))

    monkeypatch.setattr(callback, "on_optimizer_step", on_optimizer_step)
    _, trainer = trained(tmp_path, callback, per_device_train_batch_size=16, **logging)
    assert steps == measured
    logs = [row["step"] for row in trainer.state.log_history if "mean_squared_correlation" in row]
    assert logs == [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert set(logs) <= {step + 1 for step in measured}


def test_several_gpus_of_one_process_are_refused_before_training(tmp_path):
    """nn.DataParallel runs replicas, and rows that they gather are lost."""
    torch.manual_seed(0)
    model = convert_to_decorrelated(Regression())
    args = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    args._n_gpu = 2
    trainer = Trainer(model, args, train_dataset=dataset(), callbacks=[DecorrelationCallback(EVERY_STEP)])
    with pytest.raises(ValueError, match=r"2 GPUs.*accelerate launch --multi_gpu --num_processes 2"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_our_trainer_takes_one_gpu_and_says_so(tmp_path, caplog):
    """As the scripts do on a machine with several GPUs when started without a launcher."""
    args = TrainingArguments(tmp_path, max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    args._n_gpu = 2
    model = convert_to_decorrelated(Regression())
    ResumingTrainer(model, args, train_dataset=dataset(), callbacks=[DecorrelationCallback(EVERY_STEP)]).train()
    assert "1 of 2 GPUs is used; for all of them: accelerate launch --multi_gpu --num_processes 2" in caplog.text
    assert args.n_gpu == 1 and args.train_batch_size == args.per_device_train_batch_size


# ---- checkpoints ----


class Views(torch.utils.data.Dataset):
    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index]}


def mae_trainer(folder, config, trainer_class=ResumingTrainer, **options):
    """A user's plain Trainer of our model: stock order of images, masks from the random state."""
    torch.manual_seed(0)
    given = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True}
    given |= {"use_cpu": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    given |= {"learning_rate": 5e-2, "remove_unused_columns": False, "label_names": ["pixel_values"], "seed": 3}
    args = TrainingArguments(folder, prediction_loss_only=True, dataloader_pin_memory=False, **(given | options))
    model = DBPViTMAEForPreTraining(config)
    data = {"train_dataset": Views(12), "eval_dataset": Views(4)}
    return trainer_class(model, args, callbacks=[DecorrelationCallback(EVERY_STEP)], **data)


def test_our_trainer_is_a_plain_one_that_goes_on_and_ends_with_the_best_model(tmp_path, mae_config):
    """6 steps; stopped after 4, in the middle of the second epoch."""
    config = mae_config(num_hidden_layers=1)
    whole = mae_trainer(tmp_path / "whole", config)
    whole.train()
    resumed = mae_trainer(tmp_path / "whole", config)
    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    best = mae_trainer(tmp_path / "best", config, load_best_model_at_end=True, learning_rate=20.0)
    best.train()
    folder = Path(best.state.best_model_checkpoint)
    assert folder.name != "checkpoint-6"
    saved = load_file(folder / "model.unfused.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in best.model.state_dict().items())


def test_a_stock_trainer_is_refused_what_it_cannot_restore(tmp_path, mae_config, caplog):
    config = mae_config(num_hidden_layers=1)
    trainer = mae_trainer(tmp_path, config, Trainer, load_best_model_at_end=True)
    with pytest.raises(ValueError, match=r"train with hf_dbp\.ResumingTrainer"):
        trainer.train()
    assert trainer.state.global_step == 0
    mae_trainer(tmp_path, config, Trainer, max_steps=1).train()
    assert "transformers.Trainer cannot resume the checkpoints it saves here" in caplog.text


def test_our_trainer_restores_any_model_that_was_decorrelated(tmp_path):
    """Such a model is not what its class builds from its configuration."""
    options = {"save_strategy": "steps", "save_steps": 4}
    whole, _ = trained(tmp_path, DecorrelationCallback(EVERY_STEP), ResumingTrainer, **options)
    shutil.rmtree(tmp_path / "checkpoint-8")
    resumed, trainer = trained(tmp_path, DecorrelationCallback(EVERY_STEP), ResumingTrainer, resume=True, **options)
    assert trainer.state.global_step == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="does not have the tensors of the model, Regression"):
        restore_weights(Regression(), str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eta": -1.0}, "--eta lies in"),
        ({"eta_schedule": "cosine"}, "--eta_schedule is decay or constant"),
        ({"eta_stop": 0.0}, "--eta_stop is a share"),
        ({"kappa": 1.5}, "--kappa lies in"),
        ({"update_interval": 0}, "--update_interval is a number of steps"),
        ({"sample_fraction": 0.0}, r"sample fraction must lie in \(0, 1\], got 0.0"),
        ({"row_floor": 3.0, "row_cap": 2.0}, "must not exceed the row cap"),
    ],
)
def test_bad_settings_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        DecorrelationArguments(**changed)
