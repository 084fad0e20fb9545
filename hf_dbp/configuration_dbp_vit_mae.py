"""`DBPViTMAEConfig`: a `ViTMAEConfig` plus which layers are decorrelated.

How R is trained (eta, subsample, schedule) belongs to the run, not to the model: see `hf_dbp.callbacks`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import AutoConfig, ViTMAEConfig

__all__ = ["SIZES", "DBPViTMAEConfig", "LayerChoice", "check_image_size"]

LayerChoice = Literal["encoder", "block_inputs", "full", "none"]


def _size(layers: int, width: int, heads: int, decoder_width: int = 512, decoder_heads: int = 16) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "decoder_num_hidden_layers": 2,  # the paper's depth (section 2.2)
        "decoder_hidden_size": decoder_width,
        "decoder_num_attention_heads": decoder_heads,
        "decoder_intermediate_size": 4 * decoder_width,
    }


#: Named model sizes: encoder of ViT-Tiny, Small, Base and Large, and a mini one for small images on a few cores.
SIZES: dict[str, dict[str, int]] = {
    "mini": _size(4, 128, 4, 64, 4),
    "tiny": _size(12, 192, 3, 192, 3),
    "small": _size(12, 384, 6),
    "base": _size(12, 768, 12),
    "large": _size(24, 1024, 16),
}


class DBPViTMAEConfig(ViTMAEConfig):  # type: ignore[misc]
    """Configuration of a ViT-MAE with decorrelated layers.

    Args:
        decorrelated_layers: ``"encoder"`` (default): the patch projection and in every encoder block q/k/v (one R),
            attention output, both MLP linears. ``"block_inputs"``, the cheap form: patch projection, q/k/v and first
            MLP linear. ``"full"``: the encoder and every linear of the decoder, for the paper's ablation (appendix B).
            ``"none"``: plain backprop.
        naive_decorrelation: form z = R x for every token instead of A = W R; same function, for checks.
        kwargs: everything else, as in `ViTMAEConfig`. ``image_size`` may be (height, width).

    Raises:
        ValueError: an unknown choice, or a size that is not a multiple of the patch.
    """

    model_type = "dbp_vit_mae"

    decorrelated_layers: str = "encoder"
    naive_decorrelation: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.decorrelated_layers not in get_args(LayerChoice):
            raise ValueError(
                f"decorrelated_layers is one of {', '.join(get_args(LayerChoice))}; got {self.decorrelated_layers!r}"
            )
        check_image_size(self.image_size, self.patch_size)


def check_image_size(image_size: int | list[int] | tuple[int, int], patch_size: int) -> None:
    """Refuse an image size that the patches do not tile. ValueError with the nearest sizes that would do."""
    if not isinstance(patch_size, int) or patch_size < 1:
        raise ValueError(f"patch_size is one positive number of pixels; got {patch_size!r}")
    for side in (image_size,) if isinstance(image_size, int) else image_size:
        if side < patch_size or side % patch_size:
            below, above = side // patch_size * patch_size, (side // patch_size + 1) * patch_size
            nearest = f"{below} or {above}" if below else str(above)
            raise ValueError(f"image size {side} is not a multiple of patch size {patch_size}; use {nearest}")


AutoConfig.register(DBPViTMAEConfig.model_type, DBPViTMAEConfig)
