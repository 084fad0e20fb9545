"""Other people's models, from a folder or the Hub: data, never code, checked before memory is allocated for them.

- From config.json only the fields that define a ViT or a ViT-MAE are read (`CHECKED`), each checked; nothing else in it
  has an effect: no ``auto_map`` (remote code), no ``quantization_config``, no ``attn_implementation`` (kernels from the
  Hub).
- The class follows from its ``model_type`` (`KINDS`); transformers' Auto classes are not used.
- Weights are safetensors; pickles (``pytorch_model.bin``) are refused.
- Every tensor of the model must be there with its shape.

Anything wrong raises a one-line UserError that names the file.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel
from transformers.utils import cached_file

from hf_dbp.config_limits import CHECKED, DTYPES, check_fields, parameter_count
from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.data.values import UNIT, ValueRange, unit_scale
from hf_dbp.errors import UserError
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining

__all__ = [
    "KINDS",
    "check_memory",
    "known_fields",
    "load_model",
    "load_weights",
    "read_config",
    "read_statistics",
    "read_value_range",
]

KINDS = {
    "dbp_vit_mae": (DBPViTMAEForPreTraining, DBPViTMAEConfig),
    "vit_mae": (ViTMAEForPreTraining, ViTMAEConfig),
    "vit": (ViTModel, ViTConfig),
}


def read_json(source: str | os.PathLike[str], name: str, **hub: Any) -> tuple[str, dict[str, Any]] | None:
    """Path and content of a JSON file of a model; None if the model has no such file.

    Raises:
        UserError: there is no such model, or the file is not a JSON mapping.
    """
    try:
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
        if file is None:
            return None
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{source}: {one_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{Path(source) / name} is not JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON mapping of names to values")
    return file, content


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def read_config(source: str | os.PathLike[str], **hub: Any) -> dict[str, Any]:
    """The content of a model's config.json, its fields checked.

    Args:
        source: folder or Hub id.
        hub: revision, token, cache_dir.

    Raises:
        UserError: there is none, or a field has a value that no ViT has.
    """
    found = read_json(source, "config.json", **hub)
    if found is None:
        raise UserError(f"{source} holds no config.json; give a folder or a Hub id of a model")
    file, content = found
    if "model_type" not in content and "architecture" in content:
        raise UserError(
            f"{source} is timm's {content['architecture']!r:.80}; take a model in transformers' form, such as "
            "facebook/vit-mae-base or google/vit-base-patch16-224"
        )
    if not isinstance(content.get("model_type"), str):
        raise UserError(f"{file}: model_type is {content.get('model_type')!r}; expected a name such as 'vit'")
    if content["model_type"] in KINDS:
        check_fields(content, file)
    return content


def known_fields(content: Mapping[str, Any], config_class: type[Any]) -> dict[str, Any]:
    """The fields of a config.json that belong to that configuration class."""
    return {name: content[name] for name in CHECKED if name in content and name in config_class.__dataclass_fields__}


def check_memory(fields: Mapping[str, Any], name: str) -> None:
    """Raise a UserError, with both sizes, for a model that does not fit into this machine's memory in float32."""
    if sys.platform == "win32":
        return
    needed, there = 4 * parameter_count(fields), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"{name}: the model takes {needed / 2**30:.0f} GiB, but this machine has {there / 2**30:.0f} GiB"
        )


def load_model(source: str | os.PathLike[str], *kinds: str, **kwargs: Any) -> PreTrainedModel:
    """Load the model in a folder or on the Hub.

    Args:
        source: folder or Hub id.
        kinds: the accepted values of ``model_type``, from `KINDS`.
        kwargs: as for ``from_pretrained``; ``dtype`` as for `load_weights`.

    Raises:
        UserError: another kind of model, a configuration that no ViT has, or weights that are damaged, incomplete, of
            other shapes or not safetensors.
    """
    hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if name in kwargs}
    content = read_config(source, **hub)
    kind = content["model_type"]
    if kind not in kinds:
        raise UserError(f"{source} holds a {kind!r} model, not {' or '.join(map(repr, kinds))}")
    model_class, config_class = KINDS[kind]
    fields = known_fields(content, config_class)
    check_memory(fields, str(source))
    dtype = content.get("dtype", content.get("torch_dtype"))
    config = config_class(**fields, **({"dtype": dtype} if dtype in DTYPES else {}))
    model, missing = load_weights(model_class, source, config=config, **kwargs)
    if missing:
        raise UserError(f"{source} lacks {len(missing)} tensors of the model, among them {missing[0]}")
    return model


