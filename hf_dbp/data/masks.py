"""Masks of class ids from files: index images, colours or grey values by a palette, or 0 and 255; and their folders.

A palette file is YAML or JSON, a class name to its colour or grey value, in the order of the class ids:

    background: "#000000"            # or [0, 0, 0]; or a grey value such as 0
    wire: "#ffa500"
    pad: ["#00ff00", "#00ffff"]      # several colours for one class
    ignore: "#ffffff"                # this name: neither learned nor scored

``binary`` in place of a file means 0 is ``background`` and 255 (or 1) ``foreground``.

Shapes: H, W height and width; K classes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageColor

from hf_dbp.data.folders import Samples, file_table, folder_splits
from hf_dbp.data.sources import pick_splits
from hf_dbp.errors import UserError
from hf_dbp.recipes import safe_yaml

__all__ = [
    "BINARY",
    "IGNORE",
    "Pairs",
    "Palette",
    "colour_names",
    "index_mask",
    "pair_folders",
    "pair_names",
    "pair_splits",
    "rgb_codes",
]

logger = logging.getLogger(__name__)

Array = NDArray[Any]
Pairs = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]  # name -> the files of the image and of the mask
BINARY = "binary"
IGNORE = "ignore"


class Palette:
    """What colours or grey values mean.

    Args:
        source: palette file, or ``binary``.
        ignore_index: the id that ``ignore`` gets.

    Attributes:
        names: class names by id 0..K-1.

    Raises:
        ValueError: no such file, not such a mapping, or a colour of two classes.
    """

    def __init__(self, source: str, ignore_index: int) -> None:
        self.source = source
        if source == BINARY:
            self.names = {0: "background", 1: "foreground"}
            entries = {0x000000: 0, 0xFFFFFF: 1, 0x010101: 1}
        else:
            content = read_palette(source)
            names = [name for name in content if name != IGNORE]
            self.names = dict(enumerate(names))
            entries = {}
            for name, colours in content.items():
                for code in (colour_code(colour, source) for colour in colours):
                    if code in entries:
                        raise UserError(f"--palette {source}: {colour_names([code])[0]} has two names; give it one")
                    entries[code] = ignore_index if name == IGNORE else names.index(name)
        self.codes = np.array(sorted(entries), np.int32)
        self.ids = np.array([entries[int(code)] for code in self.codes], np.int32)

    def __call__(self, mask: Any) -> Array:
        """Class ids (H, W) of a stored mask. ValueError that names colours without a class."""
        codes_HW = rgb_codes(mask)
        position_HW = np.searchsorted(self.codes, codes_HW).clip(max=len(self.codes) - 1)
        unknown_HW = self.codes[position_HW] != codes_HW
        if unknown_HW.any():
            codes, counts = np.unique(codes_HW[unknown_HW], return_counts=True)
            found = ", ".join(colour_names(codes[np.argsort(-counts)][:5]))
            hint = "; JPEG smears colours, so save masks as PNG" if len(codes) > 64 else ""
            remedy = "this is no 0/255 mask" if self.source == BINARY else f"add them to {self.source}"
            raise UserError(f"the mask has {len(codes)} colours without a class, above all {found}: {remedy}{hint}")
        ids_HW: Array = self.ids[position_HW]
        return ids_HW


def read_palette(source: str) -> dict[str, list[Any]]:
    """Class names and their colours, always as a list."""
    try:
        content = safe_yaml(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--palette {source} cannot be read ({error}); give a YAML file or `{BINARY}`") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f'--palette {source} is no mapping of class names to colours, such as wire: "#ffa500"')
    return {str(name): value if is_list_of_colours(value) else [value] for name, value in content.items()}


def is_list_of_colours(value: Any) -> bool:
    return isinstance(value, list) and not (len(value) == 3 and all(isinstance(part, int) for part in value))


def colour_code(colour: Any, source: str) -> int:
    """0xRRGGBB of "#rrggbb" or a colour name, [r, g, b] or a grey value."""
    values = [colour] * 3 if isinstance(colour, int) else colour
    if isinstance(colour, str):
        with contextlib.suppress(ValueError):
            values = ImageColor.getcolor(colour, "RGB")
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(v in range(256) for v in values):
        raise UserError(f'--palette {source}: {colour!r} is no colour; write "#rrggbb", [r, g, b] or a grey value')
    red, green, blue = values
    return int(red) << 16 | int(green) << 8 | int(blue)


def colour_names(codes: Any) -> list[str]:
    return [f"#{int(code):06x}" for code in codes]


def rgb_codes(mask: Any) -> Array:
    """0xRRGGBB per pixel (H, W) of a stored mask. ValueError for values that are no bytes."""
    if isinstance(mask, Image.Image):
        mask = mask.convert("L" if mask.mode in ("1", "L") else "RGB") if not mask.mode.startswith(("I", "F")) else mask
    array = np.asarray(mask)
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype.kind not in "biu" or array.size == 0 or array.min() < 0 or array.max() > 255:
        raise UserError(f"the mask is {array.dtype} of shape {array.shape}: a palette is of values 0 to 255")
    array = array.astype(np.int32)
    if array.ndim == 2:
        array = np.stack([array] * 3, axis=-1)
    codes: Array = array[..., 0] << 16 | array[..., 1] << 8 | array[..., 2]
    return codes


def index_mask(mask: Any) -> Array:
    """Class ids (H, W) as stored. ValueError for a mask of colours or other than integers."""
    array = np.asarray(mask)
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8:
        codes = np.unique(rgb_codes(array))
        raise UserError(
            f"the mask has {len(codes)} colours ({', '.join(colour_names(codes[:4]))} ...), not one class id a pixel; "
            "pass --palette FILE that says what they mean (`hf-dbp inspect --masks` writes one), or `binary` for 0/255"
        )
    if array.ndim != 2 or array.dtype.kind not in "biu":
        raise UserError(
            f"the mask is {array.dtype} of shape {array.shape}, not one class id a pixel; "
            "write masks as grey or palette PNG that hold the ids"
        )
    return array


def pair_folders(
    image_dir: str, mask_dir: str, mask_suffix: str = "", channel_files: list[str] | None = None
) -> dict[str, datasets.Dataset]:
    """The images that have a mask, paired by path without suffix, as tables of `image` and `annotation`.

    Args:
        image_dir, mask_dir: folders; images without a mask are unlabelled and left out.
        mask_suffix: what the names of masks end in beyond those of their images, e.g. ``_mask``.
        channel_files: as in `list_samples`.

    Returns:
        ``train`` and, where both folders hold such subfolders, ``validation``.

    Raises:
        ValueError: a mask without an image.
    """
    images, tables = folder_splits(image_dir, channel_files), {}
    for split, pairs in pair_splits(image_dir, images, mask_dir, folder_splits(mask_dir), mask_suffix).items():
        count, name = len(pick_splits(images, image_dir)[split]), f"{image_dir} ({split})"
        if len(pairs) < count:
            logger.warning("%d of %d images in %s have a mask; the others are left out", len(pairs), count, name)
        if pairs:
            columns = dict(zip(("image", "annotation"), zip(*pairs.values(), strict=True), strict=True))
            tables[split] = file_table(columns)
    return tables


def pair_splits(
    image_dir: str, images: Mapping[str, Samples], mask_dir: str, masks: Mapping[str, Samples], mask_suffix: str
) -> dict[str, Pairs]:
    """`pair_names` in each split that training takes, ``train`` and maybe ``validation``; `folder_splits` found them.

    ValueError also for masks of a split that the images do not have.
    """
    if masks.keys() - images.keys():
        there = f"has {', '.join(images)}" if len(images) > 1 else "has none of them"
        raise UserError(f"{mask_dir} has the folders {', '.join(masks)}, {image_dir} {there}: give both the same")
    found = {}
    for split, samples in images.items():
        image_name = f"{image_dir}/{split}" if len(images) > 1 else image_dir
        mask_name = f"{mask_dir}/{split}" if len(masks) > 1 else mask_dir
        found[split] = pair_names(image_name, samples, mask_name, masks.get(split, {}), mask_suffix)
    return pick_splits(found, image_dir)


def pair_names(image_dir: str, images: Samples, mask_dir: str, masks: Samples, mask_suffix: str) -> Pairs:
    """The files of image and mask by name, in order; arguments and errors as of `pair_folders`."""
    masks = {name.removesuffix(mask_suffix): files for name, files in masks.items()}
    lost = sorted(masks.keys() - images.keys())
    if lost:
        raise UserError(
            f"{len(lost)} of the {len(masks)} masks in {mask_dir} have no image of that name among the {len(images)} "
            f"in {image_dir}, e.g. {lost[0]!r} (images are called {next(iter(images))!r} ...); {_remedy(images, masks)}"
        )
    return {name: (images[name], masks[name]) for name in sorted(masks)}


def _remedy(images: Samples, masks: Samples) -> str:
    """What would make names fit: a common ending of the masks, if that is it."""
    first = next(iter(masks))
    for name in sorted((name for name in images if first.startswith(name)), key=len, reverse=True):
        ending = first[len(name) :]
        if all(mask.endswith(ending) and mask.removesuffix(ending) in images for mask in masks):
            return f"pass --mask_suffix {ending}"
    return "name each mask as its image"
