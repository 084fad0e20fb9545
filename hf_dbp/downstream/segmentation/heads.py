"""The heads of `hf-dbp finetune`, by the model_type of the model they make: what differs between UperNet and EoMT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import EomtForUniversalSegmentation, PreTrainedModel, UperNetForSemanticSegmentation, ViTModel

from hf_dbp.downstream.segmentation.arguments import ModelArguments
from hf_dbp.downstream.segmentation.eomt import QUERIES, SemanticEomt, build_eomt, load_eomt
from hf_dbp.downstream.segmentation.losses import PixelLoss, TrainingLoss
from hf_dbp.downstream.segmentation.mask_loss import MaskLoss
from hf_dbp.downstream.segmentation.upernet import build_upernet, load_upernet
from hf_dbp.errors import UserError

__all__ = ["build_head", "check_crop", "load_head", "segmenter", "training_loss"]


def build_head(
    vit: ViTModel, id2label: Mapping[int, str], flags: ModelArguments, *, crop_size: int, ignore_index: int
) -> PreTrainedModel:
    """The head that the flags name over the ViT's weights; other arguments and errors as for `build_upernet` and
    `build_eomt`."""
    if flags.head == "eomt":
        return build_eomt(
            vit,
            id2label,
            crop_size=crop_size,
            ignore_index=ignore_index,
            num_queries=QUERIES if flags.num_queries is None else flags.num_queries,
            num_blocks=flags.num_blocks,
        )
    return build_upernet(
        vit,
        id2label,
        ignore_index=ignore_index,
        hidden_size=flags.head_size,
        auxiliary_channels=flags.auxiliary_head_size,
    )


def load_head(
    kind: str, source: str, id2label: Mapping[int, str], *, ignore_index: int, **hub_options: Any
) -> UperNetForSemanticSegmentation | EomtForUniversalSegmentation:
    """Load a trained model of that model_type; arguments and errors as for `load_upernet` and `load_eomt`."""
    load = load_eomt if kind == "eomt" else load_upernet
    return load(source, id2label, ignore_index=ignore_index, **hub_options)


def segmenter(model: PreTrainedModel) -> PreTrainedModel | SemanticEomt:
    """What turns crops (B, C, S, S) into ``logits`` (B, K, h, w): the model itself, or an EoMT's `SemanticEomt`."""
    return SemanticEomt(model) if isinstance(model, EomtForUniversalSegmentation) else model


def training_loss(model: PreTrainedModel, formula: Callable[[Tensor, Tensor], Tensor] | None) -> TrainingLoss:
    """The training loss of a model; ``formula`` takes the place of UperNet's own, see `PixelLoss`."""
    if isinstance(model, EomtForUniversalSegmentation):
        return MaskLoss(model)
    return PixelLoss(model.config.loss_ignore_index, formula)


def check_crop(model: nn.Module, crop_size: int) -> None:
    """Raise a UserError unless the model takes crops of that size."""
    if isinstance(model, EomtForUniversalSegmentation) and crop_size != model.config.image_size:
        raise UserError(
            f"crop_size {crop_size}: an EoMT takes crops of its own size alone, so give --crop_size "
            f"{model.config.image_size}, or train one for {crop_size}"
        )
    if isinstance(model, UperNetForSemanticSegmentation):
        patch = getattr(model.config.backbone_config, "patch_size", 1)
        if crop_size % patch:
            raise UserError(f"crop_size {crop_size} is not a multiple of the patch size {patch}")
