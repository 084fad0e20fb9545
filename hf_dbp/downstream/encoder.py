"""The encoder that a task starts from: its flags, its weights, and how images are prepared for it.

`load_vit` makes a stock `ViTModel` from what `--model_name_or_path` names:

    vit                     a ViT: fused DBP, BP, supervised, DeiT (not distilled), MoCo v3, or a classifier's encoder
    vit_mae, dbp_vit_mae    the encoder of a ViT-MAE, public or from a run; decorrelated ones are fused
    dinov2                  a DINOv2 without registers and gates; LayerScale is folded into the weights
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from hf_dbp.config_limits import check_fields
from hf_dbp.configuration_dbp_vit_mae import SIZES
from hf_dbp.data.images import channel_statistics, share_value_range
from hf_dbp.downstream.bridge import vit_of_dinov2
from hf_dbp.errors import UserError
from hf_dbp.hub.arguments import HubFlags
from hf_dbp.hub.untrusted import (
    check_memory,
    known_fields,
    load_model,
    load_weights,
    read_config,
    read_statistics,
    read_value_range,
)
from hf_dbp.modeling_dbp_vit_mae import extract_vit
from hf_dbp.natures import Nature

__all__ = ["EncoderArguments", "build_vit", "check_channels", "load_vit", "pixel_statistics"]

logger = logging.getLogger(__name__)


@dataclass
class EncoderArguments(HubFlags):
    """Which encoder the model starts from."""

    model_name_or_path: Annotated[str | None, Nature("model")] = field(
        default=None,
        metadata={"help": "ViT, ViT-MAE (fused or not) or DINOv2, folder or Hub id: DBP, BP, supervised ..."},
    )
    from_scratch: Annotated[bool, Nature("model")] = field(
        default=False, metadata={"help": "Use that ViT's shape with random weights."}
    )
    model_size: Annotated[str | None, Nature("model")] = field(
        default=None, metadata={"help": "Without a ViT: named size of a random one.", "choices": list(SIZES)}
    )
    patch_size: Annotated[int, Nature("model")] = field(
        default=16, metadata={"help": "Patch size of a random ViT without a model."}
    )

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.model_size is None):
            raise UserError("give the encoder: --model_name_or_path VIT, or --model_size for random weights (not both)")


def load_vit(source: str, **hub_options: Any) -> ViTModel:
    """Load an encoder from a folder or the Hub as a stock ViT; the module's docstring lists what it may be.

    Raises:
        ValueError: it is none of these, or `hf_dbp.hub.untrusted` refuses it.
    """
    content = read_config(source, **hub_options)
    kind = content["model_type"]
    if kind in ("vit_mae", "dbp_vit_mae"):
        return extract_vit(load_model(source, kind, **hub_options))
    if kind == "dinov2":
        return vit_of_dinov2(load_dinov2(source, content, **hub_options))
    if kind == "deit":
        raise UserError(
            f"{source} is a distilled DeiT, which has a token that a ViT lacks; give one that was not distilled, such "
            "as facebook/deit-base-patch16-224"
        )
    if kind != "vit":
        raise UserError(f"{source} holds a {kind!r} model; give a ViT, a ViT-MAE or a DINOv2 without registers")
    vit = load_model(source, "vit", add_pooling_layer=False, **hub_options)
    assert isinstance(vit, ViTModel)
    return vit


def build_vit(model_args: EncoderArguments, image_size: Any, num_channels: int) -> ViTModel:
    """The ViT that the flags name, with its weights or random ones. UserError if it does not fit the images.

    Args:
        model_args: which encoder.
        image_size: side, or height and width, of the images that a ViT of a named size takes.
        num_channels: channels of the images.
    """
    if model_args.model_name_or_path is not None:
        vit = load_vit(model_args.model_name_or_path, **model_args.hub_options)
        if model_args.from_scratch:
            vit = ViTModel(vit.config, add_pooling_layer=False)
    else:
        shape = {name: value for name, value in SIZES[str(model_args.model_size)].items() if "decoder" not in name}
        sizes = {"image_size": image_size, "patch_size": model_args.patch_size}
        vit = ViTModel(ViTConfig(**shape, **sizes, num_channels=num_channels), add_pooling_layer=False)
    check_channels(vit.config.num_channels, num_channels)
    return vit


def load_dinov2(source: str, content: Mapping[str, Any], **hub_options: Any) -> Dinov2Model:
    """Load a DINOv2, using only the sizes in its config.json. Errors as for `load_vit`."""
    ratio, gated = content.get("mlp_ratio", 4), content.get("use_swiglu_ffn", False)
    if type(ratio) is not int or not 0 < ratio <= 32 or type(gated) is not bool:
        raise UserError(f"{source}: mlp_ratio is {ratio!r} and use_swiglu_ffn {gated!r}; expected 1 to 32 and a flag")
    check_fields(content, source)
    fields = known_fields(content, Dinov2Config)
    check_memory(fields | {"intermediate_size": ratio * fields.get("hidden_size", 768)}, source)
    masks = content.get("use_mask_token", True) is not False
    config = Dinov2Config(**fields, mlp_ratio=ratio, use_swiglu_ffn=gated, use_mask_token=masks)
    model, missing = load_weights(Dinov2Model, source, config=config, **hub_options)
    if missing:
        raise UserError(f"{source} lacks {len(missing)} tensors of the model, among them {missing[0]}")
    assert isinstance(model, Dinov2Model)
    return model


def check_channels(taken: int, there: int | None) -> None:
    """Raise a UserError unless the encoder takes as many channels as the images have."""
    if taken != there:
        raise UserError(
            f"the ViT takes {taken} channels, the images have {there}: "
            "pre-train on such images, or convert them with --num_channels"
        )


def pixel_statistics(model_args: EncoderArguments, images: Any, validation: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, from the ViT's image processor or else from the images.

    Also gives both lists their range of values.

    Args:
        model_args: which encoder.
        images, validation: lists of images (`ImageList`, or a list with `images_alone`).
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
        logger.warning("%s has no image processor; using the images' statistics", model_args.model_name_or_path)
    return channel_statistics(images.images_alone())
