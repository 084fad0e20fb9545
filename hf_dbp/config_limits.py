"""What the fields of the config.json of a ViT or ViT-MAE may be.

A config.json decides how much memory a model takes, and anyone can write one: `check_fields` refuses values that no ViT
has before any memory is allocated.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from transformers.activations import ACT2FN

from hf_dbp.errors import UserError

__all__ = ["CHECKED", "DTYPES", "LayerChoice", "check_fields", "check_image_size", "parameter_count"]

LayerChoice = Literal["encoder", "block_inputs", "full", "none"]


def check_image_size(image_size: int | list[int] | tuple[int, int], patch_size: int) -> None:
    """Raise a UserError, with the nearest valid sizes, if patches do not tile the image size (pixels)."""
    if not isinstance(patch_size, int) or patch_size < 1:
        raise UserError(f"patch_size is one positive number of pixels; got {patch_size!r}")
    for side in (image_size,) if isinstance(image_size, int) else image_size:
        if side < patch_size or side % patch_size:
            below, above = side // patch_size * patch_size, (side // patch_size + 1) * patch_size
            nearest = f"{below} or {above}" if below else str(above)
            raise UserError(f"image size {side} is not a multiple of patch size {patch_size}; use {nearest}")


WIDTH, LAYERS, HEADS = (1, 2**15), (1, 1000), (1, 1024)
#: Fields that are whole numbers: lowest and highest value; the largest published ViT has 48 layers and is 6,144 wide.
WHOLE = {
    "hidden_size": WIDTH,
    "intermediate_size": (1, 2**17),
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "decoder_hidden_size": WIDTH,
    "decoder_intermediate_size": (1, 2**17),
    "decoder_num_hidden_layers": LAYERS,
    "decoder_num_attention_heads": HEADS,
    "wide_blocks": (1, 2**17),
    "num_channels": (1, 4096),
    "patch_size": (1, 4096),
}
#: Fields that are numbers: lowest and highest allowed value.
NUMBERS = {
    "hidden_dropout_prob": (0.0, 1.0),
    "attention_probs_dropout_prob": (0.0, 1.0),
    "initializer_range": (0.0, 1.0),
    "layer_norm_eps": (0.0, 1.0),
    "mask_ratio": (0.0, 1.0 - 1e-6),
}
FLAGS = ("qkv_bias", "norm_pix_loss", "naive_decorrelation")
#: Every field that defines a ViT or a ViT-MAE, ours or stock.
CHECKED = (*WHOLE, *NUMBERS, *FLAGS, "hidden_act", "image_size", "decorrelated_layers")
DTYPES = ("float32", "bfloat16", "float16", "float64")
SIDE, TOKENS, PARAMETERS, LABELS = 2**16, 2**20, 2**35, 2**20


def check_fields(fields: Mapping[str, Any], name: str = "the configuration") -> None:
    """Refuse values that no ViT has, such as sizes that would take all memory or the wrong type; allocates nothing.

    Args:
        fields: the fields of a configuration; absent ones have their defaults, unknown ones are ignored.
        name: how error messages refer to it.

    Raises:
        UserError: names the field, its value and what is allowed.
    """

    def wrong(field: str, expected: str) -> ValueError:
        return UserError(f"{name}: {field} is {reprlib.repr(fields[field])}; expected {expected}")

    for field, (low, high) in WHOLE.items():
        if field in fields and not (type(fields[field]) is int and low <= fields[field] <= high):
            raise wrong(field, f"a whole number from {low} to {high}")
    for field, (lowest, highest) in NUMBERS.items():
        if field in fields and not (type(fields[field]) in (int, float) and lowest <= fields[field] <= highest):
            raise wrong(field, f"a number from {lowest:g} to {highest:g}")
    for field in FLAGS:
        if field in fields and type(fields[field]) is not bool:
            raise wrong(field, "true or false")
    if "hidden_act" in fields and not (isinstance(fields["hidden_act"], str) and fields["hidden_act"] in ACT2FN):
        raise wrong("hidden_act", f"one of {', '.join(sorted(ACT2FN)[:8])} ...")
    choices = get_args(LayerChoice)
    if "decorrelated_layers" in fields and fields["decorrelated_layers"] not in choices:
        raise wrong("decorrelated_layers", f"one of {', '.join(choices)}")
    size, patch = fields.get("image_size", 224), fields.get("patch_size", 16)
    sides = size if isinstance(size, list | tuple) else [size]
    if len(sides) not in (1, 2) or not all(type(side) is int and 1 <= side <= SIDE for side in sides):
        raise wrong("image_size", f"one side or two in pixels, each from 1 to {SIDE}")
    for side in (sides[0], sides[-1]):
        check_image_size(side, patch)
    if (sides[0] // patch) * (sides[-1] // patch) > TOKENS:
        raise wrong("image_size", f"at most {TOKENS} patches of {patch} pixels")
    for prefix in ("", "decoder_"):
        width, heads = (fields.get(f"{prefix}{field}", 0) for field in ("hidden_size", "num_attention_heads"))
        if width and heads and width % heads:
            raise wrong(f"{prefix}hidden_size", f"a multiple of {prefix}num_attention_heads, {heads}")
    for prefix, default in (("", 3072), ("decoder_", 2048)):
        inner = fields.get(f"{prefix}intermediate_size", default)
        counts = not prefix or fields.get("decorrelated_layers") == "full"
        if counts and inner % fields.get("wide_blocks", 1):
            raise wrong("wide_blocks", f"a divisor of {prefix}intermediate_size, {inner}")
    if type(fields.get("num_labels", 0)) is not int or fields.get("num_labels", 0) > LABELS:
        raise wrong("num_labels", f"a whole number up to {LABELS}")
    for field in ("dtype", "torch_dtype"):
        if not isinstance(fields.get(field), torch.dtype | None) and fields[field] not in DTYPES:
            raise wrong(field, f"one of {', '.join(DTYPES)}")
    if parameter_count(fields) > PARAMETERS:
        raise UserError(f"{name}: it has {parameter_count(fields):.1e} parameters; expected at most {PARAMETERS:.1e}")


def parameter_count(fields: Mapping[str, Any]) -> int:
    """The approximate number of parameters, R included, of a model with these checked fields."""

    decorrelated = fields.get("decorrelated_layers", "none") != "none"

    def blocks(prefix: str, depth: int, width: int, inner: int) -> int:
        depth, width = fields.get(f"{prefix}num_hidden_layers", depth), fields.get(f"{prefix}hidden_size", width)
        inner = fields.get(f"{prefix}intermediate_size", inner)
        products = 4 * width**2 + 2 * width * inner
        matrices = 3 * width**2 + inner**2 // fields.get("wide_blocks", 1) if decorrelated and not prefix else 0
        return int(depth * (products + matrices))

    size, patch = fields.get("image_size", 224), fields.get("patch_size", 16)
    sides = size if isinstance(size, list | tuple) else [size]
    pixels = patch**2 * fields.get("num_channels", 3)
    widths = fields.get("hidden_size", 768) + fields.get("decoder_hidden_size", 512)
    ends = widths * ((sides[0] // patch) * (sides[-1] // patch) + pixels) + (pixels**2 if decorrelated else 0)
    return blocks("", 12, 768, 3072) + blocks("decoder_", 8, 512, 2048) + int(ends)
