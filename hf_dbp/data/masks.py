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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageColor

from hf_dbp.data.folders import MASKS, Samples, file_table, is_mask, open_pictures
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.sources import pick_splits
from hf_dbp.errors import UserError
from hf_dbp.recipes import safe_yaml

__all__ = [
    "BINARY",
    "IGNORE",
    "Pairing",
    "Pairs",
    "Palette",
    "UnpairedError",
    "colour_names",
    "index_mask",
    "pair_folders",
    "pair_tables",
    "rgb_codes",
]

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


class UnpairedError(UserError):
    """Images and masks that do not fit by name."""


@dataclass
class Pairing:
    """Images and their masks.

    Attributes:
        images: ``train`` and maybe ``validation``: all images, those without a mask too.
        pairs: the same splits, the images that have a mask.
        left_out: what else lies in both folders, and the images without a mask.
    """

    images: dict[str, Samples]
    pairs: dict[str, Pairs]
    left_out: LeftOut


def pair_folders(
    image_dir: str, mask_dir: str, mask_suffix: str = "", channel_files: Sequence[str] | None = None
) -> Pairing:
    """The images and their masks, paired by path without suffix.

    Args:
        image_dir, mask_dir: folders, or one folder for both; images without a mask are unlabelled.
        mask_suffix: what the names of masks end in beyond those of their images, e.g. ``_mask``.
        channel_files: as in `Folder.pictures`.

    Raises:
        UserError: a mask without an image, masks of a split that the images do not have, or one folder for both and
            no ``mask_suffix``.
    """
    together = Path(image_dir).is_dir() and Path(mask_dir).is_dir() and Path(image_dir).samefile(mask_dir)
    if together and not mask_suffix:
        raise UserError(
            f"images and masks lie in one folder, {image_dir}: say by --mask_suffix what the names of masks end in "
            "beyond those of their images, e.g. --mask_suffix _mask"
        )
    folder, mask_folder = open_pictures(image_dir), open_pictures(mask_dir)
    left_out = folder.left_out
    images, masks = folder.pictures(channel_files, mask_suffix), mask_folder.pictures()
    if together:
        masks = {
            split: {name: files for name, files in named.items() if is_mask(name, mask_suffix, images[split])}
            for split, named in masks.items()
        }
    else:
        left_out.merge(mask_folder.left_out, "masks: ")
        separate(image_dir, images, mask_dir, masks)
    left_out.forget(MASKS)
    pairs = pair_splits(image_dir, images, mask_dir, masks, mask_suffix, left_out)
    images, pairs = pick_splits(images, image_dir, left_out), pick_splits(pairs, image_dir, LeftOut())
    for split, found in pairs.items():
        unlabelled = [files[0] for name, files in images[split].items() if name not in found]
        left_out.add(f"images without a mask, of the {len(images[split])} in {image_dir} ({split})", unlabelled)
    return Pairing(images, pairs, left_out)


def separate(image_dir: str, images: dict[str, Samples], mask_dir: str, masks: dict[str, Samples]) -> None:
    """Where one of two folders lies in the other, take the files of the inner one out of the outer one's."""
    inner, outer = Path(image_dir).resolve(), Path(mask_dir).resolve()
    for inside, around, theirs in ((outer, inner, images), (inner, outer, masks)):
        if around in inside.parents:
            for samples in theirs.values():
                for name, files in [*samples.items()]:
                    if inside in Path(files[0]).resolve().parents:
                        del samples[name]


def pair_tables(pairing: Pairing, cache_dir: str | None = None) -> dict[str, datasets.Dataset]:
    """The pairs of each split that has any, as tables of `image` and `annotation`."""
    return {
        split: file_table(dict(zip(("image", "annotation"), zip(*pairs.values(), strict=True), strict=True)), cache_dir)
        for split, pairs in pairing.pairs.items()
        if pairs
    }


def pair_splits(
    image_dir: str,
    images: Mapping[str, Samples],
    mask_dir: str,
    masks: Mapping[str, Samples],
    mask_suffix: str,
    left_out: LeftOut,
) -> dict[str, Pairs]:
    """`pair_names` in each split. UserError also for masks of a split that the images do not have."""
    if masks.keys() - images.keys():
        there = f"has {', '.join(images)}" if len(images) > 1 else "has none of them"
        raise UnpairedError(f"{mask_dir} has the folders {', '.join(masks)}, {image_dir} {there}: give both the same")
    found = {}
    for split, samples in images.items():
        image_name = f"{image_dir}/{split}" if len(images) > 1 else image_dir
        mask_name = f"{mask_dir}/{split}" if len(masks) > 1 else mask_dir
        found[split] = pair_names(image_name, samples, mask_name, masks.get(split, {}), mask_suffix, left_out)
    return found


def pair_names(
    image_dir: str, images: Samples, mask_dir: str, masks: Samples, mask_suffix: str, left_out: LeftOut
) -> Pairs:
    """The files of image and mask by name, in order; arguments and errors as of `pair_folders`."""
    named = {name: files for name, files in masks.items() if not name.endswith(mask_suffix)} if mask_suffix else {}
    suffixed = {name.removesuffix(mask_suffix): files for name, files in masks.items() if name not in named}
    twice = named.keys() & suffixed.keys()
    left_out.add(
        "masks: pictures without the --mask_suffix, beside one that has it", [named[name][0] for name in twice]
    )
    masks = named | suffixed
    lost = sorted(masks.keys() - images.keys())
    if lost:
        raise UnpairedError(
            f"{len(lost)} of the {len(masks)} masks in {mask_dir} have no image of that name among the {len(images)} "
            f"in {image_dir}, e.g. {lost[0]!r} (images are called {next(iter(images), 'nothing')!r} ...); "
            + "; ".join([_remedy(images, masks), *left_out.notes])
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
