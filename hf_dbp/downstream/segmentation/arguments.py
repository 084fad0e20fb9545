"""Flags of fine-tuning UperNet or EoMT: which labelled images, which encoder, how it is trained."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from hf_dbp.data.arguments import FolderFlags, fields_of
from hf_dbp.downstream.class_weights import WEIGHTS
from hf_dbp.downstream.encoder import EncoderArguments
from hf_dbp.downstream.segmentation.losses import LOSSES
from hf_dbp.downstream.segmentation.source import LabelFlags, SegmentationSource
from hf_dbp.errors import UserError
from hf_dbp.natures import Nature
from hf_dbp.training.arguments import FINETUNED, RunArguments

__all__ = ["GROUPS", "HEADS", "DataArguments", "FinetuningArguments", "ModelArguments"]

#: the heads, by the model_type of the model, in words
HEADS = {"upernet": "UperNet", "eomt": "EoMT"}
#: flags of one head alone
OWN = {"head_size": "upernet", "auxiliary_head_size": "upernet", "num_queries": "eomt", "num_blocks": "eomt"}


@dataclass
class DataArguments(LabelFlags, FolderFlags):
    """Which labelled images, and how they are cropped."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of parquet files with images and masks, or of images."}
    )
    crop_size: Annotated[int, Nature("training", "refused", card="side of the crops in pixels")] = field(
        default=512, metadata={"help": "Side of the square crops, a multiple of the patch size."}
    )
    long_edge: Annotated[int | None, Nature("training", "told")] = field(
        default=None,
        metadata={"help": "Scale images to this long edge (times 0.5 to 2 in training); 0: native resolution. "
        "Default: crop_size, as in the paper."},
    )  # fmt: skip

    def source(self, cache_dir: str | None, token: str | None) -> SegmentationSource:
        """The data flags except those of cropping. UserError for impossible values."""
        fields = fields_of(SegmentationSource, self)
        return SegmentationSource(**fields, cache_dir=cache_dir, token=token, seed=self.subset_seed)

    @property
    def scaled_long_edge(self) -> int | None:
        """Long edge in pixels to scale images to; None for native resolution."""
        return self.crop_size if self.long_edge is None else self.long_edge or None


@dataclass
class ModelArguments(EncoderArguments):
    """Which encoder the model starts from, and its head."""

    head: Annotated[str, Nature("model", card="head")] = field(
        default="upernet",
        metadata={"help": "UperNet over the encoder, or EoMT: queries within it, no decoder.", "choices": list(HEADS)},
    )
    head_size: Annotated[int, Nature("model")] = field(
        default=512, metadata={"help": "Width of UperNet's decode head."}
    )
    auxiliary_head_size: Annotated[int, Nature("model")] = field(
        default=256, metadata={"help": "Width of UperNet's auxiliary head."}
    )
    num_queries: Annotated[int | None, Nature("model")] = field(
        default=None, metadata={"help": "EoMT's queries, at least one for each class (default: 100)."}
    )
    num_blocks: Annotated[int | None, Nature("model")] = field(
        default=None,
        metadata={"help": "Layers that EoMT's queries pass, the last ones (default: a quarter, at most 4)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, head in OWN.items():
            value, default = getattr(self, name), getattr(ModelArguments, name)
            if self.head != head and value != default:
                recipe = "" if default is None else f" (over a recipe, --{name} {default} does so)"
                raise UserError(f"--{name} {value} is for --head {head}: leave it out{recipe}, or give that head")


@dataclass
class FinetuningArguments(RunArguments):
    """TrainingArguments with the paper's optimiser and schedule as defaults; mean IoU decides the best checkpoint."""

    STOCK: ClassVar[dict[str, Nature]] = FINETUNED

    output_dir: str = field(default="outputs/upernet", metadata={"help": "Folder for all output."})
    learning_rate: float = field(default=2.5e-5, metadata={"help": "Peak learning rate."})
    layer_decay: Annotated[
        float, Nature("training", "refused", card="factor of the learning rate per layer below the heads")
    ] = field(
        default=1.0, metadata={"help": "Layer-wise learning-rate decay: factor per layer below the heads; 1 for none."}
    )
    lr_scheduler_type: str = field(default="polynomial", metadata={"help": "Schedule of the learning rate."})
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON; polynomial: to lr_end 0 with power 1."}
    )
    loss: Annotated[str, Nature("training", "told")] = field(
        default="ce",
        metadata={
            "help": "UperNet: cross-entropy, or cross-entropy plus soft Dice, for small objects. EoMT has its own.",
            "choices": LOSSES,
        },
    )
    class_weights: Annotated[str, Nature("training", "told")] = field(
        default="none",
        metadata={
            "help": "Weights of the classes in the cross-entropy: one over their share of the pixels, or its square "
            "root (UperNet).",
            "choices": list(WEIGHTS),
        },
    )
    rare_crops: Annotated[float, Nature("training", "told")] = field(
        default=0.0, metadata={"help": "Share of the training crops to draw around a pixel of a rare class."}
    )
    rare_classes: Annotated[list[str] | None, Nature("training", "told")] = field(
        default=None,
        metadata={
            "help": "Names of the rare classes (default: those with less than a quarter of an even share of the "
            "pixels)."
        },
    )

    detection_recall: Annotated[float, Nature("nothing")] = field(
        default=0.95, metadata={"help": "Recall for which to choose the image-level threshold (is there any defect?)."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.detection_recall <= 1:
            raise UserError(f"--detection_recall is a share above 0 and at most 1, got {self.detection_recall}")
        if not 0 <= self.rare_crops <= 1:
            raise UserError(f"--rare_crops is a share between 0 and 1, got {self.rare_crops}")
        if self.rare_classes and not self.rare_crops:
            raise UserError("--rare_classes needs --rare_crops, the share of the crops; give both")
        self.metric_for_best_model, self.greater_is_better = "eval_mean_iou", True
        super().__post_init__()
        if self.lr_scheduler_type == "polynomial" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"lr_end": 0.0, "power": 1.0}


GROUPS = (ModelArguments, DataArguments, FinetuningArguments)
