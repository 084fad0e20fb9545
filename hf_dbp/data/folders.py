"""Local folders of images, read in one walk: pictures, parquet files or tars, their splits, and what is left out.

A sample is one picture or, with a name pattern per channel, several pictures that hold one channel each:

    --channel_files "*_bright.tif" "*_dark.tif"      lot1/a_bright.tif + lot1/a_dark.tif  ->  sample "lot1/a"
    --channel_files "bright/*.png" "dark/*.png"      bright/a.png + dark/a.png            ->  sample "a"

The part that matches ``*`` names the sample; the rest of a pattern is literal. Without patterns, a sample's name is its
path below the folder without suffix. Only names are read here, so memory grows by one path per image.

Splits are used only if the layout allows no other reading; otherwise all images are used:

    pictures          all lie in folders called train, validation, val, valid, dev or test, and some in train
    parquet, tars     all paths differ only in one word such as train or test, and some have train

Linked folders are followed, unless they lead to a folder that is read anyway. These, hidden files and files of
unsupported kinds are left out; `LeftOut` counts and names them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import datasets

from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.sound import SOUND_FILES
from hf_dbp.errors import UserError

__all__ = [
    "HIDDEN",
    "IMAGE_FILES",
    "MASKS",
    "Folder",
    "Samples",
    "class_folders",
    "classify",
    "file_stamp",
    "file_table",
    "is_mask",
    "open_folder",
    "open_pictures",
    "shard_splits",
]

IMAGE_FILES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".npy", *SOUND_FILES}
SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
#: files that hold no images and that nobody expects to be read
PLAIN_FILES = {
    *(".txt", ".text", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".rst", ".yaml", ".yml", ".toml", ".html"),
    *(".htm", ".pdf", ".doc", ".docx", ".xlsx", ".py", ".ipynb", ".sh", ".bat", ".db", ".ini", ".cfg", ".log", ".lock"),
    *(".cls", ".cls2", ".class", ".id", ".idx", ".index", ".md5", ".sha1", ".sha256", ".bib", ".tex", ".safetensors"),
}
SPLITS = ("train", "validation", "val", "valid", "dev", "test")  # names of folders that can be splits of pictures
WORDS = {  # words that tell the split of a parquet file or a tar
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
HIDDEN = "hidden files (a name in their path begins with a dot)"
TWICE = "linked folders that lead to a folder which is read anyway, or to one above them"
CLOSED = "folders that cannot be opened"
BESIDE = "pictures beside parquet or tar files; move them to a separate folder"
NO_PATTERN = "pictures that fit no pattern of --channel_files"
MASKS = "masks, recognised by their --mask_suffix"

Samples = dict[str, tuple[str, ...]]  # name -> files, in the order of the channels


def classify(name: str, left_out: LeftOut) -> str:
    """``picture``, ``parquet`` or ``webdataset``; empty for a file of another kind, which is noted as left out."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in IMAGE_FILES:
        return "picture"
    if suffix in SHARDS:
        return SHARDS[suffix]
    if suffix in PLAIN_FILES:
        left_out.other_files[suffix] += 1
    else:
        kind = f"{suffix} files" if suffix else "files without a suffix"
        left_out.add(f"{kind}, which are not supported; convert images to PNG or TIFF", [name])
    return ""


