"""A stock UperNet over a stock ViT: the saved model loads in plain transformers, without hf_dbp.

transformers has no plain-ViT backbone, but its `BeitBackbone` with absolute positions, no relative bias, no LayerScale
and no drop path computes a ViT's hidden states exactly. So the ViT's weights move there. What differs:

- BEiT's keys have no bias. Left out without effect: q_i . b_k is the same for every key, and softmax ignores it.
- No final norm: the four feature maps are residual streams, which the heads normalise (BatchNorm).
- BEiT's position table must be square; another shape is resampled once, bicubic, to a square of the longer side.
  Other image sizes, non-square ones included, are handled in every forward: BEiT interpolates the table, bicubic.

Feature maps come from the depths L/4, L/2, 3L/4 and L of the L layers, resampled by BEiT's neck to strides p/4, p/2, p
and 2p for patches of p pixels: 4, 8, 16 and 32 for 16. The model stays stock: the published 48.1 mIoU of MAE ViT-B adds
relative position biases and LayerScale in fine-tuning, which this does not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BeitConfig, UperNetConfig, UperNetForSemanticSegmentation, ViTConfig, ViTModel

from hf_dbp.configuration_dbp_vit_mae import check_fields
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import check_memory, known_fields, load_model, load_weights, read_config

__all__ = ["build_upernet", "load_upernet", "load_vit", "parameter_groups", "synchronize_batch_norm"]


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


def build_upernet(
    vit: ViTModel,
    id2label: Mapping[int, str],
    *,
    ignore_index: int = 255,
    hidden_size: int = 512,
    auxiliary_channels: int = 256,
) -> UperNetForSemanticSegmentation:
    """Build a UperNet with fresh heads over the ViT's weights (copied).

    Args:
        vit: stock ViT of at least four layers, any patch size that is a multiple of 4, any number of channels.
        id2label: class names by id 0..K-1.
        ignore_index: label id that the loss leaves out; not a class id.
        hidden_size, auxiliary_channels: widths of the two heads (UperNet's own defaults).

    Raises:
        ValueError: too few layers or classes, class ids with gaps, or an ignored class.
    """
    config = _upernet_config(vit.config, id2label, ignore_index, hidden_size, auxiliary_channels)
    model = UperNetForSemanticSegmentation(config)
    model.backbone.beit.load_state_dict(_beit_state(vit))
    return model


def load_upernet(
    source: str, id2label: Mapping[int, str], *, ignore_index: int = 255, **hub_options: Any
) -> UperNetForSemanticSegmentation:
    """Load a UperNet that `build_upernet` made, trained, from a folder or Hub id; of its config.json sizes alone.

    Args:
        source: folder or Hub id.
        id2label: class names of the labels it is to be used with.
        ignore_index: as in `build_upernet`.
        hub_options: revision, cache_dir, token.

    Raises:
        ValueError: no such UperNet, other classes, or `hf_dbp.hub.untrusted` refuses it.
    """
    content = read_config(source, **hub_options)
    backbone, names, name = content.get("backbone_config"), content.get("id2label"), str(Path(source) / "config.json")
    hidden, auxiliary = (_width(content.get(key)) for key in ("hidden_size", "auxiliary_channels"))
    ours = content["model_type"] == "upernet" and hidden and auxiliary
    if not ours or not isinstance(backbone, dict) or backbone.get("model_type") != "beit":
        raise UserError(f"{name} is not that of a UperNet over a ViT, as `hf-dbp finetune` writes it")
    if names != {str(number): label for number, label in id2label.items()}:
        raise UserError(
            f"{name} has the classes {names!r:.200}, the labels {dict(id2label)}: give those of its training"
        )
    check_fields(backbone, name)
    fields = known_fields(backbone, ViTConfig)
    check_memory(fields, name)
    config = _upernet_config(ViTConfig(**fields), id2label, ignore_index, hidden, auxiliary)
    model, missing = load_weights(UperNetForSemanticSegmentation, source, config=config, **hub_options)
    if missing:
        raise UserError(f"{source} lacks {len(missing)} tensors of the model, among them {missing[0]}")
    return model


def _width(value: Any) -> int:
    """The width of a head; 0 for what is none."""
    return value if type(value) is int and 0 < value <= 32768 else 0


def _upernet_config(
    vit: ViTConfig, id2label: Mapping[int, str], ignore_index: int, hidden_size: int, auxiliary_channels: int
) -> UperNetConfig:
    classes = len(id2label)
    if classes < 2 or sorted(id2label) != list(range(classes)):
        raise UserError(f"class ids are {sorted(id2label)}: give 0..K-1 without gaps, at least two")
    if ignore_index in id2label:
        raise UserError(
            f"ignore_index {ignore_index} is the class {id2label[ignore_index]!r}: choose another, e.g. 255"
        )
    return UperNetConfig(
        backbone_config=_beit_config(vit),
        id2label=dict(id2label),
        label2id={name: number for number, name in id2label.items()},
        loss_ignore_index=ignore_index,
        hidden_size=hidden_size,
        auxiliary_channels=auxiliary_channels,
    )


def _beit_config(vit: ViTConfig) -> BeitConfig:
    layers = vit.num_hidden_layers
    if layers < 4:
        raise UserError(f"the ViT has {layers} layers: UperNet needs feature maps of four depths, so at least 4")
    patch_size = _sides(vit.patch_size)[0]
    return BeitConfig(
        **{name: getattr(vit, name) for name in _SHARED},
        image_size=max(_sides(vit.image_size)),
        patch_size=patch_size,
        out_indices=[layers * quarter // 4 for quarter in (1, 2, 3, 4)],
        add_fpn=True,
        use_absolute_position_embeddings=True,
        layer_scale_init_value=0.0,
        drop_path_rate=0.0,
    )


_SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "num_channels",
)


def _sides(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _beit_state(vit: ViTModel) -> dict[str, Tensor]:
    state = {name: value for name, value in vit.state_dict().items() if not name.startswith(("pooler.", "layernorm."))}
    state = {name: value for name, value in state.items() if not name.endswith("k_proj.bias")}
    for layer in range(vit.config.num_hidden_layers):
        for projection in ("q_proj", "v_proj"):  # a ViT may be built without these biases, BEiT has them
            state.setdefault(f"layers.{layer}.attention.{projection}.bias", torch.zeros(vit.config.hidden_size))
    positions_1TD = state["embeddings.position_embeddings"]
    height, width = (side // _sides(vit.config.patch_size)[0] for side in _sides(vit.config.image_size))
    if height != width:
        state["embeddings.position_embeddings"] = _square_positions(positions_1TD, height, width)
    return state


def _square_positions(positions_1TD: Tensor, height: int, width: int) -> Tensor:
    grid_1DHW = positions_1TD[:, 1:].transpose(1, 2).reshape(1, -1, height, width)
    side = max(height, width)
    grid_1DHW = nn.functional.interpolate(grid_1DHW, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions_1TD[:, :1], grid_1DHW.flatten(2).transpose(1, 2)], dim=1)


def parameter_groups(
    model: UperNetForSemanticSegmentation, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Group parameters for an optimizer, with layer-wise learning-rate decay (BEiT, MAE).

    With L layers, layer i (1..L) learns at `learning_rate * layer_decay ** (L + 1 - i)`, the embeddings as layer 0,
    neck and heads at `learning_rate`. Biases, norms, the class token and the positions get no weight decay.

    Raises:
        ValueError: `layer_decay` is outside (0, 1].
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay is {layer_decay}: give a factor above 0 and at most 1 (1 is no decay)")
    layers = model.config.backbone_config.num_hidden_layers
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        depth = _depth(name, layers) if layer_decay < 1 else layers + 1
        decays = parameter.ndim > 1 and not name.endswith(("cls_token", "position_embeddings"))
        group = {"params": [], "lr": learning_rate * layer_decay ** (layers + 1 - depth)}
        group["weight_decay"] = weight_decay if decays else 0.0
        groups.setdefault((depth, decays), group)["params"].append(parameter)
    return list(groups.values())


def _depth(name: str, layers: int) -> int:
    if name.startswith("backbone.beit.embeddings."):
        return 0
    if name.startswith("backbone.beit.layers."):
        return int(name.split(".")[3]) + 1
    return layers + 1


def synchronize_batch_norm(model: nn.Module, processes: int, device: torch.device) -> None:
    """Let BatchNorm take its statistics over all processes' images, where PyTorch can: on GPUs.

    PyTorch has no SyncBatchNorm on the CPU; there each process normalises by its own images, and the running statistics
    of process 0 are the ones kept. Tensor names do not change, so that a saved model stays stock.
    """
    if processes > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
