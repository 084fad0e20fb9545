"""Flags of `hf-dbp classify`: which images, which encoder, how it is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, ClassVar

from hf_dbp.data.arguments import SubsetFlags
from hf_dbp.data.classes import ClassSource
from hf_dbp.downstream.class_weights import WEIGHTS
from hf_dbp.downstream.encoder import EncoderArguments
from hf_dbp.errors import UserError
from hf_dbp.natures import Nature
from hf_dbp.training.arguments import FINETUNED, RunArguments

__all__ = ["GROUPS", "ClassificationArguments", "DataArguments", "ModelArguments"]

SELECTED_BY = ("accuracy", "balanced_accuracy", "loss")


@dataclass
class DataArguments(SubsetFlags):
    """Which images of which classes."""

    train_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder with one folder of images per class, or of parquet files; or a CSV file of paths and "
            "labels."
        },
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images, or of a CSV file's paths (default: image)."}
    )
    label_column_name: Annotated[str | None, Nature("data")] = field(
        default=None, metadata={"help": "Column of the classes, names or whole numbers (default: label or class)."}
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of each class held out for validation if there is no validation split."}
    )

    def source(self, cache_dir: str | None, token: str | None) -> ClassSource:
        """The data flags. UserError for impossible values."""
        return ClassSource(**asdict(self), cache_dir=cache_dir, token=token, seed=self.subset_seed)


@dataclass
class ModelArguments(EncoderArguments):
    """Which encoder the classifier starts from, and what it sees."""

    image_size: Annotated[list[int] | None, Nature("model")] = field(
        default=None,
        metadata={"help": "Input size in pixels, one number or height and width (default: the ViT's, else 224)."},
    )
    drop_path: Annotated[float, Nature("model", card="chance at which the last layer is skipped")] = field(
        default=0.1, metadata={"help": "Probability of skipping the last layer in training; lower for earlier layers."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None and len(self.image_size) > 2:
            raise UserError(f"--image_size takes one number or height and width, got {self.image_size}")
        if not 0.0 <= self.drop_path < 1.0:
            raise UserError(f"--drop_path is a probability from 0 to below 1, got {self.drop_path}")

    @property
    def size(self) -> tuple[int, int] | None:
        """The requested height and width."""
        return None if self.image_size is None else (self.image_size[0], self.image_size[-1])


@dataclass
class ClassificationArguments(RunArguments):
    """TrainingArguments with He et al.'s fine-tuning as defaults; accuracy decides the best checkpoint."""

    STOCK: ClassVar[dict[str, Nature]] = FINETUNED | {
        "label_smoothing_factor": Nature("training", "told", card="label smoothing")
    }

    output_dir: str = field(default="outputs/classifier", metadata={"help": "Where everything is written."})
    base_learning_rate: Annotated[float, Nature("nothing")] = field(
        default=5e-4, metadata={"help": "learning_rate = base_learning_rate x total batch / 256."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate, instead of --base_learning_rate."}
    )
    layer_decay: Annotated[
        float, Nature("training", "refused", card="factor of the learning rate per layer below the heads")
    ] = field(
        default=0.65,
        metadata={"help": "Factor of the learning rate per layer below the head (He et al.: 0.65 to 0.75)."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(  # type: ignore[assignment]
        default=0.05, metadata={"help": "Steps of warm-up, or a share of them below 1 (He et al.: 5 of 100 epochs)."}
    )
    num_train_epochs: float = field(default=100.0, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per device in evaluation."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0, as in He et al., for none."})
    label_smoothing_factor: float = field(
        default=0.1, metadata={"help": "Share of each target that is spread over all classes."}
    )
    mixup: Annotated[float, Nature("training", "told", card="alpha of mixup")] = field(
        default=0.8, metadata={"help": "alpha of mixup; 0 for none."}
    )
    cutmix: Annotated[float, Nature("training", "told", card="alpha of cutmix")] = field(
        default=1.0, metadata={"help": "alpha of cutmix; 0 for none."}
    )
    crop_scale: Annotated[float, Nature("training", "told", card="least share of an image in a view")] = field(
        default=0.08,
        metadata={"help": "Smallest share of an image that a training view shows; 1 for nearly all of it."},
    )
    flip: Annotated[float, Nature("training", "told", card="chance of a flip from left to right")] = field(
        default=0.5, metadata={"help": "Probability of flipping a training view left to right."}
    )
    randaugment_operations: Annotated[int, Nature("training", "told", card="operations of RandAugment")] = field(
        default=2, metadata={"help": "Operations of RandAugment on each view; 0 for none."}
    )
    randaugment_magnitude: Annotated[float, Nature("training", "told", card="magnitude of RandAugment, of 10")] = field(
        default=9.0, metadata={"help": "Their magnitude, 0 to 10."}
    )
    random_erasing: Annotated[float, Nature("training", "told", card="chance of random erasing")] = field(
        default=0.25, metadata={"help": "Probability of turning a part of a view into noise."}
    )
    class_weights: Annotated[str, Nature("training", "told", card="weights of the classes")] = field(
        default="none",
        metadata={
            "help": "Weights of the classes in the loss: one over their share of the images, or its square root.",
            "choices": list(WEIGHTS),
        },
    )
    balanced_sampling: Annotated[bool, Nature("training", "told", card="every class shown equally often")] = field(
        default=False, metadata={"help": "Show every class equally often in training."}
    )
    metric_for_best_model: str | None = field(
        default="accuracy", metadata={"help": "Metric that decides the best checkpoint.", "choices": list(SELECTED_BY)}
    )

    def __post_init__(self) -> None:
        for name in ("flip", "random_erasing", "label_smoothing_factor", "crop_scale"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"--{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.crop_scale == 0.0 or self.label_smoothing_factor == 1.0:
            raise UserError("--crop_scale is above 0 and --label_smoothing_factor below 1")
        for name in ("mixup", "cutmix", "randaugment_operations"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} is not negative, got {getattr(self, name)}")
        if not 0.0 <= self.randaugment_magnitude <= 10.0:
            raise UserError(f"--randaugment_magnitude is from 0 to 10, got {self.randaugment_magnitude}")
        if self.balanced_sampling and self.class_weights != "none":
            raise UserError("give --balanced_sampling or --class_weights, not both: each compensates for rare classes")
        name = str(self.metric_for_best_model).removeprefix("eval_")
        if name not in SELECTED_BY:
            raise UserError(f"--metric_for_best_model is {' or '.join(SELECTED_BY)}, got {name}")
        self.metric_for_best_model, self.greater_is_better = f"eval_{name}", name != "loss"
        self.absolute_learning_rate = self.learning_rate
        self.learning_rate = self.learning_rate or self.base_learning_rate  # TrainingArguments needs a number
        super().__post_init__()
        self.scale_learning_rate()

    def scale_learning_rate(self) -> None:
        """Scale the learning rate with the batch, unless it was given directly."""
        if self.absolute_learning_rate is None:
            total = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
            self.learning_rate = self.base_learning_rate * total / 256


GROUPS = (ModelArguments, DataArguments, ClassificationArguments)
