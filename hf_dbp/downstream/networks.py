"""Load trained models of any stock class, from a folder or the Hub, as data, never as code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import load_weights, read_json

__all__ = ["channels_of", "chosen_device", "load_stock", "processor_size", "weights_digest", "without_code"]

CODE = (
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "quantization_config",
)  # fields of a config that are never followed


def load_stock(
    auto_class: Any, model: str, content: Mapping[str, Any], task: str, **hub_options: Any
) -> PreTrainedModel:
    """Load a model of a class of transformers from a folder or Hub id.

    Args:
        auto_class: transformers' Auto class of the task.
        model: folder or Hub id.
        content: content of its config.json.
        task: how messages refer to its task, such as ``semantic segmentation``.
        hub_options: revision, cache_dir, token.

    Raises:
        UserError: another kind of model, or invalid weights; see `hf_dbp.hub.untrusted`.
    """
    try:
        config = AutoConfig.for_model(**without_code(content))
        network, missing = load_weights(auto_class, model, config=config, **hub_options)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{model} is not a known model for {task}: {error}") from error
    if missing:
        raise UserError(f"{model} lacks {len(missing)} tensors of the model, among them {missing[0]}")
    return network


def without_code(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without the fields that would load code, kernels or quantisers."""
    kept = {key: value for key, value in content.items() if key not in CODE}
    return {key: without_code(value) if isinstance(value, dict) else value for key, value in kept.items()}


def channels_of(content: Mapping[str, Any]) -> int:
    """Channels of a model's input images; 3 if its config does not say."""
    backbone = content.get("backbone_config")
    own = backbone if isinstance(backbone, dict) else content
    return int(own.get("num_channels", content.get("num_channels", 3)))


def processor_size(model: str) -> tuple[int, int]:
    """The height and width to which a model's image processor brings images. UserError if it names none."""
    found = read_json(model, "preprocessor_config.json")
    content = {} if found is None else found[1]
    size = content.get("crop_size") if content.get("do_center_crop") else None
    size = size or content.get("size") or content.get("crop_size")
    if isinstance(size, int):
        size = {"height": size, "width": size}
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        height, width = (size.get(name, edge) for name in ("height", "width"))
        if isinstance(height, int) and isinstance(width, int) and 0 < min(height, width) <= max(height, width) <= 2**16:
            return height, width
    raise UserError(f"{model} has no image processor that says at which size it sees images (preprocessor_config.json)")


def weights_digest(model: nn.Module) -> str:
    """A digest of the weights, from a few values of each tensor."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        values = tensor.flatten()[:: max(1, tensor.numel() // 16)].cpu()
        digest.update(name.encode() + values.float().numpy().tobytes())
    return digest.hexdigest()


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; by default a GPU if there is one. UserError if this machine has no such device."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--device {name}: {reason}; give cpu, or cuda on a machine with a GPU") from error
    return device
