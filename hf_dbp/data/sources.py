"""Where images lie: folders of pictures, parquet files or tars, and data sets on the Hub; downloaded or read in place.

`ImageSource` holds the data flags. `encoded_splits` and `streamed_splits` open what they name, as ``train`` and maybe
``validation``: things that map an index to {column: {"bytes", "path"}}, the same images in the same order.
"""

from __future__ import annotations

import dataclasses
import itertools
import posixpath
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from hf_dbp.data.folders import IMAGE_FILES, file_table, folder_splits, list_samples
from hf_dbp.data.shards import ShardedImages, list_shards, open_binary
from hf_dbp.errors import UserError
from hf_dbp.hub.errors import explained

__all__ = [
    "BUILT_IN",
    "IMAGE_FILES",
    "ImageSource",
    "any_split",
    "encoded_splits",
    "find_column",
    "from_hub",
    "pick_splits",
    "read_splits",
    "streamed_splits",
]

BUILT_IN = "wire_bonding"


@dataclasses.dataclass
class ImageSource:
    """Which images to load; the data flags of the scripts, under transformers' names.

    Args:
        dataset_name: Hub id, or ``wire_bonding`` for the built-in images.
        dataset_config_name: configuration of a Hub data set.
        train_dir: folder of images or parquet files; its splits ``train`` and ``validation`` are used if it has them.
        validation_dir: the same for validation.
        image_column_name: column that holds the images; default ``image``, else ``img``.
        train_val_split: share of the training images that becomes the validation set where there is none.
        max_train_samples: use at most so many training images, drawn with ``seed``.
        max_eval_samples: use at most so many validation images, drawn with ``seed``.
        num_channels: channels that images are brought to; default 3 for pictures, an array's own otherwise.
        channel_files: of a folder with a file per channel, a name pattern for each; see `hf_dbp.data.folders`.
        cache_dir, token, revision: as in `datasets.load_dataset`.
        built_in_size: side in pixels of the built-in images.
        seed: of the split, the draws and the built-in images.
        streaming: read images where they lie, on the Hub or on disk, instead of converting all of them first. With
            ``cache_dir`` each is read once and kept there decoded.
        train_fraction: share of the training images to use, chosen by their content.
        subset_seed: which share.
        cache_short_side: side in pixels that larger images are made smaller to in that cache.
        max_unreadable: how many images that cannot be decoded are tolerated.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_dir: str | None = None
    validation_dir: str | None = None
    image_column_name: str | None = None
    train_val_split: float = 0.15
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    num_channels: int | None = None
    channel_files: list[str] | None = None
    cache_dir: str | None = None
    token: str | None = None
    revision: str | None = None
    built_in_size: int = 128
    seed: int = 0
    streaming: bool = False
    train_fraction: float = 1.0
    subset_seed: int = 0
    cache_short_side: int = 256
    max_unreadable: int = 100

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
            raise UserError(
                f"{BUILT_IN} is rendered: --streaming does nothing there, --max_train_samples sets its size"
            )
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
        """Folder of the listings, keys and decoded images of streamed data."""
        return Path(self.cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_dbp"


def encoded_splits(source: ImageSource) -> tuple[dict[str, datasets.Dataset], str]:
    """Downloaded or converted data: ``train`` and maybe ``validation``, images left encoded, and their column."""
    splits = read_splits(source)
    for split, data in splits.items():
        column = find_column(data, source.image_column_name)
        splits[split] = data.select_columns(column)
        if isinstance(data.features[column], datasets.Image):
            splits[split] = splits[split].cast_column(column, datasets.Image(decode=False))
    return splits, find_column(splits["train"], source.image_column_name)


def streamed_splits(source: ImageSource) -> tuple[dict[str, ShardedImages], str]:
    """The images where they lie: ``train`` and maybe ``validation``, and their column.

    Raises:
        ValueError: files that cannot be read in place.
    """
    options = {"token": source.token}
    if source.dataset_name is None and holds_pictures(str(source.train_dir), "--train_dir"):
        return streamed_folders(source)
    if source.dataset_name is not None:
        builder = from_hub(source, datasets.load_dataset_builder, options)
    else:
        builder = folder_builder(str(source.train_dir), "--train_dir", options)
    files = pick_splits(builder.config.data_files, source.name)
    kind = files_kind(builder)
    if source.validation_dir is not None:
        other = folder_builder(source.validation_dir, "--validation_dir", options)
        if files_kind(other) != kind:
            raise UserError(f"--train_dir holds {kind} files, --validation_dir {files_kind(other)}; stream one kind")
        files["validation"] = any_split(other.config.data_files)
    if kind == "imagefolder":  # on the Hub
        files = {
            split: [file for file in names if Path(file).suffix.lower() in IMAGE_FILES]
            for split, names in files.items()
        }
    column = streamed_column(kind, files["train"][0], source)
    return {
        split: list_shards(kind, names, column, source.kept_in, source.token) for split, names in files.items()
    }, column


def folder_builder(folder: str, flag: str, options: dict[str, Any]) -> datasets.DatasetBuilder:
    """What `datasets` makes of a folder, nothing read yet. ValueError if it is none."""
    location = folder_location(folder, flag)
    with explained(f"{flag} {folder}"):
        return datasets.load_dataset_builder(**location, **options)


def streamed_folders(source: ImageSource) -> tuple[dict[str, ShardedImages], str]:
    """The picture files of folders; nothing is read yet."""
    splits = pick_splits(folder_splits(str(source.train_dir)), source.name)
    if source.validation_dir is not None:
        if not holds_pictures(source.validation_dir, "--validation_dir"):
            raise UserError("--train_dir holds pictures, --validation_dir does not; stream one kind")
        splits["validation"] = list_samples(source.validation_dir)
    return {
        split: list_shards("imagefolder", [file for (file,) in samples.values()], "image", source.kept_in, source.token)
        for split, samples in splits.items()
    }, "image"


def files_kind(builder: datasets.DatasetBuilder) -> str:
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in ("parquet", "webdataset", "imagefolder"):
        raise UserError(
            f"{kind} files cannot be streamed (parquet, webdataset and pictures can); leave out --streaming"
        )
    return kind


def streamed_column(kind: str, file: str, source: ImageSource) -> str:
    """The parquet column, or the extension of the tar members, that holds the images."""
    if kind == "imagefolder":
        return "image"
    with explained(file), open_binary(file, source.token, "readahead") as opened:
        if kind == "parquet":
            return pick_column(pq.read_schema(opened).names, source.image_column_name)
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            members = [member.name for member in itertools.islice(tar, 64) if member.isfile()]
    extensions = {name.partition(".")[2].lower() if "." in name else "" for name in map(posixpath.basename, members)}
    if source.image_column_name is not None:
        return pick_column(sorted(extensions), source.image_column_name)
    pictures = sorted(extension for extension in extensions if f".{extension}" in IMAGE_FILES)
    if len(pictures) != 1:
        raise UserError(
            f"{file} holds {', '.join(sorted(extensions))}; name the images by --image_column_name EXTENSION"
        )
    return pictures[0]


def from_hub(source: ImageSource, load: Callable[..., Any], options: dict[str, Any]) -> Any:
    """`datasets.load_dataset` or its kin for the data set on the Hub.

    Raises:
        ValueError: it cannot be had, and why.
    """
    name = str(source.dataset_name)
    with explained(name):
        try:
            return load(name, source.dataset_config_name, revision=source.revision, **options)
        except datasets.exceptions.DatasetNotFoundError:
            HfApi(token=source.token).auth_check(
                name, repo_type="dataset"
            )  # knows whether it is gated, private or none
            raise


def read_splits(source: ImageSource) -> dict[str, datasets.Dataset]:
    """``train`` and, where there is one, ``validation``, through `datasets.load_dataset`."""
    options = {"cache_dir": source.cache_dir, "token": source.token}
    if source.dataset_name is not None:
        loaded = from_hub(source, datasets.load_dataset, options)
    else:
        loaded = load_folder(str(source.train_dir), "--train_dir", source.channel_files, options)
    splits = pick_splits(loaded, source.name)
    if source.validation_dir is not None:
        loaded = load_folder(source.validation_dir, "--validation_dir", source.channel_files, options)
        splits["validation"] = any_split(loaded)
    return splits


def load_folder(
    folder: str, flag: str, channel_files: Sequence[str] | None, options: dict[str, Any]
) -> Mapping[str, datasets.Dataset]:
    """A folder of pictures or parquet files. ValueError if it is none, or damaged."""
    if holds_pictures(folder, flag):
        return {
            split: file_table({"image": list(samples.values())}, options["cache_dir"])
            for split, samples in folder_splits(folder, channel_files).items()
        }
    if channel_files:
        raise UserError(f"--channel_files names pictures, but {flag} {folder} holds parquet or tar files")
    location = folder_location(folder, flag)
    with explained(f"{flag} {folder}"):
        return datasets.load_dataset(**location, **options)  # type: ignore[no-any-return]


def holds_pictures(folder: str, flag: str) -> bool:
    """Whether a folder holds picture files rather than data sets. ValueError if there is nothing to read in it."""
    return str(folder_location(folder, flag)["path"]) == "imagefolder"


def folder_location(folder: str, flag: str) -> dict[str, Any]:
    """What to call `datasets.load_dataset` with for a folder. ValueError if there is nothing to read in it."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{flag} {folder}: there is no such folder")
    kinds = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    if not kinds & (IMAGE_FILES | {".parquet", ".arrow", ".tar"}):
        found = f"only {', '.join(sorted(kinds))} files" if kinds else "nothing"
        raise UserError(
            f"{flag} {folder} holds {found}; expected pictures ({', '.join(sorted(IMAGE_FILES))}) or parquet"
        )
    if ".parquet" in kinds or ".tar" in kinds:
        return {"path": str(path)}
    return {"path": "imagefolder", "data_dir": str(path), "drop_labels": True}


def pick_splits(loaded: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``train`` and, under this name, the first of validation, val and test."""
    if "train" not in loaded:
        raise UserError(f"{name} has no split 'train', only {', '.join(map(str, loaded))}")
    splits = {"train": loaded["train"]}
    for split in ("validation", "val", "test"):
        if split in loaded:
            return splits | {"validation": loaded[split]}
    return splits


def any_split(loaded: Mapping[str, Any]) -> Any:
    """The one split of a folder that is given for validation."""
    return next(loaded[split] for split in ("validation", "test", "train") if split in loaded)


def find_column(data: datasets.Dataset, wanted: str | None) -> str:
    """The column of the images. ValueError if there is none of that name."""
    return pick_column(data.column_names, wanted)


def pick_column(columns: Sequence[str], wanted: str | None) -> str:
    for column in (wanted,) if wanted is not None else ("image", "img"):
        if column in columns:
            return column
    raise UserError(f"no column {wanted or 'image'!r}; pass --image_column_name with one of {', '.join(columns)}")
