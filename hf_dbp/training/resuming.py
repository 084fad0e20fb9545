"""`ResumingTrainer`: saving, stopping and resuming, shared by pre-training and fine-tuning.

- checkpoints are complete or absent (`saving`), and hold every tensor under its current name;
- resuming and loading the best checkpoint restore every tensor or fail (the stock Trainer only warns);
- the best checkpoint is the best of those that this run has saved, even if another evaluation was better;
- weights are evaluated and saved in the optimizer's eval mode if it has one (schedule-free optimizers);
- SIGTERM and SIGINT save and end the run (`stopping`);
- steps that are not finite are skipped (`guards`);
- a run resumed after its last step takes no further step (the stock Trainer takes one).
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, ViTMAEForPreTraining
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, SchedulerType

from hf_dbp.callbacks import DecorrelationCallback, ReportingCallback
from hf_dbp.data.feeding import EpochCallback, step_images
from hf_dbp.data.order import EpochSampler, Lanes
from hf_dbp.errors import UserError
from hf_dbp.training.clocked import ClockCallback
from hf_dbp.training.disk import disk_errors
from hf_dbp.training.guards import GuardCallback
from hf_dbp.training.optimizers import checked_schedule
from hf_dbp.training.processes import alone, use_one_gpu
from hf_dbp.training.restoring import (
    MEASURED_SETTINGS,
    advance_schedule,
    best_saved,
    lacking,
    restore_weights,
    tensors_alone,
    warn_of_rise,
)
from hf_dbp.training.saving import (
    UNFINISHED,
    checkpoint_step,
    clear,
    fault,
    last_checkpoint,
    move_files,
    publish,
    rotate,
    whole_checkpoints,
)
from hf_dbp.training.stopping import StopOnSignal, Stopped, end_workers, shield_workers

__all__ = ["ResumingTrainer"]

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=TrainerCallback)
STATE = "trainer_state.json"
MEASURED = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # schedules that follow metric_for_best_model
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")  # settings in the optimizer's groups


class ResumingTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with the saving described above and numerical guards, on one GPU per process.

    Args:
        model, args, kwargs: as for `transformers.Trainer`.
        callbacks: as for `transformers.Trainer`; if they include a `DecorrelationCallback`, R is guarded too.
        max_skipped_steps: the run ends after this many steps in a row that the guards skipped.
    """

    sampler: EpochSampler | None = None
    optimizer: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        callbacks: Sequence[TrainerCallback] | None = None,
        max_skipped_steps: int = 5,
        **kwargs: Any,
    ) -> None:
        if args is not None:
            use_one_gpu(args)
        self.stop, self.guard = StopOnSignal(), GuardCallback(max_skipped_steps)
        super().__init__(model, args, *rest, callbacks=[*(callbacks or ()), self.stop, self.guard], **kwargs)
        if isinstance(self.model, ViTMAEForPreTraining):  # its loss is a mean over images and needs no labels
            self.model_accepts_loss_kwargs, self.can_return_loss = False, True
        self._unfinished: Path | None = None
        self.run_folder = Path(self.args.output_dir)  # in a search, the folder of the trial
        self.saved: set[int] = set()  # steps of the checkpoints that this run has saved
        self.restored: int | None = None  # step of the best checkpoint, once its weights are restored

    def skipped_steps(self) -> dict[str, Any]:
        """``skipped_steps``: how many, including those before a resume; ``skipped``: the first hundred, with cause and
        layer."""
        return self.guard.skipped_steps(self.state)

    def callbacks_of(self, kind: type[C]) -> list[C]:
        """This Trainer's callbacks of one class."""
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, kind)]

    @property
    def weights_step(self) -> int:
        """The step after which the model had its current weights."""
        return self.state.global_step if self.restored is None else self.restored

    def use_sampler(self, sampler: EpochSampler) -> None:
        """Draw the training images in this order."""
        self.sampler = sampler
        self.add_callback(EpochCallback(sampler))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def get_train_dataloader(self) -> Any:
        """The stock loader, whose workers leave signals to the run (schedulers send them to the whole group)."""
        if self._train_batch_size != self.args.train_batch_size:
            self._note_batch(self._train_batch_size)
        loader = super().get_train_dataloader()
        shield_workers(loader.base_dataloader)
        return loader

    # ---- training ----

    def _note_batch(self, size: int) -> None:
        """`auto_find_batch_size` has found another batch per device: treat it as the requested one from now on.

        Raises:
            UserError: the old batch had already fitted for some steps, which the stock Trainer would repeat.
        """
        asked, step = self.args.per_device_train_batch_size, self.state.global_step
        if step:
            raise UserError(
                f"--auto_find_batch_size: {asked} images per device fitted for {step} steps but no longer do; start "
                f"over in another --output_dir with --per_device_train_batch_size {size}"
            )
        logger.warning("%d images per device do not fit: --per_device_train_batch_size is now %d", asked, size)
        self.args.per_device_train_batch_size = size
        self.optimizer = None  # its learning rate may depend on the batch
        if self.sampler is not None:
            self.sampler.step_images = step_images(self.args) if self.args.dataloader_drop_last else 1
            self.sampler.lanes = Lanes(self.sampler.lanes.count, size)
        self.batch_found(asked, size)

    def batch_found(self, asked: int, found: int) -> None:
        """Called when the batch per device differs from the requested one, so a task can update what depends on it."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        kind, given = self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs
        if kind in MEASURED and self.args.greater_is_better:  # both wait for a lower value by themselves
            self.args.lr_scheduler_kwargs = {"mode": "max", **(given or {})}
        schedule = checked_schedule(
            lambda steps: super(ResumingTrainer, self).create_scheduler(steps, optimizer), self.args, num_training_steps
        )
        for group in self.optimizer.param_groups:  # not every schedule records its peak
            group.setdefault("initial_lr", group["lr"])
        return schedule

    def weights_as_evaluated(self) -> None:
        """Give the model the weights to evaluate and save; a schedule-free optimizer trains with others."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Loss of a micro-batch; after the last one of a step, the guards check the step before gradients are
        clipped."""
        seen = self.guard.micro_batches
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.guard.micro_batches == seen:  # the model did not compute the loss
            loss = self.guard.note(loss, self._prepare_inputs(inputs))
        if self.accelerator.sync_gradients:
            self.guard.judge(self.args, self.state, scaled=self.accelerator.scaler is not None)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            for callback in self.callbacks_of(ReportingCallback):
                logs |= callback.figures(self.state)
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs: Any) -> Any:
        """Like the stock method; ``True`` means the last complete checkpoint.

        Raises:
            UserError: ``True`` but there is none, the folder holds checkpoints of another run, or another process
                trains there.
            SystemExit: SIGTERM (status 143) or SIGINT (130) arrived; the checkpoint is saved.
        """
        self.run_folder = Path(super()._get_output_dir(trial))
        with alone(self.args, self.run_folder):
            return self._train(resume_from_checkpoint, trial, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, trial: Any, **kwargs: Any) -> Any:
        resume_from_checkpoint = self.named_checkpoint(resume_from_checkpoint)
        self._begin(resume_from_checkpoint)
        self.before_training(resume_from_checkpoint)
        for callback in self.callbacks_of(ReportingCallback):
            callback.asked = True
        for decorrelation in self.callbacks_of(DecorrelationCallback):
            decorrelation.restorable, self.guard.decorrelation = True, decorrelation
        if self.args.should_save:
            clear(self.run_folder / UNFINISHED)
        try:
            with self.stop.listening():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, trial=trial, **kwargs)
        except Stopped as stopped:
            self.callback_handler.on_train_end(
                self.args, self.state, self.control
            )  # so that reporters close their files
            if self.is_world_process_zero():
                of = f" of {self.state.max_steps}" if getattr(self.args, "budget", None) is None else ""
                print(
                    f"stopped by {stopped} after step {self.state.global_step}{of}; "
                    f"the same command resumes from {self.checkpoint}",
                    file=sys.stderr,
                )
            traceback.clear_frames(
                stopped.__traceback__
            )  # else they keep the DDP model alive after its group has ended
            raise SystemExit(stopped.status) from None
        finally:
            self.guard.release()
            end_workers(self.accelerator._dataloaders)
            for clock in self.callbacks_of(ClockCallback):
                clock.stop()

    def before_training(self, checkpoint: str | None) -> None:
        """Called before a new run starts (None) or resumes from a checkpoint, so a task can compare and adopt its
        record.

        Raises:
            UserError: the checkpoint belongs to another run.
        """

    def _begin(self, checkpoint: str | None) -> None:
        """Note which checkpoints belong to this run: none yet, or those up to the one it resumes from.

        Raises:
            UserError: a new run would save among the checkpoints of another.
        """
        self.restored, there = None, whole_checkpoints(self.run_folder)
        step = None if checkpoint is None else checkpoint_step(Path(checkpoint))
        if checkpoint is not None and Path(checkpoint).resolve().parent == self.run_folder.resolve():
            self.saved = {other for other in there if step is not None and other <= step}
            return
        self.saved = set()
        if there and self.args.save_strategy != SaveStrategy.NO:
            raise UserError(
                f"{self.run_folder} holds checkpoints of another run, up to step {max(there)}: resume from them with "
                f"resume_from_checkpoint=True, or choose another output_dir"
            )

    def named_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """What `train` resumes from: for ``True`` the last complete checkpoint, or a UserError if there is none."""
        if resume_from_checkpoint is not True:
            return resume_from_checkpoint or None
        last = last_checkpoint(self.run_folder)
        if last is None:
            raise UserError(f"no complete checkpoint in {self.run_folder}")
        return last

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- saving ----

    def before_saving(self) -> None:
        """Called in all processes before a checkpoint is written, so a task can update the record for it."""

    @property
    def checkpoint(self) -> Path:
        """The folder for a checkpoint of this step."""
        return self.run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

    @contextmanager
    def _writing(self, folder: Path, what: str) -> Iterator[Path]:
        """A temporary folder in ``folder`` to write into before the result gets its name; it leaves no trace."""
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
        self.weights_as_evaluated()  # in all processes
        self.before_saving()
        before = self.state.best_model_checkpoint
        with self._writing(run, str(checkpoint)) as unfinished:
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()
            self.saved.add(self.state.global_step)
            best = best_saved(self.args, self.state, self.saved, checkpoint, before)
            self.state.best_model_checkpoint = None if best is None else str(best)
            if self.args.should_save:
                self.state.save_to_json(
                    str(unfinished / checkpoint.name / STATE)
                )  # with the final name of the best checkpoint
                publish(unfinished / checkpoint.name, checkpoint)
                rotate(run, self.args.save_total_limit, {checkpoint, best or checkpoint})
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # otherwise once it has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save model and image processor under current key names, which a resume can restore."""
        if not self.args.should_save:
            return
        self.weights_as_evaluated()
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
        """Load states from the checkpoint but settings from the current arguments, so a lower learning rate has an
        effect."""
        settings = [{key: group[key] for key in SETTINGS if key in group} for group in self.optimizer.param_groups]
        lost = lacking(checkpoint) if checkpoint else []
        if lost:
            lack = f"{checkpoint} lacks {' and '.join(lost)}"
            advance_schedule(self.lr_scheduler, self.optimizer, self.state.global_step, lack)
            return
        schedule = dict(vars(self.lr_scheduler))
        with tensors_alone(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            if setting.get("initial_lr") and group.get("initial_lr"):
                group["lr"] *= setting["initial_lr"] / group["initial_lr"]
            group.update(setting)
        if isinstance(self.lr_scheduler, LambdaLR):
            self.lr_scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            by_steps = getattr(self.args, "budget", None) is None  # a budget's schedule is not set yet
            if checkpoint and by_steps and self.is_world_process_zero():
                warn_of_rise(self.lr_scheduler, self.optimizer)
        else:  # based on measurements: settings such as factor and patience are the current ones
            self.lr_scheduler.__dict__ |= {name: schedule[name] for name in schedule if name in MEASURED_SETTINGS}
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # for the logs

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
        self.weights_as_evaluated()
        self.restored = checkpoint_step(Path(best))
        restore_weights(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), best)
