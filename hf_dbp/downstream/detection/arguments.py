"""Flags of `hf-dbp detect`: which images with which objects, which encoder, how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from hf_dbp.data.arguments import FolderFlags, fields_of
from hf_dbp.downstream.detection.data import ObjectSource
from hf_dbp.downstream.encoder import EncoderArguments
from hf_dbp.downstream.segmentation.source import LabelFlags
from hf_dbp.errors import UserError
from hf_dbp.natures import Nature
from hf_dbp.training.arguments import FINETUNED, RunArguments

__all__ = ["GROUPS", "DataArguments", "DetectionArguments", "ModelArguments"]

SELECTED_BY = ("map", "map_50", "mask_map", "mask_map_50", "loss")


@dataclass
class DataArguments(LabelFlags, FolderFlags):
    """Which images with which objects."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of images, or of parquet files with images and masks."}
    )
    train_mask_dir: str | None = field(
        default=None,
        metadata={
            "help": "Labels of the images: a COCO or CVAT file, or a folder of YOLO or LabelMe files; or a folder of "
            "masks, of which each connected part of a class is an object."
        },
    )
    classes: Annotated[list[str] | None, Nature("data")] = field(
        default=None, metadata={"help": "Names of the classes to find (default: all; of masks all but id 0)."}
    )
    min_area: Annotated[int, Nature("data", card="least pixels of an object")] = field(
        default=0, metadata={"help": "Leave out objects with fewer pixels, such as specks in masks."}
    )

    def source(self, cache_dir: str | None, token: str | None, instances: bool = False) -> ObjectSource:
        """The data flags. UserError for impossible values."""
        fields = fields_of(ObjectSource, self)
        return ObjectSource(**fields, cache_dir=cache_dir, token=token, seed=self.subset_seed, instances=instances)


@dataclass
class ModelArguments(EncoderArguments):
    """Which encoder the detector starts from, what it sees, and what it finds."""

    instances: Annotated[bool, Nature("model", card="finds masks too")] = field(
        default=False, metadata={"help": "Find the mask of every object too (instance segmentation)."}
    )
    image_size: Annotated[list[int] | None, Nature("model")] = field(
        default=None,
        metadata={
            "help": "Size in pixels to which images are resized, one number or height and width (default: twice the "
            "ViT's own; 448 without a ViT). Larger finds smaller objects."
        },
    )
    num_queries: Annotated[int | None, Nature("model")] = field(
        default=None,
        metadata={"help": "Objects that can be found in an image (default: 300, or the number of patches if less)."},
    )
    query_groups: Annotated[int, Nature("model")] = field(
        default=13, metadata={"help": "Copies of the queries in training; fewer are faster and learn more slowly."}
    )
    decoder_layers: Annotated[int, Nature("model")] = field(default=3, metadata={"help": "Layers of the decoder."})
    decoder_width: Annotated[int, Nature("model")] = field(
        default=256, metadata={"help": "Width of the decoder, a multiple of 32."}
    )
    num_windows: Annotated[int, Nature("model")] = field(
        default=1,
        metadata={
            "help": "Windows per side of the image that most layers of the encoder attend within, which is faster for "
            "large images; 1: all attend to the whole image, as in pre-training."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size is not None and len(self.image_size) > 2:
            raise UserError(f"--image_size takes one number or height and width, got {self.image_size}")
        for name in ("query_groups", "decoder_layers", "num_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is a positive number, got {getattr(self, name)}")

    @property
    def size(self) -> tuple[int, int] | None:
        """The requested height and width."""
        return None if self.image_size is None else (self.image_size[0], self.image_size[-1])


@dataclass
class DetectionArguments(RunArguments):
    """TrainingArguments with defaults close to RF-DETR's; mean average precision decides the best checkpoint."""

    STOCK: ClassVar[dict[str, Nature]] = FINETUNED

    output_dir: str = field(default="outputs/detector", metadata={"help": "Where everything is written."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate (RF-DETR: 1e-4)."})
    layer_decay: Annotated[
        float, Nature("training", "refused", card="factor of the learning rate per layer below the decoder")
    ] = field(default=0.8, metadata={"help": "Factor of the learning rate per layer below the decoder (RF-DETR: 0.8)."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay, except on biases and norms."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(  # type: ignore[assignment]
        default=0.05, metadata={"help": "Steps of warm-up, or a share of them below 1."}
    )
    num_train_epochs: float = field(default=50.0, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Images per device and micro-batch."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Images per device in evaluation."})
    max_grad_norm: float = field(default=0.1, metadata={"help": "Gradient clipping (RF-DETR: 0.1); 0 for none."})
    crop_scale: Annotated[float, Nature("training", "told", card="least share of an image in a view")] = field(
        default=0.3,
        metadata={"help": "Smallest share of an image that a training view shows; 1 for nearly all of it."},
    )
    flip: Annotated[float, Nature("training", "told", card="chance of a flip from left to right")] = field(
        default=0.5, metadata={"help": "Probability of flipping a training view left to right."}
    )
    metric_for_best_model: str | None = field(
        default="map", metadata={"help": "Metric that decides the best checkpoint.", "choices": list(SELECTED_BY)}
    )

    def __post_init__(self) -> None:
        for name in ("flip", "crop_scale"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"--{name} is a share between 0 and 1, got {getattr(self, name)}")
        if self.crop_scale == 0.0:
            raise UserError("--crop_scale is above 0")
        name = str(self.metric_for_best_model).removeprefix("eval_")
        if name not in SELECTED_BY:
            raise UserError(f"--metric_for_best_model is {' or '.join(SELECTED_BY)}, got {name}")
        self.metric_for_best_model, self.greater_is_better = f"eval_{name}", name != "loss"
        super().__post_init__()


GROUPS = (ModelArguments, DataArguments, DetectionArguments)
