"""`SegmentationTrainer`: transformers' Trainer for UperNet.

It adds what the stock Trainer gets wrong or lacks here:
- the loss is the mean over the labelled pixels of the whole batch: each micro-batch and each process weighs by its
  share of them, so that accumulation and several processes give one batch's gradient; a micro-batch that is all void
  weighs 0 (the stock loss would be NaN);
- crops are drawn by `EpochSampler`: they follow from (seed, epoch, image);
- layer-wise learning-rate decay;
- evaluation over whole images at label resolution, every image once whatever the number of processes;
- the run's arguments in every checkpoint: with another encoder, data, crop, seed or optimizer no run goes on from it,
  other changes are told;
- saving, stopping and resuming, which pre-training shares (`ResumingTrainer`), and the clock of training alone.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import UperNetForSemanticSegmentation

from hf_dbp.data.feeding import make_sampler, step_images
from hf_dbp.downstream.segmentation.detection import ImageFigures, image_figures
from hf_dbp.downstream.segmentation.inference import WholeImages, count_pixels
from hf_dbp.downstream.segmentation.mean_iou import SegmentationScores, scores_from_confusion
from hf_dbp.downstream.segmentation.upernet import parameter_groups, synchronize_batch_norm
from hf_dbp.errors import UserError
from hf_dbp.records import read_arguments, write_json
from hf_dbp.training.clocked import ClockCallback
from hf_dbp.training.measurement import Meter
from hf_dbp.training.restoring import SHAPING, compared_arguments, noted_changes
from hf_dbp.training.resuming import ResumingTrainer
from hf_dbp.training.stopping import shield_workers

__all__ = ["SegmentationTrainer"]

ARGUMENTS = "arguments.json"
FIXED = (
    "model_name_or_path", "model_revision", "model_size", "from_scratch", "dataset_name", "dataset_config_name",
    "train_dir", "train_mask_dir", "validation_dir", "validation_mask_dir", "mask_suffix", "palette", "channel_files",
    "image_column_name", "annotation_column_name", "num_labels", "id2label", "ignore_index", "reduce_labels",
    "train_fraction", "max_train_samples", "max_eval_samples", "train_val_split", "subset_seed", "num_channels",
    "built_in_size", "crop_size", "seed", "optim", "layer_decay",
)  # fmt: skip
SHAPING_TOO = (
    "long_edge", "per_device_train_batch_size", "gradient_accumulation_steps", "loss", "class_weights", "rare_crops",
    "rare_classes",
)  # fmt: skip


class SegmentationTrainer(ResumingTrainer):
    """Trainer of a stock UperNet.

    Args:
        crop_size: side of the crops that the model is trained and evaluated on, a multiple of the patch size.
        layer_decay: as in `parameter_groups`.
        criterion: loss in training of logits and labels, a mean over the labelled pixels; default: UperNet's own.
        arguments: what the run was given, by name, to be kept in its checkpoints and compared on resume.
        meter: measures this node's energy; None in all but one process of a node.
        energy: the meter's description, with the carbon intensity; empty where there is no meter.
        kwargs: as for `transformers.Trainer`; `train_dataset` is a `TrainingCrops` (None to evaluate
            alone), `eval_dataset` a `WholeImages`.

    Raises:
        ValueError: sizes that cannot be trained on.
    """

    optimizer: torch.optim.Optimizer | None
    control: Any

    def __init__(
        self,
        *,
        crop_size: int,
        layer_decay: float = 1.0,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        arguments: Mapping[str, Any] | None = None,
        meter: Meter | None = None,
        energy: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.criterion = criterion
        self.crop_size, self.layer_decay, self.arguments = crop_size, layer_decay, arguments or {}
        self.resumed_with: dict[str, Any] = {}
        self.paid: dict[str, float] = {}  # `costs` at the last checkpoint
        model: UperNetForSemanticSegmentation = kwargs["model"]
        args = kwargs["args"]
        synchronize_batch_norm(model, args.world_size, args.device)
        model.accepts_loss_kwargs = False
        model.supports_gradient_checkpointing = True  # its backbone does; UperNet's own class says no
        super().__init__(**kwargs)
        self.cost = ClockCallback(meter, energy)
        self.add_callback(self.cost)
        patch = model.config.backbone_config.patch_size
        if crop_size % patch:
            raise UserError(f"crop_size {crop_size} is no multiple of the patch size {patch}")
        if self.train_dataset is not None:
            self._check_batches(model)
            self.use_sampler(make_sampler(self.train_dataset.images, args))
        self.scores: SegmentationScores | None = None
        self.confusion_KK = np.zeros((model.config.num_labels,) * 2, dtype=np.int64)
        self.images: list[ImageFigures] = []

    def _check_batches(self, model: UperNetForSemanticSegmentation) -> None:
        synchronized = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        if self.args.per_device_train_batch_size == 1 and not synchronized:
            raise UserError(
                "per_device_train_batch_size is 1: UperNet normalises a 1 x 1 map over the batch, which takes at least "
                "2 images; use 2 or more (--gradient_checkpointing or a smaller --crop_size saves memory)"
            )
        images, batch, step = len(self.train_dataset), self.args.train_batch_size, step_images(self.args)
        if self.args.dataloader_drop_last and images < step:
            raise UserError(
                f"{images} training images do not fill one step of {step}; "
                "lower --per_device_train_batch_size or --gradient_accumulation_steps"
            )
        alone = images % batch == 1 and self.args.world_size == 1  # several processes fill their last batches
        if not self.args.dataloader_drop_last and alone:
            raise UserError(
                f"{images} training images in batches of {batch} leave one image alone, which UperNet cannot "
                "normalise; choose another --per_device_train_batch_size, or leave out --dataloader_drop_last false"
            )

    # ---- arguments in checkpoints ----

    def before_training(self, checkpoint: str | None) -> None:
        """Take over what the checkpoint says of earlier changes and costs, and add the changes of now.

        Raises:
            ValueError: an argument of `FIXED` differs: the checkpoint is of another model, not of this one begun.
        """
        self.resumed_with, spent = {}, dict[str, float]()
        if checkpoint is not None and (Path(checkpoint) / ARGUMENTS).is_file():
            before, self.resumed_with, spent = read_arguments(Path(checkpoint) / ARGUMENTS)
            known = [name for name in FIXED if name in before and name in self.arguments]
            fixed = {name: (before[name], self.arguments[name]) for name in known}
            changed = compared_arguments(before, self.arguments, fixed, (*SHAPING, *SHAPING_TOO), checkpoint)
            tell = self.is_world_process_zero()
            self.resumed_with = noted_changes(changed, self.resumed_with, checkpoint, tell=tell)
        self.cost.preset(spent, kwh=self.is_world_process_zero())

    def before_saving(self) -> None:
        self.paid = self.cost.costs(self.args)  # over all processes, of which one writes

    def _write_model(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        super()._write_model(folder, state_dict)
        if folder != self._unfinished:  # a checkpoint; at the end eval.json has them
            content = {"arguments": self.arguments, "resumed_with": self.resumed_with, "costs": self.paid}
            write_json(folder / ARGUMENTS, content)

    def batch_found(self, asked: int, found: int) -> None:
        self._check_batches(self.model)
        self.arguments = {**self.arguments, "per_device_train_batch_size": found}

    # ---- data and optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = parameter_groups(self.model, self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # ---- loss ----

    def _labelled(self, labels: Tensor) -> Tensor:
        return labels.ne(self.model.config.loss_ignore_index).sum()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of a step, and the number of labelled pixels in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self._labelled(batch["labels"]).to(device) for batch in batches]
        return batches, self.accelerator.reduce(torch.stack(counts).sum(), reduction="sum") if counts else torch.ones(
            ()
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This micro-batch's part of the mean over the step's labelled pixels, scaled for Trainer's and DDP's means."""
        labels_BSS, labelled = inputs["labels"], self._labelled(inputs["labels"])
        if num_items_in_batch is None:
            num_items_in_batch = labelled
        all_void = labelled == 0  # one pixel stands in, so that the loss is finite; it weighs nothing
        labels_BSS = labels_BSS.clone()
        labels_BSS[0, 0, 0] = torch.where(all_void, 0, labels_BSS[0, 0, 0])
        if self.criterion is None or not self.is_in_train:
            outputs = model(**{**inputs, "labels": labels_BSS})
            loss = outputs.loss
        else:
            outputs = model(pixel_values=inputs["pixel_values"])
            loss = self.criterion(outputs.logits, labels_BSS)
        parts = self.current_gradient_accumulation_steps * self.args.world_size if self.is_in_train else 1
        loss = loss * (labelled * parts / num_items_in_batch.clamp(min=1))
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation ----

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader[Any]:
        """This process's share of the validation images: every world_size-th, so that each counts exactly once."""
        data: WholeImages = self.eval_dataset if eval_dataset is None else eval_dataset
        share = torch.utils.data.Subset(data, range(self.args.process_index, len(data), self.args.world_size))
        loader = torch.utils.data.DataLoader(
            share,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=list,
        )
        shield_workers(loader)
        return loader

    def evaluate(
        self, eval_dataset: WholeImages | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and scores over all pixels of all whole images of all processes."""
        self.weights_as_evaluated()
        start, model = time.perf_counter(), self.accelerator.unwrap_model(self.model_wrapped).eval()
        if (
            self.args.world_size > 1
        ):  # running statistics of CPU processes differ; those of process 0 are the saved ones
            broadcast(list(model.buffers()))
        with self.compute_loss_context_manager():
            counts = count_pixels(
                model,
                self.get_eval_dataloader(eval_dataset),
                num_labels=model.config.num_labels,
                ignore_index=model.config.loss_ignore_index,
                crop_size=self.crop_size,
                batch_size=self.args.per_device_eval_batch_size,
            )
        processes, mine = self.args.world_size, self.args.process_index
        self.images = image_figures({mine + processes * number: image for number, image in counts.images.items()})
        confusion = torch.from_numpy(counts.confusion_KK).to(self.args.device)
        self.confusion_KK = self.accelerator.reduce(confusion, reduction="sum").cpu().numpy()
        loss = torch.tensor(counts.loss_sum, dtype=torch.float64, device=self.args.device)
        loss_sum = self.accelerator.reduce(loss, reduction="sum").item()
        self.scores = scores_from_confusion(self.confusion_KK)
        metrics = {
            f"{metric_key_prefix}_loss": loss_sum / self.confusion_KK.sum().item(),
            **{f"{metric_key_prefix}_{name}": score for name, score in self.scores.items() if isinstance(score, float)},
            f"{metric_key_prefix}_runtime": time.perf_counter() - start,
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
