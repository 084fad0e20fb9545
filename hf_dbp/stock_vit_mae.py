"""transformers' ViT-MAE, corrected for every method: initialisation, fixed parameters, rectangular images.

- A fresh stock model has all-zero position tables and tokens; `initialize_mae_` draws what He et al. (2022) draw: fixed
  2-D sin-cos tables in encoder and decoder, xavier-uniform linears and patch projection, normal(0.02) class and mask
  tokens.
- A loaded stock model has trainable position tables; `freeze_fixed_` freezes them again, and every R.
- The stock class refuses rectangles; `RectangularViTMAE` is the stock model without that restriction.

Shapes: B images, C channels, T patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel
from transformers import initialization as init
from transformers.models.vit_mae.modeling_vit_mae import (
    ViTMAEDecoder,
    ViTMAEEmbeddings,
    build_2d_sinusoidal_position_embedding,
)

from hf_dbp.config_limits import check_image_size
from hf_dbp.errors import UserError
from hf_dbp.layers import Decorrelation

__all__ = [
    "RectangularViTMAE",
    "freeze_fixed_",
    "initialize_mae_",
    "initialize_mae_module",
    "patch_grid",
    "resampled_positions",
]


def patch_grid(config: ViTMAEConfig) -> tuple[int, int]:
    """(rows, columns) of patches."""
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return height // config.patch_size, width // config.patch_size


def sincos_table(grid: tuple[int, int], dim: int) -> Tensor:
    """MAE's fixed position table (1, 1 + T, dim): zeros for the class token, then sin and cos of w, then of h."""
    if dim % 4:
        raise UserError(f"sin-cos position tables need a hidden size that is a multiple of 4, got {dim}")
    table = build_2d_sinusoidal_position_embedding(*grid, embed_dim=dim, cls_token=True)
    h_half, w_half = table.chunk(2, dim=-1)
    return torch.cat([w_half, h_half], dim=-1).unsqueeze(0)


def initialize_mae_module(module: nn.Module, config: ViTMAEConfig) -> None:
    """Initialise the parameters that ``module`` itself holds as He et al. do, unless they were loaded. Those of its
    children stay: transformers does not call this for a module that holds no parameters itself.
    """
    if isinstance(module, nn.Linear):
        init.xavier_uniform_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):  # the patch projection
        fan_out, fan_in = module.weight.flatten(1).shape
        bound = (6.0 / (fan_in + fan_out)) ** 0.5  # xavier-uniform of the flattened kernel
        init.uniform_(module.weight, -bound, bound)
        init.zeros_(module.bias)
    elif isinstance(module, ViTMAEEmbeddings):
        init.copy_(module.position_embeddings, sincos_table(patch_grid(config), module.position_embeddings.shape[-1]))
        init.normal_(module.cls_token, std=config.initializer_range)
    elif isinstance(module, ViTMAEDecoder):
        init.copy_(module.decoder_pos_embed, sincos_table(patch_grid(config), module.decoder_pos_embed.shape[-1]))
        init.normal_(module.mask_token, std=config.initializer_range)
    elif isinstance(module, Decorrelation):
        init.copy_(module.R, torch.eye(module.R.shape[-1]).expand_as(module.R))


def freeze_fixed_(model: nn.Module) -> None:
    """Freeze again what no gradient may change, because transformers' loading leaves every tensor trainable: every R
    and, as in He et al., the position tables. A stock model also needs this after `from_pretrained`.
    """
    for module in model.modules():
        if isinstance(module, Decorrelation):
            module.R.requires_grad_(False)
        elif isinstance(module, ViTMAEEmbeddings):
            module.position_embeddings.requires_grad_(False)
        elif isinstance(module, ViTMAEDecoder):
            module.decoder_pos_embed.requires_grad_(False)


@torch.no_grad()
def initialize_mae_(model: PreTrainedModel) -> None:
    """Initialise all weights of a ViT-MAE correctly, in place (a new stock model is not initialised correctly). Draws
    follow the order of the modules, so a stock, a plain and a decorrelated model get the same weights from one seed.
    """
    for module in model.modules():
        initialize_mae_module(module, model.config)


class RectangularDecoder(ViTMAEDecoder):  # type: ignore[misc]
    """transformers' decoder with a position table for any number of rows and columns instead of a square."""

    def initialize_weights(self, num_patches: int) -> None:
        initialize_mae_module(self, self.config)


class RectangularViTMAE(ViTMAEForPreTraining):  # type: ignore[misc]
    """transformers' `ViTMAEForPreTraining` for images of any height and width that the patches tile."""

    accepts_loss_kwargs = False  # its loss is a mean: a Trainer must not treat it as a sum over counted items
    encoder_class: type[ViTMAEModel] = ViTMAEModel

    def __init__(self, config: ViTMAEConfig) -> None:
        check_image_size(config.image_size, config.patch_size)
        super(ViTMAEForPreTraining, self).__init__(config)  # the stock __init__ builds a square decoder
        self.vit = self.encoder_class(config)
        self.decoder = RectangularDecoder(config, num_patches=self.vit.embeddings.patch_embeddings.num_patches)
        self.post_init()

    def patchify(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, T, p * p * C). The flag disables the stock check that H = W; the embeddings check
        sizes."""
        patches: Tensor = super().patchify(pixel_values, interpolate_pos_encoding=True)
        return patches

    def unpatchify(self, patchified_pixel_values: Tensor, original_image_size: tuple[int, int] | None = None) -> Tensor:
        """(B, T, p * p * C) -> (B, C, H, W)."""
        rows, columns = patch_grid(self.config)
        size = original_image_size or (rows * self.config.patch_size, columns * self.config.patch_size)
        pixels: Tensor = super().unpatchify(patchified_pixel_values, size)
        return pixels


def resampled_positions(positions_1TD: Tensor, to: tuple[int, int], grid: tuple[int, int] | None = None) -> Tensor:
    """A position table (1, 1 + T, D) for another grid of patches, bicubic; as it is for its own.

    Args:
        positions_1TD: the table, the class token first.
        to: rows and columns of the grid that is wanted.
        grid: those of the table; None for a square.
    """
    side = round((positions_1TD.shape[1] - 1) ** 0.5)
    height, width = grid or (side, side)
    if to == (height, width):
        return positions_1TD
    grid_1DHW = positions_1TD[:, 1:].transpose(1, 2).reshape(1, -1, height, width)
    grid_1DHW = nn.functional.interpolate(grid_1DHW, size=to, mode="bicubic", align_corners=False)
    return torch.cat([positions_1TD[:, :1], grid_1DHW.flatten(2).transpose(1, 2)], dim=1)
