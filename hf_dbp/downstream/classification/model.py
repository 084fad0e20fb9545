"""A stock classifier over a ViT: `BeitForImageClassification`, which is exactly He et al.'s fine-tuning model.

    logits = W LN(mean over the patch tokens) + b

He et al. average the patch tokens, normalise the mean with a new LayerNorm in place of the encoder's last, and use drop
path in training. Of the stock classes

- `ViTForImageClassification` reads the class token and has no drop path;
- `Dinov2ForImageClassification` reads class token and mean side by side, after the encoder's last norm;
- `BeitForImageClassification` with ``use_mean_pooling`` is the formula above, with drop path, and
  `hf_dbp.downstream.beit` loads a ViT's weights into it: hidden states are equal up to rounding.

So a saved folder loads with `AutoModelForImageClassification` without hf_dbp.

Shapes: D width; T patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    PreTrainedModel,
    ViTModel,
)

from hf_dbp.config_limits import check_image_size
from hf_dbp.downstream.beit import beit_fields, beit_state, sides
from hf_dbp.downstream.networks import load_stock
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import read_config
from hf_dbp.stock_vit_mae import resampled_positions

__all__ = ["build_classifier", "load_classifier"]

HEAD_STD = 2e-5  # He et al.'s


def build_classifier(
    vit: ViTModel, names: Sequence[str], *, drop_path: float = 0.1, image_size: tuple[int, int] | None = None
) -> BeitForImageClassification:
    """A classifier with a new head over the ViT's weights (copied).

    Args:
        vit: stock ViT of any patch size and number of channels.
        names: class names.
        drop_path: drop probability of the last layer; it falls to 0 at the first.
        image_size: height and width of its input, for which the positions are resampled. Default: the ViT's own.

    Raises:
        UserError: patches do not tile that size.
    """
    patch = sides(vit.config.patch_size)[0]
    size = image_size or sides(vit.config.image_size)
    check_image_size(size, patch)
    fields = beit_fields(vit.config) | {"drop_path_rate": drop_path, "image_size": max(size)}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: k for k, name in enumerate(names)}}
    model = BeitForImageClassification(BeitConfig(**fields, **labels, use_mean_pooling=True))
    state = beit_state(vit)
    table, side = "embeddings.position_embeddings", max(size) // patch
    state[table] = resampled_positions(state[table], (side, side))
    found = model.beit.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and all(name.startswith("pooler.") for name in found.missing_keys), found
    nn.init.trunc_normal_(model.classifier.weight, std=HEAD_STD)
    nn.init.zeros_(model.classifier.bias)
    return model


def load_classifier(source: str, **hub_options: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Load a trained classifier of any stock class from a folder or the Hub, and the content of its config.json.

    Raises: UserError: it is not a classifier; see `hf_dbp.hub.untrusted`.
    """
    content = read_config(source, **hub_options)
    architectures = content.get("architectures") or []
    if not any(str(name).endswith("ForImageClassification") for name in architectures):
        raise UserError(f"{source} holds {', '.join(map(str, architectures)) or 'no architecture'}, not a classifier")
    model = load_stock(AutoModelForImageClassification, source, content, "image classification", **hub_options)
    return model, content
