"""The encoder that a task starts from: its flags, its weights, and how images are brought to it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Annotated, Any

from transformers import ViTModel

from hf_dbp.configuration_dbp_vit_mae import SIZES
from hf_dbp.data.images import channel_statistics, share_value_range
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import load_model, read_config, read_statistics, read_value_range
from hf_dbp.natures import Nature

__all__ = ["EncoderArguments", "check_channels", "load_vit", "pixel_statistics"]

logger = logging.getLogger(__name__)


@dataclass
class EncoderArguments:
    """Which encoder the model starts from."""

    model_name_or_path: Annotated[str | None, Nature("model")] = field(
        default=None, metadata={"help": "Stock ViT, folder or Hub id: fused DBP, BP, supervised ..."}
    )
    from_scratch: Annotated[bool, Nature("model")] = field(
        default=False, metadata={"help": "Take that ViT's shape with random weights."}
    )
    model_size: Annotated[str | None, Nature("model")] = field(
        default=None, metadata={"help": "Without a ViT: named size of a random one.", "choices": list(SIZES)}
    )
    patch_size: Annotated[int, Nature("model")] = field(
        default=16, metadata={"help": "Patch size of a random ViT without a model."}
    )
    model_revision: Annotated[str, Nature("model")] = field(
        default="main", metadata={"help": "Revision of the ViT on the Hub."}
    )
    cache_dir: Annotated[str | None, Nature("nothing")] = field(
        default=None, metadata={"help": "Where downloads are kept."}
    )
    token: Annotated[str | None, Nature(secret=True)] = field(
        default=None, metadata={"help": "Hub token (default: that of `hf auth login`)."}
    )

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.model_size is None):
            raise UserError("give the encoder: --model_name_or_path VIT, or --model_size for random weights (not both)")

    @property
    def hub_options(self) -> dict[str, Any]:
        return {"revision": self.model_revision, "cache_dir": self.cache_dir, "token": self.token}


def load_vit(source: str, **hub_options: Any) -> ViTModel:
    """Load a stock ViT from a folder or Hub id: a fused or a supervised one, a classifier's encoder.

    Raises:
        ValueError: the checkpoint is no ViT, or `hf_dbp.hub.untrusted` refuses it.
    """
    kind = read_config(source, **hub_options)["model_type"]
    if kind != "vit":
        remedy = "write its encoder with training_scripts/fuse_checkpoint.py" if "mae" in kind else "give one"
        raise UserError(f"{source} holds a {kind!r} model, not a stock 'vit': {remedy}")
    vit = load_model(source, "vit", add_pooling_layer=False, **hub_options)
    assert isinstance(vit, ViTModel)
    return vit


def check_channels(taken: int, there: int | None) -> None:
    """UserError unless the encoder takes as many channels as the images have."""
    if taken != there:
        raise UserError(
            f"the ViT takes {taken} channels, the images have {there}: "
            "pre-train on such images, or convert them with --num_channels"
        )


def pixel_statistics(model_args: EncoderArguments, images: Any, validation: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel: those of the ViT's image processor, else of the images.

    Gives both lists their range of values.

    Args:
        model_args: which encoder.
        images, validation: lists of images (`ImageList`, or one that has them as `images_alone`).
    """
    kept = None
    if model_args.model_name_or_path is not None:
        kept = read_value_range(model_args.model_name_or_path, **model_args.hub_options)
    share_value_range(images, validation, kept=kept)
    if model_args.model_name_or_path is not None:
        statistics = read_statistics(model_args.model_name_or_path, **model_args.hub_options)
        if statistics is not None and len(statistics[0]) != images.num_channels:
            raise UserError(
                f"the image processor of {model_args.model_name_or_path} has statistics of {len(statistics[0])} "
                f"channels, the images have {images.num_channels}"
            )
        if statistics is not None:
            return statistics
        logger.warning("%s has no image processor; taking the images' statistics", model_args.model_name_or_path)
    return channel_statistics(images.images_alone())
