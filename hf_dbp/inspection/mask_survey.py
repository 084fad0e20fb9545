"""Survey a folder of masks: the values in each mask, and the kind of masks they imply.

Every file is read once, in threads. All masks of a set mean the same: if palettes differ, colours are read, and 1-bit
masks beside masks of 0 and 255 count as such masks.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hf_dbp.data.decoding import DECODING_ERRORS, stored
from hf_dbp.data.images import value_name
from hf_dbp.data.masks import (
    FULL,
    MaskKind,
    grey_code,
    mask_kind,
    read_palette,
    rgb_codes,
    same_palettes,
    whole_numbers,
)
from hf_dbp.data.threads import in_threads
from hf_dbp.errors import UserError
from hf_dbp.inspection.reading import Samples, value_of

__all__ = ["MaskSurvey", "crop_chances", "survey_masks", "thickness", "write_palette", "written_here"]

THREADS = 4
COLOURS = 64  # more values than this are not a palette
OBJECTS = 1000  # maximum number of objects to examine per class and mask


@dataclass
class MaskSurvey:
    """The values in masks.

    Attributes:
        sizes: height and width of each mask that can be read, by name.
        values: for each mask, value -> pixels; a value is an id or, if ``coloured``, the code of a colour.
        kinds: for each mask, what it reveals about its meaning.
        coloured: whether the values are colours.
        objects: for each mask, the thickness of its objects in pixels, see `thickness`.
        chances: for each mask, value -> share of the crops at native resolution that hold it, see `crop_chances`.
        names: how messages refer to each mask.
        errors: masks that cannot be read, and why.
        refused: masks that can be read but not understood, which ends training, and why.
    """

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    values: dict[str, Counter[int]] = field(default_factory=dict)
    kinds: dict[str, MaskKind] = field(default_factory=dict)
    coloured: bool = False
    objects: dict[str, list[float]] = field(default_factory=dict)
    chances: dict[str, dict[int, float]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def smallest(self, long_edge: int | None = None) -> float | None:
        """Thickness of the smallest objects, the tenth percentile over all masks; None if there are no objects.

        Args:
            long_edge: pixels to which the long side of larger masks is scaled down; None for no scaling.
        """
        sizes = [
            size * (1.0 if long_edge is None else min(1.0, long_edge / max(self.sizes[name])))
            for name, found in self.objects.items()
            for size in found
        ]
        return float(np.percentile(sizes, 10)) if sizes else None

    @property
    def pixels(self) -> Counter[int]:
        """Pixels of each value over all masks."""
        return sum(self.values.values(), Counter())

    @property
    def kind(self) -> str:
        """``binary``, ``index``, ``palette`` (colours, or grey values far apart) or ``smeared`` (too many values for
        either)."""
        values = set(self.pixels)
        full = {grey_code(value) for value in FULL[1:]} if self.coloured else set(FULL[1:])
        if values - {0} and (values <= {0} | full or all(kind.bilevel for kind in self.kinds.values())):
            return "binary"
        if self.coloured:
            return "palette" if len(values) <= COLOURS else "smeared"
        if max(values - {255}, default=0) >= 4 * len(values):
            alike = len(values - {0}) == 1
            return "binary" if alike else "palette" if len(values) <= COLOURS else "smeared"
        return "smeared" if len(values) > 200 else "index"


def thickness(values_HW: NDArray[Any]) -> list[float]:
    """For each connected object in a mask, its area divided by the longer side of its box: the width of a scratch or
    spot. The most common value counts as background; single pixels and masks with many values are left out.
    """
    values, counts = np.unique(values_HW, return_counts=True)
    sizes: list[float] = []
    for value in values[counts < counts.max()] if len(values) <= COLOURS else ():
        _, _, stats, _ = cv2.connectedComponentsWithStats((values_HW == value).astype(np.uint8))
        width, height, area = stats[1:, 2], stats[1:, 3], stats[1:, 4]
        sizes += (area / np.maximum(width, height))[area > 1][:OBJECTS].tolist()
    return sizes


def crop_chances(values_HW: NDArray[Any], crop: int) -> dict[int, float]:
    """For each value in a mask, the share of the crops of ``crop`` x ``crop`` pixels on a grid that hold it.

    If the mask is smaller than a crop, so is the crop. Masks with more than `COLOURS` values are skipped.
    """
    values, counts = np.unique(values_HW, return_counts=True)
    height, width = (min(side, crop) for side in values_HW.shape)
    step, found = max(1, crop // 8), {}
    for value, count in zip(values.tolist(), counts.tolist(), strict=True) if len(values) <= COLOURS else ():
        if 2 * count > values_HW.size:  # in nearly every crop
            found[value] = 1.0
            continue
        sums = cv2.integral((values_HW == value).astype(np.uint8))
        corners = sums[height:, width:], sums[:-height, width:], sums[height:, :-width], sums[:-height, :-width]
        end, above, before, both = (corner[::step, ::step] for corner in corners)
        found[value] = float((end - above - before + both > 0).mean())
    return found


def survey_masks(masks: Samples, coloured: bool = False, crop: int = 512) -> MaskSurvey:
    """Read all masks.

    Args:
        masks: masks by the names of their images.
        coloured: whether a palette file gives the meaning of their colours.
        crop: side of a training crop in pixels.
    """
    found = MaskSurvey(coloured=coloured)
    colours: set[str] = set()

    def look(name: str) -> tuple[str, Any, str, str]:
        """What messages call the mask, what is in it, or else why it cannot be read or is refused."""
        where = name
        try:
            value = value_of(masks[name])
            where = value_name(value, name)
            mask = stored(value)
        except DECODING_ERRORS as error:
            return where, None, f"{where}: the mask cannot be read: {error}", ""
        try:
            array = np.asarray(mask)
            rgb = array.ndim == 3 and array.shape[2] > 1
            values = rgb_codes(mask) if rgb else whole_numbers(array.reshape(array.shape[:2]))
            counts, kind = np.unique(values, return_counts=True), mask_kind(value, mask)
            return where, (rgb, kind, values.shape, counts, thickness(values), crop_chances(values, crop)), "", ""
        except DECODING_ERRORS as error:
            return where, None, "", f"{where}: {error}"

    progress = tqdm(in_threads(look, list(masks), THREADS), "Masks", len(masks), leave=False)
    for name, (where, seen, error, refusal) in zip(masks, progress, strict=True):
        found.names[name] = where
        if seen is None:
            (found.errors if error else found.refused)[name] = error or refusal
            continue
        rgb, found.kinds[name], found.sizes[name], (values, counts), found.objects[name], found.chances[name] = seen
        colours |= {name} if rgb else set()
        found.values[name] = Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    unify(found, colours)
    return found


def unify(found: MaskSurvey, colours: set[str]) -> None:
    """Give the values of all masks one meaning.

    Args:
        found: what was read.
        colours: masks whose values are already colours.
    """
    found.coloured |= bool(colours) or same_palettes(found.kinds) is not None
    bilevel = {name for name, kind in found.kinds.items() if kind.bilevel}
    others = set().union(*(found.values[name] for name in found.kinds if name not in bilevel))
    full = found.coloured or (bool(others) and others <= {0, *FULL[1:]})
    for name, counts in found.values.items():
        factor = 255 if name in bilevel and full else 1
        own = dict(found.kinds[name].colours)
        unified: Counter[int] = Counter()
        chances: dict[int, float] = {}
        for value, count in counts.items():
            recoded = found.coloured and name not in colours
            new = own.get(value, grey_code(factor * value)) if recoded else factor * value
            unified[new] += count
            chances[new] = max(chances.get(new, 0.0), found.chances[name].get(value, 1.0))
        found.values[name], found.chances[name] = unified, chances


def written_here(path: Path) -> bool:
    """Whether a palette file may be written: there is none, or one from an earlier inspection that nobody edited."""
    try:
        content = read_palette(str(path))
    except UserError:
        return True
    return all(re.fullmatch(r"class \d+", name) and len(colours) == 1 for name, colours in content.items())


def write_palette(path: Path, survey: MaskSurvey) -> None:
    """Write a palette file with the colours found, most common first, for editing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["# Name the classes; you can join lines of one class: name: [colour, colour]. `ignore` is not learned."]
    for number, (value, count) in enumerate(survey.pixels.most_common()):
        colour = f'"#{value:06x}"' if survey.coloured else str(value)
        lines.append(f"class {number}: {colour}  # {count / survey.pixels.total():.3%} of the pixels")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
