"""`SegmentationTrainer`: transformers' Trainer for UperNet and EoMT.

It adds what the stock Trainer lacks here:
- the loss is a mean over the whole batch (of UperNet over its labelled pixels, of EoMT over its masks and queries):
  each micro-batch and each process is weighted by its share of them, so accumulation and several processes give the
  gradient of one batch; a micro-batch without labelled pixels weighs 0 (UperNet's stock loss would be NaN);
- evaluation on whole images at label resolution, every image once for any number of processes;
- what all fine-tuning shares (`FinetuningTrainer`): layer-wise learning rates, arguments in checkpoints, the clock.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from hf_dbp.downstream.finetuning import FinetuningTrainer
from hf_dbp.downstream.segmentation.arguments import GROUPS
from hf_dbp.downstream.segmentation.detection import ImageFigures, image_figures
from hf_dbp.downstream.segmentation.heads import check_crop, segmenter, training_loss
from hf_dbp.downstream.segmentation.inference import WholeImages, count_pixels
from hf_dbp.downstream.segmentation.mean_iou import SegmentationScores, scores_from_confusion
from hf_dbp.downstream.segmentation.upernet import synchronize_batch_norm
from hf_dbp.errors import UserError

__all__ = ["SegmentationTrainer"]


class SegmentationTrainer(FinetuningTrainer):
    """Trainer of a stock UperNet or EoMT.

    Args:
        crop_size: side of the crops that the model is trained and evaluated on, a multiple of the patch size.
        criterion: training loss of logits and labels, a mean over the labelled pixels, in place of UperNet's own.
        kwargs: as for `FinetuningTrainer`; `train_dataset` is a `TrainingCrops` (None to evaluate only), `eval_dataset`
            a `WholeImages`.

    Raises:
        UserError: sizes that cannot be trained on.
    """

    groups = GROUPS

    def __init__(
        self, *, crop_size: int, criterion: Callable[[Tensor, Tensor], Tensor] | None = None, **kwargs: Any
    ) -> None:
        model, args = kwargs["model"], kwargs["args"]
        check_crop(model, crop_size)
        self.loss, self.crop_size = training_loss(model, criterion), crop_size
        synchronize_batch_norm(model, args.world_size, args.device)
        model.supports_gradient_checkpointing = True  # the layers of the encoder do, although the classes deny it
        super().__init__(**kwargs)
        self.scores: SegmentationScores | None = None
        self.confusion_KK = np.zeros((model.config.num_labels,) * 2, dtype=np.int64)
        self.images: list[ImageFigures] = []

    def check_batches(self) -> None:
        normalised = any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules())  # not synchronised
        if self.args.per_device_train_batch_size == 1 and normalised:
            raise UserError(
                "per_device_train_batch_size is 1: UperNet normalises a 1 x 1 map over the batch, which takes at least "
                "2 images; use 2 or more (--gradient_checkpointing or a smaller --crop_size saves memory)"
            )
        super().check_batches()
        images, batch = len(self.train_dataset), self.args.train_batch_size
        alone = images % batch == 1 and self.args.world_size == 1  # several processes fill up their last batches
        if not self.args.dataloader_drop_last and alone and normalised:
            raise UserError(
                f"{images} training images in batches of {batch} leave a single image, which UperNet cannot "
                f"normalise; choose another --per_device_train_batch_size, or leave out --dataloader_drop_last false"
            )

    # ---- loss ----

    def labelled(self, labels: Tensor) -> Tensor:
        """What the loss is a mean over, see `hf_dbp.downstream.segmentation.losses.TrainingLoss`."""
        return self.loss.labelled(labels)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This micro-batch's part of the mean over the step, scaled for the means of Trainer and DDP."""
        share = self.step_share(inputs["labels"], num_items_in_batch)
        done = self.state.global_step / max(1, self.state.max_steps) if self.budget is None else self.budget.progress()
        loss, outputs = self.loss(model, inputs, share, done)
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: WholeImages | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and scores over all pixels of all whole images of all processes."""
        self.weights_as_evaluated()
        start, model = time.perf_counter(), self.accelerator.unwrap_model(self.model_wrapped).eval()
        if self.args.world_size > 1:  # running statistics differ between CPU processes; those of process 0 are saved
            broadcast(list(model.buffers()))
        with self.compute_loss_context_manager():
            counts = count_pixels(
                segmenter(model),
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