def walk(root: Path, left_out: LeftOut) -> list[str]:
    """Paths of the files below a folder, relative to it; each folder once, linked ones after all others."""
    above = {identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
    seen, pending = set(above), [""]
    links: list[str] = []
    files: list[str] = []
    while pending or links:
        if not pending:
            link = links.pop(0)
            target = identity(root / link)
            if target in seen:
                left_out.add(TWICE, [link])
                continue
            seen.add(target)
            pending = [link]
        folder = pending.pop()
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError:
            if not folder:
                raise
            left_out.add(CLOSED, [folder])
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if not is_folder(entry):
                files.append(name)
            elif entry.is_symlink():
                links.append(name)
            elif (number := identity(root / name)) not in seen:
                seen.add(number)
                pending.append(name)
            else:
                left_out.add(TWICE, [name])
    return files


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether ``entry`` is a folder or a link to one; a circular link counts as an unreadable file."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def identity(folder: Path) -> tuple[int, int]:
    """What identifies a folder in the walk, whatever path leads to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


@dataclass
class Folder:
    """The content of a folder.

    Attributes:
        path: the folder.
        kind: ``imagefolder``, ``parquet`` or ``webdataset``.
        files: the pictures, parquet files or tars, relative to it, in order.
        left_out: everything else in it.
    """

    path: str
    kind: str
    files: list[str]
    left_out: LeftOut = field(default_factory=LeftOut)

    def pictures(self, channel_files: Sequence[str] | None = None, mask_suffix: str = "") -> dict[str, Samples]:
        """The samples of each split by name, in order; all in ``train`` if there are no splits.

        Args:
            channel_files: name patterns, one per channel.
            mask_suffix: pictures named like another picture plus this suffix are masks, and left out.

        Raises:
            UserError: a pattern is invalid or matches nothing, a sample lacks one of its channels, two files have the
                same name, or a name is not UTF-8.
        """
        for file in self.files:
            if file.encode(errors="replace").decode() != file:  # Arrow stores only UTF-8
                raise UserError(f"{self.path} holds a picture whose name is not UTF-8, {file!a}; rename it")
        found = {}
        for split, files in self.picture_splits().items():
            root = Path(self.path, split) if files is not self.files else Path(self.path)
            names = files if files is self.files else [file.partition("/")[2] for file in files]
            samples = self.named(root, names, channel_files)
            masks = [name for name in samples if mask_suffix and is_mask(name, mask_suffix, samples)]
            self.left_out.add(MASKS, [samples.pop(name)[0] for name in masks])
            found[split] = samples
        return found

    def picture_splits(self) -> dict[str, list[str]]:
        """The files of each split."""
        tops = Counter(file.partition("/")[0] if "/" in file else "" for file in self.files)
        beside = [top for top in tops if top not in SPLITS]
        if "train" not in tops or beside:
            if "train" in tops:
                others = ", ".join(f"{top}/" if top else "the folder itself" for top in sorted(beside)[:4])
                self.left_out.notes.append(
                    f"{self.path}/train is not used as a split, because pictures lie beside it ({others}"
                    f"{' ...' if len(beside) > 4 else ''}): all {len(self.files)} are used; for splits, name them with "
                    f"--train_dir {self.path}/train and --validation_dir"
                )
            return {"train": self.files}
        return {
            split: [file for file in self.files if file.startswith(f"{split}/")] for split in SPLITS if split in tops
        }

    def named(self, root: Path, files: Sequence[str], channel_files: Sequence[str] | None) -> Samples:
        if channel_files:
            samples = join_channels(str(root), files, channel_files)
            used = {file for sample in samples.values() for file in sample}
            self.left_out.add(NO_PATTERN, [str(root / file) for file in files if str(root / file) not in used])
            return samples
        samples = {}
        for file in files:
            name = file[: -len(Path(file).suffix)]
            if name in samples:
                raise UserError(f"{samples[name][0]} and {root / file} have the same name; remove one of them")
            samples[name] = (str(root / file),)
        return samples

    def shards(self) -> dict[str, list[str]]:
        """The absolute paths of the parquet files or tars of each split; all in ``train`` if there are no splits."""
        root = Path(self.path).absolute()
        splits, note = shard_splits(self.files)
        if note:
            self.left_out.notes.append(f"{self.path}: {note}")
        return {split: [str(root / file) for file in files] for split, files in splits.items()}


def class_folders(samples: Samples) -> list[str]:
    """The class of each sample: the folder it lies in. UserError for one that lies in none."""
    outside = [files[0] for name, files in samples.items() if "/" not in name]
    if outside:
        raise UserError(
            f"{len(outside)} of {len(samples)} pictures lie in no class folder, e.g. {outside[0]}; give each class "
            f"its own folder"
        )
    return [name.partition("/")[0] for name in samples]


def is_mask(name: str, suffix: str, names: Mapping[str, Any]) -> bool:
    return name.endswith(suffix) and name.removesuffix(suffix) in names


def open_folder(folder: str, flag: str = "") -> Folder:
    """Look into a folder.

    Raises:
        UserError: there is no such folder, nothing to read in it, or both parquet files and tars.
    """
    name = f"{flag} {folder}".strip()
    root, left_out = Path(folder), LeftOut()
    if not root.is_dir():
        raise UserError(f"{name}: there is no such folder")
    found: dict[str, list[str]] = {"picture": [], "parquet": [], "webdataset": [], "": []}
    for file in sorted(walk(root, left_out)):
        if any(part.startswith(".") for part in file.split("/")):
            if PurePosixPath(file).suffix.lower() in IMAGE_FILES | SHARDS.keys():
                left_out.add(HIDDEN, [file])
            continue
        found[classify(file, left_out)].append(file)
    if found["parquet"] and found["webdataset"]:
        raise UserError(f"{name} holds parquet files and tars; put them into separate folders")
    for kind in ("parquet", "webdataset"):
        if found[kind]:
            left_out.add(BESIDE, found["picture"])
            return Folder(folder, kind, found[kind], left_out)
    if not found["picture"]:
        kinds = sorted({PurePosixPath(file).suffix.lower() or "suffixless" for file in found[""]})
        there = f"only {', '.join(kinds)} files" if kinds else "nothing"
        raise UserError(f"{name} holds {there}; expected pictures ({', '.join(sorted(IMAGE_FILES))}), parquet or tars")
    return Folder(folder, "imagefolder", found["picture"], left_out)


def open_pictures(folder: str, flag: str = "") -> Folder:
    """Like `open_folder`, with a UserError also for a folder of parquet files or tars."""
    found = open_folder(folder, flag)
    if found.kind != "imagefolder":
        kind = "parquet files" if found.kind == "parquet" else "tars"
        raise UserError(f"{flag} {folder}".strip() + f" holds {kind}; expected a folder of pictures")
    return found


def shard_splits(files: Sequence[str]) -> tuple[dict[str, list[str]], str]:
    """The files of each split, ``train``, ``validation`` and ``test``, and why there are none if names suggest some.

    A file's split is the first word of its path that names one: ``data/test-00000-of-00002.parquet``,
    ``train/0001.tar``, ``birds_val.parquet``. The files are splits if every path has such a word, the part before it is
    the same in all, and some are ``train``.
    """
    found: dict[str, list[str]] = {}
    before = set()
    for file in files:
        words = re.split(r"[-._ /\d]+", file.rpartition(".")[0])
        place = next((number for number, word in enumerate(words) if word in WORDS), None)
        found.setdefault("" if place is None else WORDS[words[place]], []).append(file)
        before.add(None if place is None else tuple(words[:place]))
    if "train" in found and "" not in found and len(before) == 1:
        return {split: found[split] for split in ("train", "validation", "test") if split in found}, ""
    note = ""
    if "train" in found:
        odd = found.get("", found["train"])[0]
        note = f"names are not used as splits, because they differ, e.g. {odd}: all {len(files)} files are used"
    return {"train": list(files)}, note


def join_channels(folder: str, files: Sequence[str], patterns: Sequence[str]) -> Samples:
    found: list[dict[str, str]] = []
    for pattern in patterns:
        place = pattern.rfind("*")
        if (
            place < 0
            or pattern.rpartition("/")[2].count("*") > 1
            or ("*" in pattern[:place] and "/" in pattern[place:])
        ):
            raise UserError(f"--channel_files {pattern!r}: write one * for the name of the sample, e.g. '*_ch0.tif'")
        fits = re.compile(f"{re.escape(pattern[:place])}(.+){re.escape(pattern[place + 1 :])}", re.DOTALL)
        matches = [(fits.fullmatch(file), file) for file in files]
        found.append({match[1]: str(Path(folder) / file) for match, file in matches if match})
        if not found[-1]:
            raise UserError(f"--channel_files {pattern!r} matches none of the {len(files)} files, e.g. {files[0]!r}")
    names = sorted(set().union(*found))
    for channel, pattern in zip(found, patterns, strict=True):
        missing = [name for name in names if name not in channel]
        if missing:
            place = pattern.rfind("*")
            raise UserError(
                f"{len(missing)} of the {len(names)} samples in {folder} have no file {pattern!r}, e.g. "
                f"{pattern[:place] + missing[0] + pattern[place + 1 :]!r}; add it, or move the rest of the sample away"
            )
    return {name: tuple(channel[name] for channel in found) for name in names}


def file_table(columns: Mapping[str, Sequence[tuple[str, ...]]], cache_dir: str | None = None) -> datasets.Dataset:
    """The files of samples as a table on disk, one row per sample: {column: {"bytes": None, "path", "more"}}.

    ``more`` holds the files of the channels after the first.
    """
    files = {column: tuple(samples) for column, samples in columns.items()}  # `datasets` would treat lists as shards
    stamps = tuple(file_stamp(file) for samples in files.values() for sample in samples for file in sample)
    one = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({column: one | {"more": datasets.List(datasets.Value("string"))} for column in files})
    options = {"files": files, "stamps": stamps}
    return datasets.Dataset.from_generator(_rows, features, cache_dir=cache_dir, gen_kwargs=options)


def file_stamp(file: str) -> str:
    """Size and time of a file; empty if it cannot be reached, which is counted when it is decoded."""
    try:
        status = Path(file).stat()
    except OSError:  # a broken link, a circle of links, no permission
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _rows(files: Mapping[str, Sequence[tuple[str, ...]]], stamps: Any) -> Iterator[dict[str, Any]]:
    """One row per sample; the stamps (sizes and times of the files) only tell one table from another."""
    for row in zip(*files.values(), strict=True):
        samples = zip(files, row, strict=True)
        yield {column: {"bytes": None, "path": first, "more": more} for column, (first, *more) in samples}
