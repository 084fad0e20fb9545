"""`ClassificationTrainer`: transformers' Trainer for an image classifier.

It adds what the stock Trainer lacks here:
- mixup, cutmix, smoothed and weighted targets, drawn from (seed, step, micro-batch, process), so a resumed run draws
  the same;
- evaluation into counts: every image once for any number of processes, and no logits are kept;
- what all fine-tuning shares (`FinetuningTrainer`): layer-wise learning rates, arguments in checkpoints, the clock.

Shapes: B images of a batch; K classes.
"""

from __future__ import annotations

import dataclasses
import heapq
import time
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_dbp.downstream.classification.arguments import GROUPS, ClassificationArguments
from hf_dbp.downstream.classification.augmentation import Mixing
from hf_dbp.downstream.classification.metrics import ClassificationScores, Scores, Tally
from hf_dbp.downstream.finetuning import FinetuningTrainer

__all__ = ["ClassificationTrainer", "Mistake"]

MIX = 0x6D6978  # separates the draws of mixing from those of views
SHOWN = 12  # mistakes kept


@dataclasses.dataclass(frozen=True, order=True)
class Mistake:
    """A wrong prediction: its probability, the index of the validation image, the predicted and the true class."""

    confidence: float
    index: int
    predicted: int
    true: int


class ClassificationTrainer(FinetuningTrainer):
    """Trainer of a stock image classifier over a BEiT.

    Args:
        mixing: mixes a training batch; None to evaluate only.
        kwargs: as for `FinetuningTrainer`; `train_dataset` is a `TrainingViews`, `eval_dataset` a `CentralViews`.

    Attributes:
        tally: counts of the last evaluation.
        mistakes: its most confident mistakes, most confident first.

    Raises:
        UserError: there are fewer images than a step takes.
    """

    groups = GROUPS

    def __init__(self, *, mixing: Mixing | None = None, **kwargs: Any) -> None:
        self.mixing = mixing
        super().__init__(**kwargs)
        self.tally = Tally(self.model.config.num_labels)
        self.mistakes: list[Mistake] = []
        self._mixed = (-1, 0)  # step, and number of its micro-batches already mixed

    def batch_found(self, asked: int, found: int) -> None:
        super().batch_found(asked, found)
        if isinstance(self.args, ClassificationArguments):
            self.args.scale_learning_rate()
            self.arguments = {**self.arguments, "learning_rate": self.args.learning_rate}

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """This micro-batch's share of the mean over the step's images of -sum_k t_k log p_k."""
        pixels_BCHW, targets_BK = inputs["pixel_values"], inputs["labels"]
        if self.mixing is not None and self.is_in_train:
            step, done = self.state.global_step, self._mixed[1] if self._mixed[0] == self.state.global_step else 0
            rng = np.random.default_rng((self.args.seed, MIX, step, done, self.args.process_index))
            self._mixed = (step, done + 1)
            pixels_BCHW, targets_BK = self.mixing(pixels_BCHW, targets_BK, rng)
        outputs = model(pixel_values=pixels_BCHW)
        loss = nn.functional.cross_entropy(outputs.logits.float(), targets_BK)
        loss = loss * self.step_share(inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and figures over all images of all processes."""
        self.weights_as_evaluated()
        start, model = time.perf_counter(), self.accelerator.unwrap_model(self.model_wrapped).eval()
        metric, mistakes = ClassificationScores(model.config.num_labels), list[Mistake]()
        for items in self.get_eval_dataloader(eval_dataset):
            known = [item for item in items if item is not None]
            if not known:
                continue
            indices, pixels, labels = zip(*known, strict=True)
            labels_B = torch.tensor(labels, device=self.args.device)
            with self.compute_loss_context_manager():
                logits_BK = model(pixel_values=torch.stack(pixels).to(self.args.device)).logits.float()
            metric.add_batch(predictions=logits_BK, references=labels_B)
            mistakes = heapq.nlargest(SHOWN, [*mistakes, *wrong(logits_BK, indices, labels)])
        counts = torch.from_numpy(metric.tally.vector()).to(self.args.device)
        vector = self.accelerator.reduce(counts, reduction="sum").cpu().numpy()
        self.tally = Tally.of(vector, model.config.num_labels)
        self.mistakes = heapq.nlargest(SHOWN, gather_object(mistakes))
        scores: Scores = self.tally.scores()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items() if isinstance(value, float)}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def wrong(logits_BK: Tensor, indices: tuple[int, ...], labels: tuple[int, ...]) -> list[Mistake]:
    """The wrong predictions of a batch."""
    confidence_B, predicted_B = logits_BK.softmax(dim=1).max(dim=1)
    rows = zip(confidence_B.tolist(), indices, predicted_B.tolist(), labels, strict=True)
    return [Mistake(*row) for row in rows if row[2] != row[3]]
