"""Folders of picture files, nested as they are, as tables for `hf_dbp.data.sources`.

A sample is one file or, with a name pattern per channel, several files that each hold one of its channels:

    --channel_files "*_bright.tif" "*_dark.tif"      lot1/a_bright.tif + lot1/a_dark.tif  ->  sample "lot1/a"
    --channel_files "bright/*.png" "dark/*.png"      bright/a.png + dark/a.png            ->  sample "a"

What ``*`` stands for names the sample. Without patterns a sample is named by its path below the folder without suffix.
Only names are read here, so memory grows by a path per image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from hf_dbp.errors import UserError

__all__ = ["IMAGE_FILES", "SPLITS", "file_stamp", "file_table", "folder_splits", "list_samples", "picture_files"]

IMAGE_FILES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".npy"}
SPLITS = ("train", "validation", "val", "test")  # folders of these names below the given one, if there is `train`

Samples = dict[str, tuple[str, ...]]  # name -> its files, in the order of the channels


def picture_files(folder: Path) -> list[str]:
    """Paths of the pictures below a folder, relative to it, in order; hidden files and folders are left out."""
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in IMAGE_FILES)
    return sorted(file.as_posix() for file in found if not any(part.startswith(".") for part in file.parts))


def list_samples(folder: str, channel_files: Sequence[str] | None = None) -> Samples:
    """The samples below a folder by name, in order.

    Raises:
        ValueError: no such folder, no picture in it, a pattern that is none or fits nothing, a sample without one of
            its channels, or two files of one name.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    files = picture_files(root)
    for file in files:
        if file.encode(errors="replace").decode() != file:  # Arrow keeps UTF-8 alone
            raise UserError(f"{folder} holds a picture whose name is not UTF-8, {file!a}; rename it")
    if not files:
        raise UserError(f"{folder} holds no pictures ({', '.join(sorted(IMAGE_FILES))})")
    if channel_files:
        return join_channels(folder, files, channel_files)
    samples: Samples = {}
    for file in files:
        name = file[: -len(Path(file).suffix)]
        if name in samples:
            raise UserError(f"{samples[name][0]} and {root / file} are of one name; leave one of them out")
        samples[name] = (str(root / file),)
    return samples


def join_channels(folder: str, files: Sequence[str], patterns: Sequence[str]) -> Samples:
    found: list[dict[str, str]] = []
    for pattern in patterns:
        if pattern.count("*") != 1:
            raise UserError(f"--channel_files {pattern!r}: write one * for what names the sample, e.g. '*_ch0.tif'")
        matches = [(re.fullmatch(re.escape(pattern).replace(r"\*", "(.+)"), file), file) for file in files]
        found.append({match[1]: str(Path(folder) / file) for match, file in matches if match})
        if not found[-1]:
            raise UserError(f"--channel_files {pattern!r} fits none of the {len(files)} files, e.g. {files[0]!r}")
    names = sorted(set().union(*found))
    for channel, pattern in zip(found, patterns, strict=True):
        missing = [name for name in names if name not in channel]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(names)} samples in {folder} have no file {pattern!r}, e.g. "
                f"{pattern.replace('*', missing[0])!r}; add it or move the rest of the sample away"
            )
    return {name: tuple(channel[name] for channel in found) for name in names}


def folder_splits(folder: str, channel_files: Sequence[str] | None = None) -> dict[str, Samples]:
    """The samples of a folder: those of its subfolders ``train``, ``validation`` ..., else all as ``train``."""
    root = Path(folder)
    if not (root / "train").is_dir():
        return {"train": list_samples(folder, channel_files)}
    return {split: list_samples(str(root / split), channel_files) for split in SPLITS if (root / split).is_dir()}


def file_table(columns: Mapping[str, Sequence[tuple[str, ...]]], cache_dir: str | None = None) -> datasets.Dataset:
    """The files of samples as a table on disk, a row per sample: {column: {"bytes": None, "path", "more"}}.

    ``more`` holds the files of the channels after the first.
    """
    files = {column: tuple(samples) for column, samples in columns.items()}  # `datasets` would take lists for shards
    stamps = tuple(file_stamp(file) for samples in files.values() for sample in samples for file in sample)
    one = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({column: one | {"more": datasets.List(datasets.Value("string"))} for column in files})
    options = {"files": files, "stamps": stamps}
    return datasets.Dataset.from_generator(_rows, features, cache_dir=cache_dir, gen_kwargs=options)


def file_stamp(file: str) -> str:
    """Size and time of a file; empty for one that cannot be reached, which is counted where it is decoded."""
    try:
        status = Path(file).stat()
    except OSError:  # a broken link, a circle of links, no permission
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _rows(files: Mapping[str, Sequence[tuple[str, ...]]], stamps: Any) -> Iterator[dict[str, Any]]:
    """A row per sample; the stamps, sizes and times of the files, only tell one table from another."""
    for row in zip(*files.values(), strict=True):
        samples = zip(files, row, strict=True)
        yield {column: {"bytes": None, "path": first, "more": more} for column, (first, *more) in samples}
