"""What inspect says of the images: counts, sizes, channels, values, unreadable files, copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hf_dbp.errors import UserError
from hf_dbp.inspection.choices import (
    VALIDATION,
    Findings,
    common,
)
from hf_dbp.inspection.reading import Samples
from hf_dbp.inspection.survey import ImageKind, copies

__all__ = ["describe_images", "pooled", "training_share"]

T = TypeVar("T")
OUTLYING = 0.01  # if 99.8 % of the values span less of the range, there are outliers


def pooled(splits: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """What inspect found in all splits, as one; names outside ``train`` begin with the name of their split."""
    return {
        name if split == "train" else f"{split}/{name}": value
        for split, content in splits.items()
        for name, value in content.items()
    }


def training_share(splits: Mapping[str, Collection[Any]]) -> int:
    """The number that training will see: ``train`` minus the held-out share if there is no ``validation``."""
    count = len(splits["train"])
    return count if splits.get("validation") else count - max(1, round(count * VALIDATION))


def describe_images(
    samples: Samples, files: Sequence[str], kinds: Mapping[str, ImageKind], found: Findings
) -> list[ImageKind]:
    """Report counts, sizes, channels, depth, unreadable files and duplicates; return the kinds of the readable
    images."""
    readable = [kind for kind in kinds.values() if not kind.error]
    if not readable:
        raise UserError(f"none of the {len(samples)} images can be read, e.g. {next(iter(kinds.values())).error}")
    suffixes = Counter(Path(file).suffix.lower() for file in files)
    gigabytes = sum(Path(file).stat().st_size for file in files) / 1e9
    sides = np.array([sorted(kind.size) for kind in readable])
    ratios = sides[:, 1] / sides[:, 0]
    found.lines += [
        f"images     {len(samples)}"
        + (f" in {len(files)} files: {common(suffixes)}; {gigabytes:.2f} GB" * bool(files)),
        f"sizes      {common(Counter(f'{k.size[0]} x {k.size[1]}' for k in readable))} (height x width)",
        f"aspect     the long side is {np.median(ratios):.3g} times the short one ({ratios.min():.3g} to "
        f"{ratios.max():.3g}); sides of {np.median(sides[:, 0]):.0f} and {np.median(sides[:, 1]):.0f} pixels (medians)",
        f"channels   {common(Counter(f'{k.channels} of {k.dtype}' for k in readable))}",
    ]
    describe_values(readable, found)
    infinite = [kind.error for kind in kinds.values() if not kind.finite]
    if infinite:
        found.problems.append(
            f"{len(infinite)} of {len(samples)} images will be left out of training, e.g. {infinite[0]}"
        )
    errors = [kind.error for kind in kinds.values() if kind.error and kind.finite]
    if errors:
        found.problems.append(
            f"{len(errors)} of {len(samples)} images cannot be read and will be left out of training, e.g. "
            f"{errors[0]}; repair them or move them away"
        )
    groups = copies(samples, kinds)
    if groups:
        what = "images" if any(kind.digest for kind in readable) else "files"
        found.problems.append(
            f"{sum(len(group) - 1 for group in groups)} {what} are copies of others, e.g. {' = '.join(groups[0][:2])}; "
            "a copy in training and validation makes validation look better than it is: leave one of each"
        )
    return readable


def describe_values(readable: Sequence[ImageKind], found: Findings) -> None:
    """Report the range of each type of values, and how it is used; see `hf_dbp.data.values`."""
    floats = [kind for kind in readable if kind.dtype.startswith("float")]
    unit = bool(floats) and min(kind.low for kind in floats) >= 0 and max(kind.high for kind in floats) <= 1
    for stored, count in Counter(kind.stored for kind in readable).most_common(3):
        kinds = [kind for kind in readable if kind.stored == stored]
        low, high = min(kind.low for kind in kinds), max(kind.high for kind in kinds)
        if kinds[0].dtype.startswith("uint"):
            done = f"divided by {np.iinfo(kinds[0].dtype).max}"
        elif unit:
            done = "used unchanged"
        else:
            done = "this range, measured on the training images, becomes 0 to 1"
        found.lines.append(f"values     {low:g} to {high:g} of {stored} ({count} images): {done}")
        bulk = min(kind.bulk[0] for kind in kinds), max(kind.bulk[1] for kind in kinds)
        if kinds[0].dtype.startswith("float") and bulk[1] - bulk[0] < OUTLYING * (high - low):
            found.problems.append(
                f"values of {stored} reach from {low:g} to {high:g}, but 99.8 % of them lie between {bulk[0]:g} and "
                f"{bulk[1]:g}: outliers, or markers of missing data, compress everything else; replace them"
            )
