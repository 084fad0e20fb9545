"""`ResumingTrainer`: what pre-training and fine-tuning share about saving, stopping and going on.

- checkpoints are whole or not there (`saving`), and hold every tensor under its present name;
- resume and best checkpoint restore every tensor or fail (the stock Trainer loads loosely and only warns);
- SIGTERM and SIGINT save and end the run (`stopping`);
- a run that is resumed after its last step takes no further one (the stock Trainer takes one).
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dbp.callbacks import DecorrelationCallback
from hf_dbp.data.order import EpochSampler
from hf_dbp.errors import UserError
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining, DBPViTMAEModel
from hf_dbp.records import RunRecord
from hf_dbp.training.guards import GuardedTrainer
from hf_dbp.training.optimizers import checked_schedule
from hf_dbp.training.processes import use_one_gpu
from hf_dbp.training.saving import (
    UNFINISHED,
    checkpoint_step,
    clear,
    disk_errors,
    fault,
    last_checkpoint,
    move_files,
    publish,
    rotate,
)
from hf_dbp.training.stopping import StopOnSignal, Stopped, shield_workers

__all__ = [
    "SHAPING",
    "ResumingTrainer",
    "changed_arguments",
    "compared_arguments",
    "find_checkpoint",
    "noted_changes",
    "restore_weights",
]

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")  # of the optimizer's groups
SHAPING = (
    "dataset_name", "dataset_config_name", "train_dir", "validation_dir", "channel_files", "mask_suffix",
    "train_val_split", "built_in_size",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "data_seed",
    "bf16", "fp16", "eta", "eta_schedule", "eta_stop", "kappa", "update_interval", "sample_fraction", "row_floor",
    "row_cap", "bound_eta", "mask_ratio", "norm_pix_loss", "native_tiles", "image_statistics", "image_processor_name",
)  # fmt: skip


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: the one named, else the last whole one in the output folder.

    Raises:
        ValueError: the one that was named is not whole.
    """
    if args.resume_from_checkpoint in (None, "true", "True", True):
        return last_checkpoint(args.output_dir)
    named = str(args.resume_from_checkpoint)
    problem = fault(Path(named))
    if problem is not None:
        raise UserError(
            f"checkpoint {named} is not whole: {problem}; without --resume_from_checkpoint the last whole one of "
            "--output_dir is taken"
        )
    return named


def changed_arguments(before: RunRecord, now: RunRecord, checkpoint: str) -> dict[str, list[Any]]:
    """The arguments that shape training and differ from the checkpoint's: {name: [old, new]}.

    Raises:
        ValueError: method, optimizer or decorrelated layers differ, so that the checkpoint's tensors and states are of
            no use; or the seed, with which order, views and held-out images change; or the weights to start from.
    """
    fixed: dict[str, tuple[Any, Any]] = {
        name: (getattr(before, name), getattr(now, name)) for name in ("method", "optimizer", "seed")
    }
    for flag in ("model_name_or_path", *(["decorrelated_layers"] if before.method == "dbp" else [])):
        new = now.arguments.get(flag)
        fixed[flag] = (before.arguments.get(flag, new), new)
    return compared_arguments(before.arguments, now.arguments, fixed, SHAPING, checkpoint)


def compared_arguments(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, Any]],
    shaping: Sequence[str],
    checkpoint: str,
) -> dict[str, list[Any]]:
    """The arguments of these names in both records that differ: {name: [old, new]}.

    Raises:
        ValueError: one of the ``fixed`` differs, given as flag -> (old, new).
    """
    for flag, (old, new) in fixed.items():
        if old != new:
            remedy = f"leave --{flag} out" if old is None else f"give --{flag} {old}"
            raise UserError(
                f"{checkpoint} was trained with --{flag} {old}, not {new}: to go on, {remedy}; to begin anew, another "
                "--output_dir"
            )
    pairs = {name: (before[name], now[name]) for name in shaping if name in before and name in now}
    return {name: [old, new] for name, (old, new) in pairs.items() if old != new}


def noted_changes(
    changed: Mapping[str, list[Any]], earlier: Mapping[str, Any], checkpoint: str, *, tell: bool
) -> dict[str, Any]:
    """`resumed_with` of a run that goes on from a checkpoint with other arguments: ``earlier`` changes and these."""
    if not changed:
        return {**earlier}
    if tell:
        told = ", ".join(f"--{name} {old} -> {new}" for name, (old, new) in changed.items())
        logger.warning("%s goes on with other settings: %s", checkpoint, told)
    return {**earlier, str(checkpoint_step(Path(checkpoint))): changed}


