"""ViT-MAE with a decorrelated encoder, built on transformers' own modules.

`DBPViTMAEForPreTraining` is transformers' `ViTMAEForPreTraining` (He et al. 2022) in which chosen linear layers see a
decorrelated input (paper section 2.2): the patch projection and, in every encoder block, q/k/v with one shared R, the
attention output and both MLP linears. With ``decorrelated_layers="none"`` it is the plain-backprop baseline.

It builds on the corrected stock model (`hf_dbp.stock_vit_mae`): He et al.'s initialisation, images of any shape.

Weights are saved as ``model.unfused.safetensors``, so a stock `ViTModel` fails to load such a folder; under the usual
name it would use W and ignore R. `fuse` returns the stock model.

Shapes: B images, C channels, T patches, V visible tokens, D hidden size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEAttention, eager_attention_forward

from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.conversion import convert_to_decorrelated, decorrelated_layers, fused_state_dict
from hf_dbp.errors import UserError
from hf_dbp.functional import decorrelated_linear
from hf_dbp.layers import DecorrelatedLayer, DecorrelatedLinear, Decorrelation, Fusable, fuse_linear
from hf_dbp.stock_vit_mae import RectangularViTMAE, freeze_fixed_, initialize_mae_, initialize_mae_module, patch_grid

__all__ = [
    "UNFUSED",
    "DBPViTMAEForPreTraining",
    "DBPViTMAEModel",
    "RectangularViTMAE",
    "extract_vit",
    "freeze_fixed_",
    "initialize_mae_",
]

logger = logging.getLogger(__name__)

UNFUSED = "unfused"  # variant name of the weights: model.unfused.safetensors


class JoinedAttention(ViTMAEAttention):  # type: ignore[misc]
    """transformers' self-attention with q, k and v in one product: [q; k; v] = [W_q; W_k; W_v] x + b."""

    @classmethod
    def from_attention(cls, attention: ViTMAEAttention) -> JoinedAttention:
        """The same attention; it adopts the projections."""
        with torch.device("meta"):
            joined = cls(attention.config)
        for name, child in attention.named_children():
            setattr(joined, name, child)
        joined.train(attention.training)
        return joined

    def project(self, x_BVD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x_BVD, weight, bias)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        batch, tokens, _ = hidden_states.shape
        projections = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([p.weight for p in projections])
        bias = None if self.q_proj.bias is None else torch.cat([p.bias for p in projections])
        parts = self.project(hidden_states, weight, bias).chunk(3, dim=-1)
        q, k, v = (part.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for part in parts)  # (B, heads, V, ...)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(batch, tokens, -1).contiguous()), weights


