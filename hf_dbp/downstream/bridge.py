"""The encoder as a stock `Dinov2Model`, for all stock heads that take a DINOv2.

A pre-norm ViT is a DINOv2 whose LayerScale is 1:

    ViT      h <- h + Attention(LN(h));            h <- h + MLP(LN(h))
    DINOv2   h <- h + s1 * Attention(LN(h));       h <- h + s2 * MLP(LN(h)),      s1 = s2 = 1

so the tensors are the same under other names. Differences, checked here:
- DINOv2 has no `intermediate_size`: the MLP's width must be a whole multiple of the hidden size;
- DINOv2 resamples positions from a square table: the encoder's images must be square;
- the mask token, which only DINOv2's pre-training uses, is left out (`use_mask_token=False`).

At another image size than the encoder's own, `Dinov2Model` resamples the position table (bicubic), as `ViTModel` does
with ``interpolate_pos_encoding=True``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel, ViTConfig, ViTModel

from hf_dbp.errors import UserError
from hf_dbp.modeling_dbp_vit_mae import extract_vit

__all__ = ["dinov2_fields", "extract_dinov2", "fill_dinov2", "vit_of_dinov2"]

SAME = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "image_size", "patch_size", "num_channels",
    "qkv_bias",
)  # fmt: skip
RENAMED = {"layernorm_before": "norm1", "layernorm_after": "norm2"}
#: of transformers 5.17
EARLIER = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def extract_dinov2(model: PreTrainedModel) -> Dinov2Model:
    """The encoder of a ViT-MAE (decorrelated ones are fused), or a ViT, as a stock `Dinov2Model`.

    Args:
        model: a ViT-MAE, stock or ours, its encoder, or a `ViTModel` (its pooler is left out).

    Returns:
        A `Dinov2Model` on the same device, in the same dtype and mode; its hidden states (B, 1 + T, D) equal those of
        the `ViTModel` up to rounding.

    Raises:
        UserError: the images are not square, the MLP's width is not a multiple of the hidden size, a fused weight is
            not finite, or ``model`` is none of these.
    """
    vit = model if isinstance(model, ViTModel) else extract_vit(model)
    size = vit.config.image_size if isinstance(vit.config.image_size, int) else tuple(vit.config.image_size)
    if not isinstance(size, int) and len(set(size)) != 1:
        raise UserError(
            f"a DINOv2 takes square images, this encoder {size[0]} x {size[1]}: keep it as a ViT (--as vit), or "
            "pre-train with a square --image_size"
        )
    fields = dinov2_fields(vit.config, "keep it as a ViT (--as vit)")
    dinov2 = Dinov2Model(Dinov2Config(**fields | {"image_size": size if isinstance(size, int) else size[0]}))
    dinov2.config._attn_implementation = vit.config._attn_implementation
    dinov2.to(device=vit.device, dtype=vit.dtype)
    fill_dinov2(dinov2, vit.state_dict())
    dinov2.train(vit.training)
    return dinov2


def dinov2_fields(config: ViTConfig, remedy: str) -> dict[str, Any]:
    """The fields with which a DINOv2, or a backbone made like one, has the hidden states of a ViT.

    Args:
        config: of the ViT.
        remedy: ends the message of the error.

    Raises:
        UserError: the MLP's width is not a multiple of the hidden size.
    """
    if config.intermediate_size % config.hidden_size:
        raise UserError(
            f"a DINOv2's MLP is a whole multiple of its width, but this encoder's {config.intermediate_size} is not "
            f"one of {config.hidden_size}: {remedy}"
        )
    own = {"layerscale_value": 1.0, "use_mask_token": False, "use_swiglu_ffn": False}
    ratio = config.intermediate_size // config.hidden_size
    return {name: getattr(config, name) for name in SAME} | {"mlp_ratio": ratio} | own


def fill_dinov2(dinov2: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Load the tensors of a ViT into a DINOv2, or a backbone made like one, whose LayerScale stays 1."""
    own = dinov2.state_dict()
    tensors = {new_name(name, own): value for name, value in state.items() if not name.startswith("pooler.")}
    scales = {name: value for name, value in own.items() if name.endswith(".lambda1")}  # ones
    dinov2.load_state_dict(tensors | scales)


def vit_of_dinov2(model: Dinov2Model) -> ViTModel:
    """A DINOv2 as a stock `ViTModel`, the way back: LayerScale is folded into the linears before it.

    s1 * (W a + b) = (s1 W) a + s1 b, in float64. The mask token is left out.

    Raises:
        ValueError: its MLP is gated (SwiGLU, as in DINOv2-giant), which no ViT has.
    """
    config = model.config
    if config.use_swiglu_ffn:
        raise UserError("this DINOv2 has a gated MLP (SwiGLU), which no ViT has: take the small, base or large one")
    fields = {name: getattr(config, name) for name in SAME}
    vit = ViTModel(
        ViTConfig(**fields, intermediate_size=config.hidden_size * config.mlp_ratio), add_pooling_layer=False
    )
    state, folded = model.state_dict(), {}
    for name in vit.state_dict():
        value = state[new_name(name, state)]
        match = re.fullmatch(r"layers\.(\d+)\.(attention\.o_proj|mlp\.fc2)\.(weight|bias)", name)
        if match is not None:
            scale = state[f"encoder.layer.{match[1]}.layer_scale{1 if 'o_proj' in match[2] else 2}.lambda1"].double()
            value = (value.double() * (scale[:, None] if value.ndim == 2 else scale)).to(value.dtype)
        folded[name] = value
    vit.to(dtype=model.dtype).load_state_dict(folded)
    return vit


def new_name(name: str, known: Container[str]) -> str:
    """The name, one of ``known``, in a DINOv2 of a tensor of a ViT."""
    parts = [RENAMED.get(part, part) for part in name.split(".")]
    new = ".".join(["encoder", "layer", *parts[1:]] if parts[0] == "layers" else parts)
    if new in known:
        return new
    return functools.reduce(lambda text, pair: text.replace(*pair), EARLIER.items(), new)
