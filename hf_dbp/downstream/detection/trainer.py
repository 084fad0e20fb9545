"""`DetectionTrainer`: transformers' Trainer for RF-DETR.

It adds what the stock Trainer lacks here:
- the loss is the mean over the objects of the whole batch: each micro-batch and each process is weighted by its share
  of them, so accumulation and several processes give the gradient of one batch;
- evaluation by COCO's measures in pixels of the images, every image once for any number of processes;
- what all fine-tuning shares (`FinetuningTrainer`): layer-wise learning rates, arguments in checkpoints, the clock.

RF-DETR's loss of a batch is a sum over its objects divided by their number n (at least 1; the mean over processes).
`compute_loss` multiplies it by n and divides by the number of objects of the step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss import loss_rf_detr
from transformers.loss.loss_rf_detr import RfDetrHungarianMatcher

from hf_dbp.downstream.detection.arguments import GROUPS
from hf_dbp.downstream.detection.coco import Found, Scores, coco_scores
from hf_dbp.downstream.detection.model import STOCK_RATIO
from hf_dbp.downstream.detection.objects import Objects, no_objects
from hf_dbp.downstream.detection.postprocessing import found_in
from hf_dbp.downstream.detection.views import Item, collate, targets
from hf_dbp.downstream.finetuning import FinetuningTrainer
from hf_dbp.errors import UserError

__all__ = ["DetectionTrainer"]

EVALUATION_SEED = 0  # of the points at which RF-DETR compares masks


class DetectionTrainer(FinetuningTrainer):
    """Trainer of a stock RF-DETR.

    Args:
        kwargs: as for `FinetuningTrainer`; `train_dataset` is a `TrainingViews` (None to evaluate only), `eval_dataset`
            a `WholeImages`.

    Attributes:
        scores: those of boxes in the last evaluation; None before.
        mask_scores: those of masks; None if the model finds only boxes.
        found: what was found in each image, by its number.

    Raises:
        UserError: there are fewer images than a step takes.
    """

    groups = GROUPS

    def __init__(self, **kwargs: Any) -> None:
        model = kwargs["model"]
        model.loss_function = guarded(model.loss_function, model.config.class_loss_coefficient)
        super().__init__(data_collator=collate, **kwargs)
        self.scores: Scores | None = None
        self.mask_scores: Scores | None = None
        self.found: dict[int, Found] = {}

    # ---- loss ----

    def labelled(self, labels: Any) -> Tensor:
        """The number of objects."""
        return torch.tensor(sum(len(one["class_labels"]) for one in labels))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the loss of the step, scaled for the means of Trainer and DDP."""
        outputs = model(pixel_values=inputs["pixel_values"], labels=inputs["labels"])
        loss = outputs.loss
        if self.is_in_train and num_items_in_batch is not None:
            groups = self.model.config.group_detr
            here = self.labelled(inputs["labels"]).to(loss.device).float()
            mean = self.accelerator.reduce(here, reduction="mean")
            parts = self.current_gradient_accumulation_steps
            step_mean = num_items_in_batch.to(loss.device) / self.args.world_size
            loss = loss * parts * (mean * groups).clamp(min=1) / (step_mean * groups).clamp(min=1)
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and COCO's figures over all images of all processes."""
        self.weights_as_evaluated()
        start, model = time.perf_counter(), self.accelerator.unwrap_model(self.model_wrapped).eval()
        rows: list[tuple[int, Objects, Found]] = []
        loss_sum, objects = 0.0, 0
        with repeatable(self.args.device), one_group(model):
            for items in self.equally_many(eval_dataset):
                known = [item for item in items if item is not None]
                pixels, labels = batch_of(known, self.args.device, self.size_of(eval_dataset))
                with self.compute_loss_context_manager():
                    output = model(pixel_values=pixels, labels=labels)
                count = self.labelled(labels).to(self.args.device).float()
                mean = self.accelerator.reduce(count, reduction="mean").clamp(min=1)  # RF-DETR's divisor
                if known:
                    loss_sum += float(output.loss) * float(mean)
                    objects += int(count)
                    found = found_in(output, [item.objects.size for item in known])
                    rows += [(item.index, item.objects, one) for item, one in zip(known, found, strict=True)]
        totals = torch.tensor([loss_sum, objects], dtype=torch.float64, device=self.args.device)
        loss_sum, objects = self.accelerator.reduce(totals, reduction="sum").tolist()
        self.judge(sorted(gather_object(rows), key=lambda row: row[0]), model.config.num_labels)
        figures = {"loss": loss_sum / max(objects, 1), **self.figures()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items() if value is not None}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def size_of(self, eval_dataset: Any) -> tuple[int, int, int]:
        """Channels, height and width of the view of an evaluation."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        return len(data.mean), *data.size

    def equally_many(self, eval_dataset: Any) -> Iterator[Any]:
        """This process's batches; some are empty at the end, so that all processes have equally many, as RF-DETR's loss
        is reduced over them."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        share = -(-len(data) // self.args.world_size)
        batches, count = iter(self.get_eval_dataloader(eval_dataset)), -(-share // self.args.per_device_eval_batch_size)
        return (next(batches, []) for _ in range(count))

    def judge(self, rows: Sequence[tuple[int, Objects, Found]], classes: int) -> None:
        """Score the predictions of all processes. UserError if no image could be read."""
        if not rows:
            raise UserError("none of the validation images can be read")
        truth = {index: objects for index, objects, _ in rows}
        self.found = {index: found for index, _, found in rows}
        self.scores = coco_scores(truth, self.found, classes)
        masks = any(objects.runs for objects in truth.values()) and any(found.runs for found in self.found.values())
        self.mask_scores = coco_scores(truth, self.found, classes, masks=True) if masks else None

    def figures(self) -> dict[str, float | None]:
        """The figures of the last evaluation; those of masks begin with ``mask_``."""
        assert self.scores is not None
        masks = {} if self.mask_scores is None else self.mask_scores.figures
        return {**self.scores.figures, **{f"mask_{name}": value for name, value in masks.items()}}


class Matcher(RfDetrHungarianMatcher):  # type: ignore[misc]
    """RF-DETR's matcher at as many points as it has for large images, or as the loss has if those are more.

    The stock one compares masks at 4 x (queries in the batch) / `mask_point_sample_ratio` points, whatever their size.
    With the ratio of small images (`cells_per_point`) these would be many per cell, and take most of a step.
    """

    mask_point_sample_ratio: int

    def forward(self, outputs: Mapping[str, Tensor], targets: Any, group_detr: int) -> Any:
        given, (height, width) = self.mask_point_sample_ratio, outputs["pred_masks"].shape[-2:]
        points = max(height, height * width // given)
        self.mask_point_sample_ratio = max(1, min(STOCK_RATIO, 4 * outputs["logits"].shape[:2].numel() // points))
        found = super().forward(outputs, targets, group_detr)
        self.mask_point_sample_ratio = given
        return found


def guarded(loss_function: Callable[..., Any], class_weight: float) -> Callable[..., Any]:
    """RF-DETR's loss, with a value where the stock one has none.

    - Boxes that are not finite, for which it raises: NaN, so that the guards skip the step.
    - Masks in a batch without objects, for which it is an empty tensor: the loss of the classes, all that there is.
      The masks take part with a factor of 0, as DDP waits for the gradient of every tensor.
    """

    def loss(*outputs: Any, **more: Any) -> Any:
        tensors = [part for part in tensors_in(outputs) if part.requires_grad or part.shape[-1:] == (4,)]
        if not all(bool(part.isfinite().all()) for part in tensors if part.shape[-1:] == (4,)):
            return torch.stack([part.sum() for part in tensors]).sum() * float("nan"), {}, None
        with mock.patch.object(loss_rf_detr, "RfDetrHungarianMatcher", Matcher):
            value, parts, auxiliary = loss_function(*outputs, **more)
        if value.numel() == 0:
            classes = [part for name, part in parts.items() if name.startswith("loss_ce")]
            value = class_weight * torch.stack(classes).sum() + 0 * sum(part.sum() for part in tensors)
        return value, parts, auxiliary

    return loss


def tensors_in(parts: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of RF-DETR's loss, those of masks in lists; labels are mappings."""
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, list):
            yield from tensors_in(part)


def batch_of(
    items: Sequence[Item], device: torch.device, empty: tuple[int, int, int]
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Pixels and labels of a batch; of an image of ``empty`` (C, H, W) without objects if there is none."""
    if not items:
        nothing = targets(no_objects(empty[1:]), (0.0, 0.0, float(empty[2]), float(empty[1])), empty[1:])
        return torch.zeros(1, *empty, device=device), [{name: part.to(device) for name, part in nothing.items()}]
    labels = [{name: part.to(device) for name, part in item.labels.items()} for item in items]
    return torch.stack([item.pixels for item in items]).to(device), labels


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Draw the same numbers in every evaluation, and leave those of training as they are."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(EVALUATION_SEED)
        yield


@contextlib.contextmanager
def one_group(model: PreTrainedModel) -> Iterator[None]:
    """Let the loss see one group of queries, as the model has it in evaluation: the stock loss takes those of
    training."""
    groups, model.config.group_detr = model.config.group_detr, 1
    try:
        yield
    finally:
        model.config.group_detr = groups
