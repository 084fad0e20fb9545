"""Folders of images as classes: how many images each has, and what would harm a classifier."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping

from hf_dbp.inspection.choices import Findings
from hf_dbp.inspection.reading import Samples

__all__ = ["describe_class_folders"]

UNEVEN = 10  # above this ratio of the largest class to the smallest, the rare one is hardly learned


def describe_class_folders(images: Mapping[str, Samples], folder: str | None, found: Findings) -> str | None:
    """Describe folders of images as classes; return the command that learns them, or None if there are none.

    Args:
        images: ``train`` and maybe ``validation``, names as paths below the folder or its splits.
        folder: the folder as the user named it; None for a data set.
        found: collects a line and the problems.
    """
    train, validation = (
        Counter(name.partition("/")[0] for name in images.get(split, ())) for split in ("train", "validation")
    )
    every = [name for samples in images.values() for name in samples]
    if folder is None or len(train) < 2 or not all("/" in name for name in every):
        return None
    (most, largest), (fewest, smallest) = train.most_common(1)[0], train.most_common()[-1]
    found.lines.append(
        f"folders    {len(train)}, with {smallest} ({fewest}) to {largest} images ({most}): if each is a class, they "
        "are labels for hf-dbp classify"
    )
    flags = ""
    if largest >= UNEVEN * smallest:
        flags = " --balanced_sampling"
        found.problems.append(
            f"as classes the folders are uneven: {largest} images of {most}, {smallest} of {fewest}; "
            "--balanced_sampling shows each equally often"
        )
    if not validation and smallest == 1:
        alone = [name for name, count in train.items() if count == 1]
        found.problems.append(f"as classes {len(alone)} folders have one image, e.g. {alone[0]}, and cannot be tested")
    if unknown := sorted(validation.keys() - train.keys()):
        found.problems.append(f"as classes {len(unknown)} folders of validation are not in train, e.g. {unknown[0]}")
    return (
        f"hf-dbp classify {shlex.quote(folder)} --model_name_or_path outputs/industrial-fused --do_train "
        f"--eval_strategy epoch{flags}"
    )
