"""Where images come from: folders, parquet files, Hub data sets and the built-in `wire_bonding`, as one kind of list.

`ImageList` maps an index to an array (height, width, channels) of a fixed number of channels.
`load_images` makes the training and the validation list that the flags ask for, and fails before training where
something is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from hf_dbp.data.augmentation import unit_range
from hf_dbp.data.wire_bonding import WireBonding

__all__ = ["BUILT_IN", "ImageList", "ImageSource", "channel_statistics", "load_images", "to_array"]

BUILT_IN = "wire_bonding"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_FILES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


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
        cache_dir, token, revision: as in `datasets.load_dataset`.
        built_in_size: side in pixels of the built-in images.
        seed: of the split, the draws and the built-in images.
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
    cache_dir: str | None = None
    token: str | None = None
    revision: str | None = None
    built_in_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset_name is None and self.train_dir is None:
            raise ValueError(f"no data: give --train_dir FOLDER, --dataset_name HUB_ID or --dataset_name {BUILT_IN}")
        if self.dataset_name is not None and self.train_dir is not None:
            raise ValueError("give --train_dir or --dataset_name, not both")
        if not 0.0 < self.train_val_split < 1.0:
            raise ValueError(f"--train_val_split is a share between 0 and 1, got {self.train_val_split}")
        for name in ("max_train_samples", "max_eval_samples", "num_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is a positive number, got {value}")

    @property
    def name(self) -> str:
        return self.dataset_name or str(self.train_dir)


class ImageList:
    """Images as arrays (height, width, channels).

    Args:
        samples: anything that maps an index to a mapping from column to image (`datasets.Dataset`, `WireBonding`).
        column: the column of the images.
        num_channels: channels to bring them to; None keeps 3 for pictures and an array's own.
    """

    def __init__(self, samples: Any, column: str, num_channels: int | None = None) -> None:
        self.samples, self.column, self.num_channels = samples, column, num_channels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> NDArray[np.generic]:
        return to_array(self.samples[int(index)][self.column], self.num_channels)

    def __iter__(self) -> Iterator[NDArray[np.generic]]:
        return (self[index] for index in range(len(self)))


def to_array(image: Any, num_channels: int | None) -> NDArray[np.generic]:
    """A picture or array as (height, width, channels) with the wanted number of channels.

    Pictures become RGB for 3 channels (the default) and grey for 1; 16-bit grey pictures keep their depth. Arrays must
    have the wanted number.

    Raises:
        ValueError: the image has another number of channels than wanted and cannot be converted.
    """
    if isinstance(image, Image.Image):
        if image.mode in ("I;16", "I;16L", "I;16B", "I", "F"):
            grey = np.asarray(image)[..., None]
            grey = grey.astype(np.uint16) if image.mode == "I" else grey
            return (
                np.repeat(grey, num_channels or 1, axis=2)
                if num_channels in (None, 1, 3)
                else _refuse(grey, num_channels)
            )
        if num_channels in (None, 1, 3):
            array = np.asarray(image.convert("L" if num_channels == 1 else "RGB"))
            return array if array.ndim == 3 else array[..., None]
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    return array if num_channels in (None, array.shape[2]) else _refuse(array, num_channels)


def _refuse(array: NDArray[np.generic], num_channels: int | None) -> NDArray[np.generic]:
    raise ValueError(
        f"an image of shape {array.shape} (height, width, channels) cannot be read as {num_channels} channels; "
        f"pass --num_channels {array.shape[2]} or convert the images"
    )


def load_images(source: ImageSource) -> tuple[ImageList, ImageList]:
    """The training and the validation images.

    Raises:
        ValueError: no such folder or data set, no image in it, no such column, unreadable or wrong first image.
    """
    if source.dataset_name == BUILT_IN:
        return built_in_images(source)
    splits = read_splits(source)
    column = find_column(splits["train"], source.image_column_name)
    if "validation" not in splits:
        halves = splits["train"].train_test_split(test_size=source.train_val_split, seed=source.seed)
        splits = {"train": halves["train"], "validation": halves["test"]}
    limits = {"train": source.max_train_samples, "validation": source.max_eval_samples}
    lists = []
    for split, limit in limits.items():
        data = splits[split].select_columns(find_column(splits[split], source.image_column_name))
        if limit is not None and limit < len(data):
            data = data.shuffle(seed=source.seed).select(range(limit)).flatten_indices()
        lists.append(ImageList(data, column, source.num_channels))
    num_channels = check_first(lists, source.name)
    for images in lists:
        images.num_channels = num_channels
    return lists[0], lists[1]


def built_in_images(source: ImageSource) -> tuple[ImageList, ImageList]:
    """The built-in images: training and validation render different scenes."""
    train = source.max_train_samples or 1000
    validation = source.max_eval_samples or 200
    scenes = [
        WireBonding(count, size=source.built_in_size, seed=source.seed, first=first)
        for count, first in ((train, 0), (validation, 10_000_000))
    ]
    if source.num_channels not in (None, 2):
        raise ValueError(f"{BUILT_IN} images have 2 channels; leave --num_channels out or pass 2")
    return ImageList(rendered(scenes[0]), "image", 2), ImageList(rendered(scenes[1]), "image", 2)


def rendered(scenes: WireBonding) -> WireBonding | list[dict[str, NDArray[Any]]]:
    """The scenes rendered once and kept in memory, unless they would take more than a quarter of a gigabyte."""
    first = scenes[0]
    if len(scenes) * sum(array.nbytes for array in first.values()) > 2**28:
        return scenes
    return [scenes[index] for index in tqdm(range(len(scenes)), desc=f"Rendering {BUILT_IN}", leave=False)]


def read_splits(source: ImageSource) -> dict[str, datasets.Dataset]:
    """``train`` and, where there is one, ``validation``, through `datasets.load_dataset`."""
    options = {"cache_dir": source.cache_dir, "token": source.token}
    if source.dataset_name is not None:
        try:
            loaded = datasets.load_dataset(
                source.dataset_name, source.dataset_config_name, revision=source.revision, **options
            )
        except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
            raise ValueError(f"data set {source.dataset_name!r} cannot be loaded: {error}") from error
    else:
        loaded = load_folder(str(source.train_dir), "--train_dir", options)
    splits = pick_splits(loaded, source.name)
    if source.validation_dir is not None:
        validation = load_folder(source.validation_dir, "--validation_dir", options)
        splits["validation"] = next(validation[s] for s in ("validation", "test", "train") if s in validation)
    return splits


def load_folder(folder: str, flag: str, options: dict[str, Any]) -> datasets.DatasetDict:
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{flag} {folder}: there is no such folder")
    kinds = {file.suffix.lower() for file in path.rglob("*") if file.is_file()}
    if not kinds & (IMAGE_FILES | {".parquet", ".arrow", ".tar"}):
        found = f"only {', '.join(sorted(kinds))} files" if kinds else "nothing"
        raise ValueError(
            f"{flag} {folder} holds {found}; expected pictures ({', '.join(sorted(IMAGE_FILES))}) or parquet"
        )
    if ".parquet" in kinds or ".tar" in kinds:
        return datasets.load_dataset(str(path), **options)
    return datasets.load_dataset("imagefolder", data_dir=str(path), drop_labels=True, **options)


def pick_splits(loaded: datasets.DatasetDict, name: str) -> dict[str, datasets.Dataset]:
    if "train" not in loaded:
        raise ValueError(f"{name} has no split 'train', only {', '.join(loaded)}")
    splits = {"train": loaded["train"]}
    for split in ("validation", "val", "test"):
        if split in loaded:
            return splits | {"validation": loaded[split]}
    return splits


def find_column(data: datasets.Dataset, wanted: str | None) -> str:
    for column in (wanted,) if wanted is not None else ("image", "img"):
        if column in data.column_names:
            return column
    raise ValueError(
        f"no column {wanted or 'image'!r}; pass --image_column_name with one of {', '.join(data.column_names)}"
    )


def check_first(lists: Sequence[ImageList], name: str) -> int:
    """Read the first image of each list; the number of channels, the same in all."""
    counts = []
    for images in lists:
        if len(images) == 0:
            raise ValueError(f"{name}: a split without images")
        counts.append(int(images[0].shape[2]))
    if len(set(counts)) > 1:
        raise ValueError(f"{name}: training images have {counts[0]} channels, validation images {counts[1]}")
    return counts[0]


def channel_statistics(images: ImageList, num_images: int = 256) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel in [0, 1]: ImageNet's for 3 channels, else measured.

    Measured over at most ``num_images`` images at even steps, each at 64 x 64 pixels with its detail kept by a
    nearest-pixel grid.
    """
    channels = images[0].shape[2]
    if channels == 3:
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    picks = np.linspace(0, len(images) - 1, min(num_images, len(images)), dtype=int)
    samples = []
    for index in picks:
        image = images[index]
        rows = np.linspace(0, image.shape[0] - 1, 64, dtype=int)
        columns = np.linspace(0, image.shape[1] - 1, 64, dtype=int)
        samples.append(image[np.ix_(rows, columns)].reshape(-1, channels) * np.float64(unit_range(image.dtype)))
    pixels = np.concatenate(samples)
    deviation = np.maximum(pixels.std(axis=0), 1e-3)  # a constant channel stays finite
    return pixels.mean(axis=0).round(6).tolist(), deviation.round(6).tolist()
