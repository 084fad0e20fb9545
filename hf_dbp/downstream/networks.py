"""Trained models of any stock class, from a folder or the Hub, for prediction: data, never code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import load_weights

__all__ = ["channels_of", "load_stock", "weights_digest", "without_code"]

CODE = ("auto_map", "attn_implementation", "_attn_implementation", "quantization_config")  # of a config: never followed


def load_stock(
    auto_class: Any, model: str, content: Mapping[str, Any], task: str, **hub_options: Any
) -> PreTrainedModel:
    """The model of a folder or Hub id, of a class that transformers has.

    Args:
        auto_class: transformers' Auto class of the task.
        model: folder or Hub id.
        content: of its config.json.
        task: what messages call it, such as ``semantic segmentation``.
        hub_options: revision, cache_dir, token.

    Raises:
        UserError: another kind of model, or weights that are none; see `hf_dbp.hub.untrusted`.
    """
    try:
        config = AutoConfig.for_model(**without_code(content))
        network, missing = load_weights(auto_class, model, config=config, **hub_options)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{model} is no model for {task} that is known: {error}") from error
    if missing:
        raise UserError(f"{model} lacks {len(missing)} tensors of the model, among them {missing[0]}")
    return network


def without_code(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what would load code, kernels or quantisers."""
    kept = {key: value for key, value in content.items() if key not in CODE}
    return {key: without_code(value) if isinstance(value, dict) else value for key, value in kept.items()}


def channels_of(content: Mapping[str, Any]) -> int:
    """Channels of the images that a model takes; 3 where its config does not say."""
    backbone = content.get("backbone_config")
    own = backbone if isinstance(backbone, dict) else content
    return int(own.get("num_channels", content.get("num_channels", 3)))


def weights_digest(model: nn.Module) -> str:
    """A name for the weights, from a few values of each tensor."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        values = tensor.flatten()[:: max(1, tensor.numel() // 16)].cpu()
        digest.update(name.encode() + values.float().numpy().tobytes())
    return digest.hexdigest()
