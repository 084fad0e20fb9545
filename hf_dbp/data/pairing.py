"""Pair masks with images: two folders, matched by the path below them without suffix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from hf_dbp.data.folders import MASKS, Samples, file_table, is_mask, open_pictures
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.sources import pick_splits
from hf_dbp.errors import UserError

__all__ = ["Pairing", "Pairs", "UnpairedError", "pair_folders", "pair_tables"]

Pairs = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]  # name -> files of the image, files of the mask


class UnpairedError(UserError):
    """Images and masks whose names do not match."""


@dataclass
class Pairing:
    """Images and their masks.

    Attributes:
        images: ``train`` and maybe ``validation``: all images, including those without a mask.
        pairs: the same splits, only the images that have a mask.
        left_out: what else is in both folders, and the images without a mask.
    """

    images: dict[str, Samples]
    pairs: dict[str, Pairs]
    left_out: LeftOut


def pair_folders(
    image_dir: str, mask_dir: str, mask_suffix: str = "", channel_files: Sequence[str] | None = None
) -> Pairing:
    """The images and their masks, paired by path without suffix.

    Args:
        image_dir, mask_dir: two folders, or one for both; images without a mask are unlabelled.
        mask_suffix: what the names of masks add to those of their images, e.g. ``_mask``.
        channel_files: as in `Folder.pictures`.

    Raises:
        UserError: a mask has no image, the images lack a split that the masks have, or there is one folder for both and
            no ``mask_suffix``.
    """
    together = Path(image_dir).is_dir() and Path(mask_dir).is_dir() and Path(image_dir).samefile(mask_dir)
    if together and not mask_suffix:
        raise UserError(
            f"images and masks lie in one folder, {image_dir}: give the suffix that the names of masks add to those "
            f"of their images, e.g. --mask_suffix _mask"
        )
    folder, mask_folder = open_pictures(image_dir), open_pictures(mask_dir)
    left_out = folder.left_out
    images, masks = folder.pictures(channel_files, mask_suffix), mask_folder.pictures()
    if together:
        left_out.forget(MASKS)
        masks = {
            split: {name: files for name, files in named.items() if is_mask(name, mask_suffix, images[split])}
            for split, named in masks.items()
        }
    else:
        left_out.merge(mask_folder.left_out, "masks: ")
        separate(image_dir, images, mask_dir, masks)
    pairs = pair_splits(image_dir, images, mask_dir, masks, mask_suffix, left_out)
    images, pairs = pick_splits(images, image_dir, left_out), pick_splits(pairs, image_dir, LeftOut())
    for split, found in pairs.items():
        unlabelled = [files[0] for name, files in images[split].items() if name not in found]
        left_out.add(f"images without a mask, of the {len(images[split])} in {image_dir} ({split})", unlabelled)
    return Pairing(images, pairs, left_out)


def separate(image_dir: str, images: dict[str, Samples], mask_dir: str, masks: dict[str, Samples]) -> None:
    """If one folder lies in the other, remove the inner folder's files from the outer one's."""
    inner, outer = Path(image_dir).resolve(), Path(mask_dir).resolve()
    for inside, around, theirs in ((outer, inner, images), (inner, outer, masks)):
        if around in inside.parents:
            for samples in theirs.values():
                for name, files in [*samples.items()]:
                    if inside in Path(files[0]).resolve().parents:
                        del samples[name]


def pair_tables(pairing: Pairing, cache_dir: str | None = None) -> dict[str, datasets.Dataset]:
    """The pairs of each non-empty split, as tables of `image` and `annotation`."""
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
    """`pair_names` for each split. UserError also if the images lack a split that the masks have."""
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
    """The files of image and mask by name, in order; arguments and errors as for `pair_folders`."""
    named = {name: files for name, files in masks.items() if not name.endswith(mask_suffix)} if mask_suffix else {}
    suffixed = {name.removesuffix(mask_suffix): files for name, files in masks.items() if name not in named}
    twice = named.keys() & suffixed.keys()
    left_out.add(
        "masks: pictures without the --mask_suffix, beside ones that have it", [named[name][0] for name in twice]
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
    """What would make the names match: a common suffix of the masks if there is one."""
    first = next(iter(masks))
    for name in sorted((name for name in images if first.startswith(name)), key=len, reverse=True):
        ending = first[len(name) :]
        if all(mask.endswith(ending) and mask.removesuffix(ending) in images for mask in masks):
            return f"pass --mask_suffix {ending}"
    return "name each mask like its image"
