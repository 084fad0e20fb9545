"""A stock UperNet over a stock ViT: the saved model loads in plain transformers, without hf_dbp.

transformers has no plain-ViT backbone, but its `BeitBackbone` with absolute positions, no relative bias, no LayerScale
and no drop path computes a ViT's hidden states exactly. So the ViT's weights move there. Differences:

- those listed in `hf_dbp.downstream.beit`;
- there is no final norm: the four feature maps are residual streams, which the heads normalise (BatchNorm).

Feature maps come from the depths L/4, L/2, 3L/4 and L of the L layers, resampled by BEiT's neck to strides p/4, p/2, p
and 2p for patches of p pixels: 4, 8, 16 and 32 for 16. The model stays stock: it lacks the relative position biases and
LayerScale that the published 48.1 mIoU of MAE ViT-B added in fine-tuning.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BeitConfig, UperNetConfig, UperNetForSemanticSegmentation, ViTConfig, ViTModel

from hf_dbp.config_limits import check_fields
from hf_dbp.downstream.beit import beit_fields, beit_state
from hf_dbp.downstream.segmentation.classes import check_names, class_fields
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import check_memory, known_fields, load_weights, read_config

__all__ = ["build_upernet", "load_upernet", "synchronize_batch_norm"]


def build_upernet(
    vit: ViTModel,
    id2label: Mapping[int, str],
    *,
    ignore_index: int = 255,
    hidden_size: int = 512,
    auxiliary_channels: int = 256,
) -> UperNetForSemanticSegmentation:
    """Build a UperNet with new heads over the ViT's weights (copied).

    Args:
        vit: stock ViT of at least four layers, any patch size that is a multiple of 4, any number of channels.
        id2label: class names by id 0..K-1.
        ignore_index: label id that the loss ignores; not a class id.
        hidden_size, auxiliary_channels: widths of the two heads (UperNet's own defaults).

    Raises:
        UserError: too few layers or classes, gaps in the class ids, or an ignored class.
    """
    config = _upernet_config(vit.config, id2label, ignore_index, hidden_size, auxiliary_channels)
    model = UperNetForSemanticSegmentation(config)
    model.backbone.beit.load_state_dict(beit_state(vit))
    return model


def load_upernet(
    source: str, id2label: Mapping[int, str], *, ignore_index: int = 255, **hub_options: Any
) -> UperNetForSemanticSegmentation:
    """Load a trained UperNet made by `build_upernet` from a folder or Hub id, using only the sizes in its config.json.

    Args:
        source: folder or Hub id.
        id2label: class names of the labels to use it with.
        ignore_index: as in `build_upernet`.
        hub_options: revision, cache_dir, token.

    Raises:
        UserError: there is no such UperNet, it has other classes, or `hf_dbp.hub.untrusted` refuses it.
    """
    content = read_config(source, **hub_options)
    backbone, name = content.get("backbone_config"), str(Path(source) / "config.json")
    hidden, auxiliary = (_width(content.get(key)) for key in ("hidden_size", "auxiliary_channels"))
    ours = content["model_type"] == "upernet" and hidden and auxiliary
    if not ours or not isinstance(backbone, dict) or backbone.get("model_type") != "beit":
        raise UserError(f"{name} is not that of a UperNet over a ViT, as `hf-dbp finetune` writes it")
    check_names(content, name, id2label)
    check_fields(backbone, name)
    fields = known_fields(backbone, ViTConfig)
    check_memory(fields, name)
    config = _upernet_config(ViTConfig(**fields), id2label, ignore_index, hidden, auxiliary)
    model, missing = load_weights(UperNetForSemanticSegmentation, source, config=config, **hub_options)
    if missing:
        raise UserError(f"{source} lacks {len(missing)} tensors of the model, among them {missing[0]}")
    return model


def _width(value: Any) -> int:
    """The width of a head; 0 for anything invalid."""
    return value if type(value) is int and 0 < value <= 32768 else 0


def _upernet_config(
    vit: ViTConfig, id2label: Mapping[int, str], ignore_index: int, hidden_size: int, auxiliary_channels: int
) -> UperNetConfig:
    return UperNetConfig(
        backbone_config=_beit_config(vit),
        **class_fields(id2label, ignore_index),
        hidden_size=hidden_size,
        auxiliary_channels=auxiliary_channels,
    )


def _beit_config(vit: ViTConfig) -> BeitConfig:
    layers = vit.num_hidden_layers
    if layers < 4:
        raise UserError(f"the ViT has {layers} layers: UperNet needs feature maps of four depths, so at least 4")
    depths = [layers * quarter // 4 for quarter in (1, 2, 3, 4)]
    return BeitConfig(**beit_fields(vit), out_indices=depths, add_fpn=True)


def synchronize_batch_norm(model: nn.Module, processes: int, device: torch.device) -> None:
    """On GPUs, make BatchNorm use statistics over all processes' images.

    PyTorch has no SyncBatchNorm on the CPU; there each process normalises by its own images, and the running statistics
    of process 0 are kept. Tensor names do not change, so a saved model stays stock.
    """
    if processes > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