def restore_weights(model: nn.Module, folder: str) -> None:
    """Load a checkpoint's weights into ``model``, in place.

    Names and shapes of a class of ours are checked by ``from_pretrained``, and of any that the checkpoint has under
    older names. Another model that was decorrelated is not what its class makes of its configuration.

    Raises:
        ValueError: the tensors of the checkpoint are not those of the model; nothing is changed then.
    """
    if not isinstance(model, DBPViTMAEForPreTraining | DBPViTMAEModel):
        tensors = {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}
        if shapes(tensors) == shapes(model.state_dict()):
            model.load_state_dict(tensors)
            return
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"checkpoint {folder} does not have the tensors of the model, {type(model).__name__}")
    saved, info = type(model).from_pretrained(
        folder,
        config=model.config,
        output_loading_info=True,
        dtype=model.dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
    )
    found = {
        "lacks {} tensors of the model": info["missing_keys"],
        "has {} tensors that the model lacks": info["unexpected_keys"],
        "has {} tensors of another shape than the model": {key for key, *_ in info["mismatched_keys"]},
    }
    for problem, keys in found.items():
        if keys:
            raise UserError(
                f"checkpoint {folder} {problem.format(len(keys))}, among them {min(keys)}; to go on, give "
                "the flags it was trained with; to begin anew, another --output_dir"
            )
    model.load_state_dict(saved.state_dict())


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@contextmanager
def tensors_alone(checkpoint: str | None) -> Iterator[None]:
    """Say that PyTorch's ``weights_only`` reader found more than tensors and numbers; nothing of it was executed."""
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"checkpoint {checkpoint} holds optimizer or random states with more than tensors in them, which could "
            "execute code: they are not loaded; take it away to go on from an earlier one"
        ) from error


class EpochCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler which epoch begins, however the loader wraps it (after a resume it is wrapped once more)."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class ResumingTrainer(GuardedTrainer):
    """transformers' Trainer with the saving of the module's docstring and numerical guards, on one GPU per process."""

    sampler: EpochSampler | None = None

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, **kwargs: Any) -> None:
        if args is not None:
            use_one_gpu(args)
        super().__init__(model, args, **kwargs)
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        self._unfinished: Path | None = None

    def use_sampler(self, sampler: EpochSampler) -> None:
        """Draw the training images in this order."""
        self.sampler = sampler
        self.add_callback(EpochCallback(sampler))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def get_train_dataloader(self) -> Any:
        """The stock one, whose workers leave signals to the run (schedulers send them to the whole group)."""
        loader = super().get_train_dataloader()
        shield_workers(loader.base_dataloader)
        return loader

    # ---- training ----

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        return checked_schedule(
            lambda steps: super(ResumingTrainer, self).create_scheduler(steps, optimizer), self.args, num_training_steps
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the stock one; ``True`` is the last whole checkpoint.

        Raises:
            ValueError: ``True``, and there is none.
            SystemExit: SIGTERM (status 143) or SIGINT (130) came; the checkpoint is saved.
        """
        resume_from_checkpoint = self.named_checkpoint(resume_from_checkpoint)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, DecorrelationCallback):
                callback.restorable = True
        if self.args.should_save:
            clear(Path(self.args.output_dir) / UNFINISHED)
        try:
            with self.stop.listening():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except Stopped as stopped:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # reporters close their files
            if self.is_world_process_zero():
                print(
                    f"stopped by {stopped} after step {self.state.global_step} of {self.state.max_steps}; "
                    f"the same command goes on from {self.checkpoint}",
                    file=sys.stderr,
                )
            traceback.clear_frames(stopped.__traceback__)  # else they keep the DDP model, past the end of its group
            raise SystemExit(stopped.status) from None

    def named_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """What `train` resumes from: ``True`` is the last whole checkpoint, and a ValueError if there is none."""
        if resume_from_checkpoint is not True:
            return resume_from_checkpoint or None
        last = last_checkpoint(self.args.output_dir)
        if last is None:
            raise UserError(f"no whole checkpoint in {self.args.output_dir}")
        return last

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- saving ----

    @property
    def checkpoint(self) -> Path:
        """The folder of a checkpoint of this step."""
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

    @contextmanager
    def _writing(self, folder: Path, what: str) -> Iterator[Path]:
        """A folder in ``folder`` to write into before what is written gets its name; no trace is left of it."""
        self._unfinished = folder / UNFINISHED
        if self.args.should_save:
            clear(self._unfinished)
            self._unfinished.mkdir(parents=True)
        try:
            with disk_errors(what):
                yield self._unfinished
        finally:
            if self.args.should_save:
                clear(self._unfinished)
            self._unfinished = None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        run, checkpoint = self.checkpoint.parent, self.checkpoint
        with self._writing(run, str(checkpoint)) as unfinished:
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == checkpoint or (best.is_dir() and fault(best) is None):
                self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / checkpoint.name / STATE))  # with the best one's final name
                publish(unfinished / checkpoint.name, checkpoint)
                rotate(
                    run, self.args.save_total_limit, {checkpoint, Path(self.state.best_model_checkpoint or checkpoint)}
                )
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # else once it has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Model and image processor; present key names, which resume restores (platform trap)."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self._unfinished is not None:
            self._write_model(folder, state_dict)
            return
        with self._writing(folder, f"the model in {folder}") as unfinished:
            self._write_model(unfinished, state_dict)
            move_files(unfinished, folder)

    def _write_model(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PreTrainedModel):
            super()._save(str(folder), state_dict)
            return
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    # ---- restoring ----

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """States come from the checkpoint, settings from the arguments of now: a lower learning rate has an effect."""
        settings = [{key: group[key] for key in SETTINGS if key in group} for group in self.optimizer.param_groups]
        with tensors_alone(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            if setting.get("initial_lr") and group.get("initial_lr"):
                group["lr"] *= setting["initial_lr"] / group["initial_lr"]
            group.update(setting)
        if isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what is logged

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with tensors_alone(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_weights(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        problem = fault(Path(best))
        if problem is not None:
            logger.warning("The best checkpoint, %s, is lost (%s); the run ends with its last weights", best, problem)
            return
        logger.info("Loading the best model, %s (%s %s)", best, self.args.metric_for_best_model, self.state.best_metric)
        restore_weights(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), best)
