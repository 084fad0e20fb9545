"""`DBPViTMAEConfig`: a `ViTMAEConfig` that also says which layers are decorrelated.

How R is trained (eta, subsample, schedule) belongs to the run, not to the model: see `hf_dbp.callbacks`.

A config.json is checked against `hf_dbp.config_limits` before any memory is allocated.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ViTMAEConfig

from hf_dbp.config_limits import CHECKED, check_fields
from hf_dbp.errors import UserError

__all__ = ["SIZES", "DBPViTMAEConfig"]


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


#: Named model sizes: encoder of ViT-Tiny, Small, Base and Large, and a mini one for small images on few cores.
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
        decorrelated_layers: ``"encoder"`` (default): the patch projection and, in every encoder block, q/k/v (one R),
            the attention output and both MLP linears. ``"block_inputs"``, the cheap form: the patch projection, q/k/v
            and the first MLP linear. ``"full"``: the encoder and every linear of the decoder, for the paper's ablation
            (appendix B). ``"none"``: plain backprop.
        wide_blocks: R of an input that is wider than the hidden size, that of every second MLP linear, is
            block-diagonal with so many blocks (see `hf_dbp.functional`); 1: a full R.
        naive_decorrelation: compute z = R x for every token instead of A = W R; the same function, for checks.
        kwargs: everything else, as in `ViTMAEConfig`. ``image_size`` may be (height, width).

    Raises:
        UserError: an unknown choice, blocks that do not divide the width of the MLP, or a size that is not
            a multiple of the patch size.
    """

    model_type = "dbp_vit_mae"

    decorrelated_layers: str = "encoder"
    wide_blocks: int = 1
    naive_decorrelation: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        check_fields({name: getattr(self, name) for name in CHECKED} | kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, where `AutoConfig` calls it with the content of a config.json; raises as above."""
        check_fields(config_dict)
        try:
            return super().from_dict(config_dict, **kwargs)
        except UserError:
            raise
        except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:  # every model's fields
            raise UserError(f"the configuration: {' '.join(str(error).split())}") from error


AutoConfig.register(DBPViTMAEConfig.model_type, DBPViTMAEConfig)
