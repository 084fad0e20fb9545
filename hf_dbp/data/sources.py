"""Sources of images: folders of pictures, parquet files or tars, and data sets on the Hub; downloaded or read in place.

`ImageSource` holds the data flags. `encoded_splits` and `streamed_splits` open what the flags name, as ``train`` and
maybe ``validation``: objects that map an index to {column: {"bytes", "path"}}, with the same images in the same order.
Both use the same parts of the same files: `local_parts` for a folder, and what `datasets` finds for the Hub. `LeftOut`
lists what else is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from hf_dbp.data.arguments import StreamingFlags
from hf_dbp.data.folders import IMAGE_FILES, Samples, class_folders, classify, file_table, open_folder
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.shards import list_shards
from hf_dbp.data.tables import encoded_column, parquet_table, tar_table
from hf_dbp.data.tars import open_binary
from hf_dbp.errors import UserError
from hf_dbp.hub.errors import explained

__all__ = [
    "BUILT_IN",
    "IMAGE_FILES",
    "UNUSED_SPLIT",
    "ImageSource",
    "Opened",
    "Part",
    "any_split",
    "encoded_splits",
    "find_column",
    "local_parts",
    "pick_splits",
    "read_splits",
    "streamed_splits",
]

BUILT_IN = "wire_bonding"
UNUSED_SPLIT = "images of a split used for neither training nor validation"


@dataclasses.dataclass
class ImageSource(StreamingFlags):
    """Which images to load: all data flags, and what the scripts give with them.

    Args:
        cache_dir, token, revision: as in `datasets.load_dataset`.
        seed: seed of the split, the draws and the built-in images.
    """

    cache_dir: str | None = None
    token: str | None = None
    revision: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None:
            raise UserError(f"no data: give --train_dir FOLDER, --dataset_name HUB_ID or --dataset_name {BUILT_IN}")
        if self.dataset_name is not None and self.train_dir is not None:
            raise UserError("give --train_dir or --dataset_name, not both")
        if not 0.0 < self.train_val_split < 1.0:
            raise UserError(f"--train_val_split is a share between 0 and 1, got {self.train_val_split}")
        for name in ("max_train_samples", "max_eval_samples", "num_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is a positive number, got {value}")
        if not 0.0 < self.train_fraction <= 1.0:
            raise UserError(f"--train_fraction is a share above 0 and at most 1, got {self.train_fraction}")
        if self.train_fraction < 1.0 and self.max_train_samples is not None:
            raise UserError("give --train_fraction or --max_train_samples, not both")
        if self.dataset_name == BUILT_IN and (self.streaming or self.train_fraction < 1.0):
            raise UserError(f"{BUILT_IN} is rendered: leave out --streaming; --max_train_samples sets its size")
        if self.channel_files and (self.train_dir is None or self.streaming):
            raise UserError("--channel_files names the files of --train_dir FOLDER, without --streaming")
        if self.cache_short_side < 1 or self.max_unreadable < 0:
            raise UserError(
                f"--cache_short_side is a positive number and --max_unreadable not negative, "
                f"got {self.cache_short_side} and {self.max_unreadable}"
            )

    @property
    def name(self) -> str:
        return self.dataset_name or str(self.train_dir)

    @property
    def kept_in(self) -> Path:
        """The folder for listings, keys and decoded images of streamed data."""
        return Path(self.cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_dbp"


class Opened(NamedTuple):
    """``train`` and maybe ``validation``, the column of their images, and what is left out."""

    splits: dict[str, Any]
    column: str
    left_out: LeftOut


class Part(NamedTuple):
    """A split of a local folder: samples of pictures, or parquet files or tars, not read yet."""

    kind: str
    content: Samples | list[str]


def encoded_splits(source: ImageSource) -> Opened:
    """Downloaded or converted data: ``train`` and maybe ``validation``, with encoded images."""
    splits, left_out = read_splits(source)
    for split, data in splits.items():
        column = find_column(data, source.image_column_name)
        splits[split] = encoded_column(data, column).select_columns(column)
    return Opened(splits, find_column(splits["train"], source.image_column_name), left_out)


def streamed_splits(source: ImageSource) -> Opened:
    """The images in place: ``train`` and maybe ``validation``, and their column.

    Raises:
        UserError: the files cannot be read in place.
    """
    parts, left_out = hub_parts(source) if source.dataset_name is not None else local_parts(source)
    kinds = {part.kind for part in parts.values()}
    if len(kinds) > 1:
        train, validation = (parts[split].kind for split in ("train", "validation"))
        raise UserError(f"--train_dir holds {train} files, --validation_dir {validation}; stream only one kind")
    column = streamed_column(parts["train"], source)
    splits = {}
    for split, (kind, content) in parts.items():
        files = content if isinstance(content, list) else [file for (file,) in content.values()]
        splits[split] = list_shards(kind, files, column, source.kept_in, source.token)
        left_out.merge(splits[split].left_out)
    return Opened(splits, column, left_out)


def local_parts(source: ImageSource) -> tuple[dict[str, Part], LeftOut]:
    """Which files of --train_dir and --validation_dir are ``train`` and maybe ``validation``.

    Raises:
        UserError: as for `open_folder` and `Folder.pictures`.
    """
    parts, left_out = folder_parts(str(source.train_dir), "--train_dir", source)
    instead = source.validation_dir is not None
    parts = pick_splits(parts, source.name, left_out, instead, counted=lambda part: count_images(part, source))
    if source.validation_dir is not None:
        others, more = folder_parts(source.validation_dir, "--validation_dir", source)
        parts["validation"] = any_split(others, more, counted=lambda part: count_images(part, source))
        left_out.merge(more)
    return parts, left_out


def folder_parts(folder: str, flag: str, source: ImageSource) -> tuple[dict[str, Part], LeftOut]:
    """All splits of a folder, and what is in none of them."""
    found = open_folder(folder, flag)
    content: Mapping[str, Samples | list[str]]
    if found.kind == "imagefolder":
        content = found.pictures(source.channel_files, source.mask_suffix)
    elif source.channel_files:
        raise UserError(f"--channel_files names pictures, but {flag} {folder} holds parquet or tar files")
    else:
        content = found.shards()
    return {split: Part(found.kind, part) for split, part in content.items()}, found.left_out


def count_images(part: Part, source: ImageSource) -> int:
    """How many images a part of a folder holds."""
    if part.kind == "parquet":
        rows = 0
        for file in part.content:
            with explained(file):
                rows += pq.read_metadata(file).num_rows
        return rows
    if part.kind == "webdataset":
        return len(list_shards(part.kind, list(part.content), tar_column(source), source.kept_in, None))
    return len(part.content)


def tar_column(source: ImageSource) -> str:
    """The extension of the members that are images; ``image`` for all pictures."""
    return (source.image_column_name or "image").lower()


def hub_parts(source: ImageSource) -> tuple[dict[str, Part], LeftOut]:
    """The files of a data set on the Hub that are ``train`` and maybe ``validation``."""
    builder = from_hub(source, datasets.load_dataset_builder, {"token": source.token})
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in ("parquet", "webdataset", "imagefolder"):
        raise UserError(
            f"{kind} files cannot be streamed (parquet, webdataset and pictures can); leave out --streaming"
        )
    left_out, found = LeftOut(), {}
    for split, files in builder.config.data_files.items():
        names = list(files)
        if kind == "imagefolder":
            names = [file for file in names if classify(file, left_out) == "picture"]
        found[str(split)] = Part(kind, names)
    kept = pick_splits(found, source.name, LeftOut())
    for split, part in found.items():
        if part not in kept.values():  # counting images would mean reading the files
            left_out.add(f"files of a split used for neither training nor validation ({split})", part.content)
    return kept, left_out


def streamed_column(part: Part, source: ImageSource) -> str:
    """The parquet column, or the extension of the tar members, that holds the images."""
    if part.kind == "imagefolder":
        return "image"
    if part.kind == "webdataset":
        return tar_column(source)
    file = next(iter(part.content))
    with explained(file), open_binary(file, source.token, "readahead") as opened:
        return pick_column(pq.read_schema(opened).names, source.image_column_name)


def from_hub(source: ImageSource, load: Callable[..., Any], options: dict[str, Any]) -> Any:
    """`datasets.load_dataset` or a similar function for the data set on the Hub.

    Raises:
        UserError: it is not available; the message says why.
    """
    name = str(source.dataset_name)
    with explained(name):
        try:
            return load(name, source.dataset_config_name, revision=source.revision, **options)
        except datasets.exceptions.DatasetNotFoundError:
            HfApi(token=source.token).auth_check(
                name, repo_type="dataset"
            )  # it knows whether the data set is gated, private or missing
            raise


def read_splits(source: ImageSource, classes: bool = False) -> tuple[dict[str, datasets.Dataset], LeftOut]:
    """``train`` and, if there is one, ``validation``, as tables with all their columns; and what is left out.

    Args:
        source: the images.
        classes: pictures lie in one folder per class, which becomes the column ``label``.
    """
    if source.dataset_name is None:
        parts, left_out = local_parts(source)
        return {split: part_table(part, source, left_out, classes) for split, part in parts.items()}, left_out
    left_out = LeftOut()
    loaded = load_hub(source, left_out)
    splits = pick_splits(loaded, source.name, left_out, source.validation_dir is not None)
    if source.validation_dir is not None:
        others, more = folder_parts(source.validation_dir, "--validation_dir", source)
        part = any_split(others, more, counted=lambda part: count_images(part, source))
        left_out.merge(more)
        splits["validation"] = part_table(part, source, left_out, classes)
    return splits, left_out


def load_hub(source: ImageSource, left_out: LeftOut) -> Mapping[str, datasets.Dataset]:
    """The splits of a data set on the Hub, downloaded; we read tars ourselves, as in streaming."""
    options = {"cache_dir": source.cache_dir, "token": source.token}
    builder = from_hub(source, datasets.load_dataset_builder, options)
    if type(builder).__module__.rpartition(".")[2] != "webdataset":
        return from_hub(source, datasets.load_dataset, options)  # type: ignore[no-any-return]
    with explained(str(source.dataset_name)):
        manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(
            cache_dir=str(Path(source.cache_dir or datasets.config.HF_DATASETS_CACHE) / "downloads"),
            token=source.token,
        ))  # fmt: skip
        files = {str(split): manager.download(list(names)) for split, names in builder.config.data_files.items()}
    return {
        split: tar_table(list(map(str, names)), tar_column(source), source.cache_dir, left_out)
        for split, names in files.items()
    }


def part_table(part: Part, source: ImageSource, left_out: LeftOut, classes: bool) -> datasets.Dataset:
    """A part of a folder as a table; pictures have their class as ``label`` if asked."""
    if not isinstance(part.content, list):
        table = file_table({"image": list(part.content.values())}, source.cache_dir)
        return table.add_column("label", class_folders(part.content)) if classes else table
    if part.kind == "parquet":
        return parquet_table(part.content, source.cache_dir)
    return tar_table(part.content, tar_column(source), source.cache_dir, left_out)


def pick_splits(
    loaded: Mapping[str, Any],
    name: str,
    left_out: LeftOut,
    validation_elsewhere: bool = False,
    counted: Callable[[Any], int] = len,
) -> dict[str, Any]:
    """``train`` and, as ``validation``, the first of validation, val, valid, dev and test; others are left out.

    Args:
        loaded: all splits.
        name: how messages refer to them.
        left_out: collects the others.
        validation_elsewhere: take only ``train``.
        counted: returns the number of images in a split.
    """
    if "train" not in loaded:
        raise UserError(f"{name} has no split 'train', only {', '.join(map(str, loaded))}")
    splits = {"train": loaded["train"]}
    kept = {"train"}
    for split in ("validation", "val", "valid", "dev", "test"):
        if split in loaded and not validation_elsewhere:
            splits["validation"] = loaded[split]
            kept.add(split)
            break
    note_splits(loaded, kept, left_out, counted)
    return splits


def any_split(loaded: Mapping[str, Any], left_out: LeftOut, counted: Callable[[Any], int] = len) -> Any:
    """The split to use from a folder given for validation; others are left out."""
    split = next(split for split in ("validation", "val", "valid", "dev", "test", "train") if split in loaded)
    note_splits(loaded, {split}, left_out, counted)
    return loaded[split]


def note_splits(loaded: Mapping[str, Any], kept: set[str], left_out: LeftOut, counted: Callable[[Any], int]) -> None:
    for split, part in loaded.items():
        if split not in kept:
            left_out.add(UNUSED_SPLIT, [str(split)], counted(part))


def find_column(data: datasets.Dataset, wanted: str | None) -> str:
    """The column of the images. UserError if there is none with that name."""
    return pick_column(data.column_names, wanted)


def pick_column(columns: Sequence[str], wanted: str | None) -> str:
    for column in (wanted,) if wanted is not None else ("image", "img"):
        if column in columns:
            return column
    raise UserError(f"no column {wanted or 'image'!r}; pass --image_column_name with one of {', '.join(columns)}")
