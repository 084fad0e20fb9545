"""Read masks of class ids from files: index images, colours or grey values with a palette, or two values.

A palette file is YAML or JSON; it maps class names to colours or grey values, in the order of the class ids:

    background: "#000000"            # or [0, 0, 0]; or a grey value such as 0
    wire: "#ffa500"
    pad: ["#00ff00", "#00ffff"]      # several colours for one class
    ignore: "#ffffff"                # pixels of this name are neither learned nor scored

``binary`` instead of a file means that a mask holds two values: 0 is ``background`` and the other one ``foreground``.

All masks of a set must mean the same: `MaskKind` holds what a mask reveals about its meaning, and `check_kinds`
compares. Whole numbers are ids, whether stored as 8 bits, 16 bits or floats; 1-bit masks hold the ids 0 and 1.

Shapes: H, W height and width; K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageColor

from hf_dbp.data.decoding import encoded_bytes
from hf_dbp.errors import UserError
from hf_dbp.recipes import safe_yaml

__all__ = [
    "BINARY",
    "FULL",
    "IGNORE",
    "MaskKind",
    "Palette",
    "check_kinds",
    "colour_names",
    "grey_code",
    "index_mask",
    "mask_kind",
    "read_palette",
    "rgb_codes",
    "same_palettes",
    "whole_numbers",
]

Array = NDArray[Any]
BINARY = "binary"
IGNORE = "ignore"
WIDE = 1 << 24  # added to the code of a grey value above 255, which is not an 8-bit colour
FULL = (1, 255, 65535)  # values that programs write for "foreground" in 1, 8 and 16 bits


class Palette:
    """The meaning of colours or grey values.

    Args:
        source: palette file, or ``binary``.
        ignore_index: id for ``ignore``.

    Attributes:
        names: class names by id 0..K-1.

    Raises:
        UserError: there is no such file, it is not such a mapping, or two classes have the same colour.
    """

    def __init__(self, source: str, ignore_index: int) -> None:
        self.source = source
        if source == BINARY:
            self.names = {0: "background", 1: "foreground"}
            entries: dict[int, int] = {}
        else:
            content = read_palette(source)
            names = [name for name in content if name != IGNORE]
            self.names = dict(enumerate(names))
            entries = {}
            for name, colours in content.items():
                for code in (colour_code(colour, source) for colour in colours):
                    if code in entries:
                        raise UserError(f"--palette {source}: {colour_names([code])[0]} has two names; keep one")
                    entries[code] = ignore_index if name == IGNORE else names.index(name)
        self.codes = np.array(sorted(entries), np.int64)
        self.ids = np.array([entries[int(code)] for code in self.codes], np.int32)

    def __call__(self, mask: Any) -> Array:
        """Class ids (H, W) of a stored mask. A UserError names colours without a class."""
        codes_HW = rgb_codes(mask)
        if self.source == BINARY:
            return two_values(codes_HW)
        position_HW = np.searchsorted(self.codes, codes_HW).clip(max=len(self.codes) - 1)
        unknown_HW = self.codes[position_HW] != codes_HW
        if unknown_HW.any():
            codes, counts = np.unique(codes_HW[unknown_HW], return_counts=True)
            found = ", ".join(colour_names(codes[np.argsort(-counts)][:5]))
            hint = "; JPEG smears colours, so save masks as PNG" if len(codes) > 64 else ""
            raise UserError(
                f"the mask has {len(codes)} colours without a class, mainly {found}: add them to {self.source}{hint}"
            )
        ids_HW: Array = self.ids[position_HW]
        return ids_HW


def two_values(codes_HW: Array) -> Array:
    """0 where a mask is 0, else 1 (H, W). UserError for a mask with more than one other value."""
    codes, counts = np.unique(codes_HW[codes_HW != 0], return_counts=True)
    if len(codes) > 1:
        found = ", ".join(colour_names(codes[np.argsort(-counts)][:5]))
        hint = "; JPEG smears values, so save masks as PNG" if len(codes) > 8 else ""
        raise UserError(f"the mask has {len(codes)} values besides 0, mainly {found}: it is not binary{hint}")
    ids_HW: Array = (codes_HW != 0).astype(np.int32)
    return ids_HW


def read_palette(source: str) -> dict[str, list[Any]]:
    """Class names and, for each, a list of colours."""
    try:
        content = safe_yaml(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--palette {source} cannot be read ({error}); give a YAML file or `{BINARY}`") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f'--palette {source} is not a mapping of class names to colours, such as wire: "#ffa500"')
    return {str(name): value if is_list_of_colours(value) else [value] for name, value in content.items()}


def is_list_of_colours(value: Any) -> bool:
    return isinstance(value, list) and not (len(value) == 3 and all(isinstance(part, int) for part in value))


def colour_code(colour: Any, source: str) -> int:
    """The code, as in `rgb_codes`, of "#rrggbb", a colour name, [r, g, b] or a grey value."""
    if isinstance(colour, int) and 0 <= colour < 2**32:
        return grey_code(colour)
    values = colour
    if isinstance(colour, str):
        with contextlib.suppress(ValueError):
            values = ImageColor.getcolor(colour, "RGB")
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(v in range(256) for v in values):
        raise UserError(f'--palette {source}: {colour!r} is not a colour; write "#rrggbb", [r, g, b] or a grey value')
    red, green, blue = values
    return int(red) << 16 | int(green) << 8 | int(blue)


def grey_code(value: int) -> int:
    """The code of a grey value."""
    return value * 0x010101 if value < 256 else WIDE + value


def colour_names(codes: Any) -> list[str]:
    return [f"#{int(code):06x}" if code < WIDE else f"grey {int(code) - WIDE}" for code in codes]


def whole_numbers(array: Array) -> Array:
    """An array of whole numbers (integers, floats or booleans) as integers. UserError for other values."""
    if array.dtype == np.bool_:
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and array.size and np.isfinite(array).all() and (array == np.rint(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.size == 0:
        raise UserError(
            f"the mask is {array.dtype} of shape {array.shape}, and not all of its values are whole numbers"
        )
    return array


def rgb_codes(mask: Any) -> Array:
    """0xRRGGBB per pixel (H, W) of a stored mask; grey values above 255 are added to `WIDE`.

    Raises:
        UserError: values that are not whole numbers, negative values, or colours of more than 8 bits.
    """
    if isinstance(mask, Image.Image) and not mask.mode.startswith(("I", "F")):
        mask = mask.convert("L" if mask.mode in ("1", "L") else "RGB")
    array = np.asarray(mask)
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    array = whole_numbers(array)
    if array.ndim not in (2, 3) or array.min() < 0 or array.max() > (255 if array.ndim == 3 else 2**32):
        raise UserError(f"the mask is {array.dtype} of shape {array.shape}: a palette needs colours or grey values")
    array = array.astype(np.int64)
    if array.ndim == 2:
        grey_HW: Array = np.where(array < 256, array * 0x010101, array + WIDE)
        return grey_HW
    codes: Array = array[..., 0] << 16 | array[..., 1] << 8 | array[..., 2]
    return codes


def index_mask(mask: Any) -> Array:
    """Class ids (H, W) as stored. UserError for a mask of colours or of values that are not integers."""
    array = np.asarray(mask)
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8:
        codes = np.unique(rgb_codes(array))
        raise UserError(
            f"the mask has {len(codes)} colours ({', '.join(colour_names(codes[:4]))} ...), not one class id a pixel; "
            "pass --palette FILE, which says what they mean (`hf-dbp inspect --masks` writes one), or `binary` for "
            "0/255"
        )
    if array.ndim != 2:
        raise UserError(
            f"the mask is {array.dtype} of shape {array.shape}, not one class id a pixel; "
            "save masks as grey or palette PNG with the ids as values"
        )
    return whole_numbers(array)


@dataclass(frozen=True)
class MaskKind:
    """What a mask reveals about its meaning.

    Attributes:
        bilevel: it has 1 bit per pixel.
        colours: (id, 0xRRGGBB) of each id in it, if it has its own palette.
        lossy: it is a JPEG or a lossy WebP, which changes values at edges.
        values: up to 8 of its values.
    """

    bilevel: bool
    colours: tuple[tuple[int, int], ...]
    lossy: bool
    values: frozenset[int]


def mask_kind(value: Any, mask: Any) -> MaskKind:
    """The kind of a mask, from its stored value and its pixels."""
    array = np.asarray(mask)
    bilevel = array.dtype == np.bool_
    colours: tuple[tuple[int, int], ...] = ()
    if isinstance(mask, Image.Image) and mask.mode == "P":
        rgb = np.asarray(mask.convert("RGB")).reshape(-1, 3)
        ids, first = np.unique(array, return_index=True)
        codes = (int(r) << 16 | int(g) << 8 | int(b) for r, g, b in rgb[first])
        colours = tuple(zip(ids.tolist(), codes, strict=True))
    values = np.unique(array)[:8].tolist() if array.ndim == 2 and array.dtype.kind in "biuf" else []
    return MaskKind(bilevel, colours, is_lossy(value), frozenset(map(int, values)) if np.isfinite(values).all() else
                    frozenset())  # fmt: skip


def is_lossy(value: Any) -> bool:
    """Whether a stored mask is a JPEG or a lossy WebP, judging by its first bytes."""
    if not isinstance(value, dict):
        return False
    if value["bytes"] is None and value["path"]:
        with Path(value["path"]).open("rb") as file:
            head = file.read(16)
    else:
        head = encoded_bytes(value)[:16]
    return head.startswith(b"\xff\xd8") or (head.startswith(b"RIFF") and head[8:16] == b"WEBPVP8 ")


def same_palettes(kinds: Mapping[str, MaskKind]) -> tuple[str, str] | None:
    """Two masks whose palettes give an id different colours; None if all agree."""
    known: dict[int, tuple[int, str]] = {}
    for name, kind in kinds.items():
        for number, code in kind.colours:
            other = known.setdefault(number, (code, name))
            if other[0] != code:
                return other[1], name
    return None


def check_kinds(kinds: Mapping[str, MaskKind], palette: str | None) -> list[str]:
    """Refuse masks that do not mean the same; return warnings.

    Args:
        kinds: kinds of all masks of a set, by name.
        palette: as in `Palette`; None for masks of ids.

    Raises:
        UserError: an id has different colours in the palettes of two masks, there are 1-bit masks beside masks of 0 and
            255, or binary masks have different values.
    """
    warnings = []
    lossy = [name for name, kind in kinds.items() if kind.lossy]
    if lossy:
        warnings.append(
            f"{len(lossy)} of {len(kinds)} masks are stored as JPEG or lossy WebP, which changes values at edges and "
            f"so adds classes that nobody drew; e.g. {lossy[0]}: save masks as PNG"
        )
    if palette is None:
        differing = same_palettes(kinds)
        if differing is not None:
            raise UserError(
                f"the masks have their own palettes, which give an id different colours, e.g. {differing[0]} and "
                f"{differing[1]}: pass --palette FILE, which says what colours mean (`hf-dbp inspect --masks` writes "
                "one); if the ids are right, save the masks as grey PNG"
            )
        bilevel = [name for name, kind in kinds.items() if kind.bilevel]
        full = [name for name, kind in kinds.items() if not kind.bilevel and kind.values & {255, 65535}]
        if bilevel and full:
            raise UserError(
                f"{len(bilevel)} masks have 1 bit per pixel, e.g. {bilevel[0]}, and others hold 255, e.g. {full[0]}: "
                "pass --palette binary if both mean background and foreground, else save all with 8 bits"
            )
    if palette == BINARY:
        seen = {value: name for name, kind in kinds.items() for value in kind.values - {0}}
        if len(seen) > 1 and not seen.keys() <= set(FULL):
            (value, name), (other, where), *_ = sorted(seen.items(), key=lambda entry: entry[0] in FULL)
            raise UserError(
                f"--palette binary: {name} holds {value} besides 0, {where} {other}: these are more than two values; "
                "pass --palette FILE that names them"
            )
    return warnings