class DBPViTMAEAttention(JoinedAttention, DecorrelatedLayer):
    """Joined self-attention whose q, k and v share one R for their common input: [q; k; v] = [W_q; W_k; W_v] R x + b.
    The attention owns R, because a tensor with three names could not be saved.
    """

    decorrelation: Decorrelation
    naive: bool

    @classmethod
    def from_attention(cls, attention: ViTMAEAttention, *, naive: bool = False) -> DBPViTMAEAttention:
        """The same attention with R = I; it adopts the projections."""
        ours = super().from_attention(attention)
        assert isinstance(ours, cls)
        weight = attention.q_proj.weight
        ours.decorrelation, ours.naive = Decorrelation(weight.shape[1], device=weight.device), naive
        return ours

    def project(self, x_BVD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.decorrelation.gather(x_BVD)
        return decorrelated_linear(x_BVD, weight, bias, self.decorrelation.R, naive=self.naive)

    def fuse(self) -> ViTMAEAttention:
        """The stock attention with W_q R, W_k R and W_v R."""
        with torch.device("meta"):
            stock = ViTMAEAttention(self.config)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(stock, name, fuse_linear(getattr(self, name), self.decorrelation.R))
        stock.o_proj = self.o_proj  # not part of the shared input
        return stock.train(self.training)


def named(names: tuple[str, ...]) -> Callable[[nn.Module, str], bool]:
    """The predicate that chooses the layers with these names."""
    return lambda _, name: name in names


def decorrelate_blocks(blocks: nn.ModuleList, config: DBPViTMAEConfig) -> None:
    """Swap the chosen layers of transformer blocks for decorrelated ones; always join q, k and v."""
    choice, naive = config.decorrelated_layers, config.naive_decorrelation
    for block in blocks:
        if choice == "none":
            block.attention = JoinedAttention.from_attention(block.attention)
            continue
        block.attention = DBPViTMAEAttention.from_attention(block.attention, naive=naive)
        leaves = ("mlp.fc1",) if choice == "block_inputs" else ("attention.o_proj", "mlp.fc1")
        convert_to_decorrelated(block, named(leaves), naive=naive)
        if choice != "block_inputs":
            wide = block.get_submodule("mlp.fc2")
            assert isinstance(wide, nn.Linear)
            decorrelated = DecorrelatedLinear.from_linear(wide, naive=naive, blocks=config.wide_blocks)
            block.set_submodule("mlp.fc2", decorrelated)


class DBPPreTrainedMixin(Fusable):
    """Initialisation, loading, saving and fusion, shared by the decorrelated encoder and the whole model."""

    stock_class: type[PreTrainedModel]
    config_class = DBPViTMAEConfig
    _keep_in_fp32_modules_strict = ("decorrelation",)

    def _init_weights(self, module: nn.Module) -> None:
        initialize_mae_module(module, self.config)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load one of our checkpoints, or start at R = I from any ViT-MAE (or ViT encoder) of transformers v4 or v5.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            model_args: as in transformers.
            kwargs: as in transformers; fields of `DBPViTMAEConfig` such as ``decorrelated_layers`` override the
                checkpoint's. The function stays the same: a layer that loses its R gets W R in place of (W, R), a
                layer that gains one starts at R = I, and one whose R has other blocks does both (with a warning).

        Raises:
            UserError: one of our checkpoints lacks a tensor (R included) or has a configuration that no ViT has.
            OSError: there are no safetensors weights under that name.
        """
        with_info = kwargs.pop("output_loading_info", False)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        raw, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        ours = raw.get("model_type") == DBPViTMAEConfig.model_type
        if kwargs.get("config") is None:
            known = DBPViTMAEConfig.__dataclass_fields__.keys() - {"model_type", "architectures"}
            raw = {
                key: value for key, value in raw.items() if key in known
            }  # drop everything that names code or kernels
            fields = {key: kwargs.pop(key) for key in list(kwargs) if key in DBPViTMAEConfig.__dataclass_fields__}
            kwargs["config"] = DBPViTMAEConfig.from_dict(raw | fields)
        config = kwargs["config"]
        there = {name: raw.get(name, getattr(DBPViTMAEConfig, name)) for name in ("decorrelated_layers", "wide_blocks")}
        if ours and any(getattr(config, name) != value for name, value in there.items()):
            kwargs["config"] = DBPViTMAEConfig.from_dict(config.to_dict() | there)
            loaded = cls.from_pretrained(pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs)
            model, info = with_layers_of(config, *loaded)
            return (model, info) if with_info else model
        if ours:
            kwargs.setdefault("variant", UNFUSED)
        kwargs.setdefault("use_safetensors", True)
        report = logging.getLogger("transformers.modeling_utils")
        report.disabled = True  # it would report every R that correctly starts at I; check_loaded reports what matters
        try:
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        finally:
            report.disabled = False
        check_loaded(str(pretrained_model_name_or_path), sorted(info["missing_keys"]), ours)
        freeze_fixed_(model)
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save config and ``model.unfused.safetensors`` under current key names; arguments as in transformers. The
        legacy key names that transformers uses by default are not restored by its Trainer on resume.

        Raises:
            UserError: another variant was given for a model with R; under the usual name it would be read as a stock
                one.
        """
        if kwargs.get("variant", UNFUSED) != UNFUSED and any(True for _ in decorrelated_layers(self)):  # type: ignore[arg-type]
            raise UserError(
                f"variant={kwargs['variant']!r}: weights with R are saved only as {UNFUSED!r}, because other names "
                f"pass for a stock model's; save fuse(model) or extract_vit(model)"
            )
        kwargs = {"variant": UNFUSED, "save_original_format": False} | kwargs
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    def fuse(self) -> PreTrainedModel:
        """The stock model with W R in place of (W, R), as `stock_class` (`RectangularViTMAE` for non-square images)."""
        config = ViTMAEConfig(**stock_fields(self.config, ViTMAEConfig))  # type: ignore[attr-defined]
        config._attn_implementation = self.config._attn_implementation  # type: ignore[attr-defined]
        rows, columns = patch_grid(config)
        square_only = issubclass(self.stock_class, ViTMAEForPreTraining)
        stock_class = RectangularViTMAE if square_only and rows != columns else self.stock_class
        return load_fused(stock_class(config), self)


def stock_fields(config: ViTMAEConfig, stock_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a ViT-MAE configuration that a stock configuration class also has."""
    known = stock_class.__dataclass_fields__.keys() & ViTMAEConfig.__dataclass_fields__.keys() - NOT_STOCK
    return {key: value for key, value in config.to_dict().items() if key in known}


NOT_STOCK = {"model_type", "architectures", "dtype", "transformers_version"}


def load_fused(stock: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """``stock`` with the fused weights of ``model``, on its device, in its dtype and mode."""
    stock.to(device=model.device, dtype=model.dtype).load_state_dict(fused_state_dict(model))
    stock.train(model.training)
    return stock


def with_layers_of(
    config: DBPViTMAEConfig, model: PreTrainedModel, info: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The same function as ``model`` with the decorrelated layers that ``config`` chooses.

    The loading info lists each R that starts at I among the missing keys and each R that was fused among the
    unexpected.
    """
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        chosen = type(model)(config)
    before, layers = dict(decorrelated_layers(model)), dict(decorrelated_layers(chosen))
    common = before.keys() & layers.keys()
    other = {name for name in common if before[name].decorrelation.R.shape != layers[name].decorrelation.R.shape}
    if other:
        logger.warning(
            "R of %d layers gets %d blocks: W R replaces (W, R), and R starts at the identity again",
            len(other),
            config.wide_blocks,
        )
    kept = common - other
    state = fused_state_dict(model, keep=kept)
    fused, fresh = ({f"{name}.decorrelation.R" for name in one.keys() - kept} for one in (before, layers))
    for name in layers.keys() - kept:
        decorrelation = layers[name].decorrelation.to_empty(device=model.device)
        decorrelation.reset_parameters()
        state[f"{name}.decorrelation.R"] = decorrelation.R
    chosen.load_state_dict(state, assign=True)
    chosen.train(model.training)
    freeze_fixed_(chosen)
    return chosen, info | {
        "missing_keys": {*info["missing_keys"], *fresh},
        "unexpected_keys": {*info["unexpected_keys"], *fused},
    }


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def check_loaded(name: str, missing: list[str], ours: bool) -> None:
    """Refuse one of our checkpoints that lacks a tensor; log which tensors a foreign one leaves at initialisation."""
    if ours and missing:
        raise UserError(f"{name} lacks {len(missing)} tensors, among them {missing[0]}; the checkpoint is incomplete")
    fresh = [key for key in missing if not key.endswith("decorrelation.R")]
    if fresh:
        logger.warning(
            "%s has no weights for %d tensors, which start from their initialisation: %s",
            name,
            len(fresh),
            ", ".join(fresh),
        )


class DBPViTMAEModel(DBPPreTrainedMixin, ViTMAEModel):  # type: ignore[misc]
    """transformers' `ViTMAEModel` (the encoder), with the layers that its config chooses decorrelated."""

    stock_class = ViTMAEModel

    def __init__(self, config: DBPViTMAEConfig) -> None:
        super().__init__(config)
        decorrelate_blocks(self.layers, config)
        if config.decorrelated_layers != "none":
            patches, naive = self.embeddings, config.naive_decorrelation
            convert_to_decorrelated(patches, lambda module, _: isinstance(module, nn.Conv2d), naive=naive)


class DBPViTMAEForPreTraining(DBPPreTrainedMixin, RectangularViTMAE):
    """transformers' `ViTMAEForPreTraining` with a decorrelated encoder (paper section 2.2).

    Forward as in transformers: pixel_values (B, C, H, W) and optionally noise (B, T), which fixes the mask, give loss
    (mean squared error on masked patches), logits (B, T, p * p * C), mask (B, T) and ids_restore (B, T).
    """

    stock_class = ViTMAEForPreTraining
    encoder_class = DBPViTMAEModel

    def __init__(self, config: DBPViTMAEConfig) -> None:
        super().__init__(config)
        if config.decorrelated_layers == "full":
            decorrelate_blocks(self.decoder.decoder_layers, config)
            ends = named(("decoder_embed", "decoder_pred"))
            convert_to_decorrelated(self.decoder, ends, naive=config.naive_decorrelation)


def extract_vit(mae: PreTrainedModel) -> ViTModel:
    """The encoder of a stock, plain or decorrelated ViT-MAE (which is fused) as a stock `ViTModel` without pooler.

    Raises:
        UserError: a fused weight is not finite (the message names the layer), or ``mae`` is not a ViT-MAE.
    """
    if not isinstance(mae, ViTMAEForPreTraining | ViTMAEModel):
        raise UserError(f"expected a ViT-MAE model, got {type(mae).__name__}")
    encoder = mae.vit if isinstance(mae, ViTMAEForPreTraining) else mae
    config = ViTConfig(**stock_fields(encoder.config, ViTConfig))
    config._attn_implementation = encoder.config._attn_implementation
    return load_fused(ViTModel(config, add_pooling_layer=False), encoder)


AutoModel.register(DBPViTMAEConfig, DBPViTMAEModel)
AutoModelForPreTraining.register(DBPViTMAEConfig, DBPViTMAEForPreTraining)
for _ours, _stock in ((DBPViTMAEModel, "ViTMAEModel"), (DBPViTMAEForPreTraining, "ViTMAEForPreTraining")):
    register_checkpoint_conversion_mapping(
        _ours.__name__, get_checkpoint_conversion_mapping(_stock), overwrite=True
    )  # so that checkpoints with the key names of transformers v4 load