def load_weights(
    model_class: Any,
    source: str | os.PathLike[str],
    *,
    config: Any,
    dtype: torch.dtype | str = torch.float32,
    **kwargs: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """``model_class.from_pretrained`` with this configuration, from safetensors only, and the tensors they lack besides
    R. Errors as for `load_model`.

    Whatever type the weights are stored in, they are loaded in float32, which holds every 16-bit number: most steps of
    an optimizer are too small to register in 16 bits, and many CPUs are slow in them (`hf_dbp.precision`). ``dtype``,
    or ``torch_dtype`` as it was called, names another type; "auto" is the stored one.
    """
    check_files(source)
    dtype = kwargs.pop("torch_dtype", dtype)
    try:
        model, info = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
    except OSError as error:
        pickles = [*Path(source).glob("*.bin"), *Path(source).glob("*.pt")] if Path(source).is_dir() else []
        why = f"{pickles[0]} is a pickle, which could execute code, and is not loaded" if pickles else one_line(error)
        raise UserError(f"{source} has no weights in safetensors: {why}") from error
    except (SafetensorError, StrictDataclassError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{source} cannot be loaded: {one_line(error)}") from error
    for name, theirs, ours in sorted(info["mismatched_keys"]):
        raise UserError(f"{source}: {name} has shape {list(theirs)} in its weights but {list(ours)} by its config.json")
    return model, sorted(name for name in info["missing_keys"] if not name.endswith("decorrelation.R"))


def check_files(source: str | os.PathLike[str]) -> None:
    """Open every safetensors file of somebody's model folder, to find damaged ones.

    UserError for one whose header does not match it, or an invalid index.
    """
    if not Path(source).is_dir():
        return
    for file in sorted(Path(source).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged or not a safetensors file: {one_line(error)}") from error
    for file in sorted(Path(source).glob("*.index*.json")):
        found = read_json(source, file.name)
        parts = found[1].get("weight_map") if found else None
        if not isinstance(parts, dict) or not all(
            isinstance(part, str) and part.endswith(".safetensors") and Path(part).name == part
            for part in parts.values()
        ):
            raise UserError(f"{file} must map tensors to safetensors files beside it")


def read_statistics(source: str | os.PathLike[str], **hub: Any) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation per channel, for values in [0, 1], from a model's image processor; None if it has
    none.

    Raises:
        UserError: they are not such numbers.
    """
    found = read_json(source, "preprocessor_config.json", **hub)
    if found is None:
        return None
    file, content = found
    mean, std = (content.get(name, [0.5] * 3) for name in ("image_mean", "image_std"))
    for values in (mean, std):
        if not isinstance(values, list) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            raise UserError(f"{file}: image_mean and image_std are lists of numbers; got {mean!r:.80} and {std!r:.80}")
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise UserError(f"{file}: image_std must be above 0, one for each of image_mean; got {std!r:.80}")
    low, factor = unit_scale(np.dtype(np.float32), read_value_range(source, **hub) or UNIT)
    return [value - low * factor for value in mean] if low else mean, std


def read_value_range(source: str | os.PathLike[str], **hub: Any) -> ValueRange | None:
    """The range of float images in a model's image processor, see `hf_dbp.data.values`; None if it has none.

    A processor that does not rescale, such as those of version 0.1.0 for float images, means [0, 1].

    Raises:
        UserError: it is not a range.
    """
    found = read_json(source, "preprocessor_config.json", **hub)
    if found is None:
        return None
    file, content = found
    value = content.get("value_range")
    if value is None:
        return UNIT if content.get("do_rescale") is False else None
    numbers = isinstance(value, list) and all(type(v) in (int, float) and math.isfinite(v) for v in value)
    if not numbers or len(value) != 2 or not value[0] < value[1]:
        raise UserError(f"{file}: value_range is [low, high], two numbers; got {value!r:.80}")
    return float(value[0]), float(value[1])
