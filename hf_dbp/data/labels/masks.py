"""Turn labels into a folder of index masks: drawn once, kept in the cache, used like any folder of masks."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import datasets
import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm.auto import tqdm

from hf_dbp.data.decoding import stored
from hf_dbp.data.folders import file_stamp, open_pictures
from hf_dbp.data.labels.formats import label_format, read_labels
from hf_dbp.data.labels.shapes import painted
from hf_dbp.errors import UserError

__all__ = ["NAMES", "is_labels", "mask_folder"]

NAMES = "classes.json"  # file in that folder: names by class id, background first
VERSION = 1  # version of the written files


def is_labels(source: str) -> bool:
    """Whether ``source`` holds labels, not masks."""
    return label_format(Path(source)) is not None


def mask_folder(
    source: str, image_dir: str, names: Sequence[str] | None = None, cache_dir: str | None = None
) -> tuple[str, list[str]]:
    """The folder of masks drawn from labels, and the class names by id.

    Args:
        source: file or folder of labels.
        image_dir: folder of their images; masks get the same names.
        names: given class names by id, background first; default: those of the labels.
        cache_dir: where to keep the folder; default: the cache of `datasets`.

    Raises:
        UserError: labels cannot be read, their image does not exist, or their class is not among ``names``.
    """
    folder = open_pictures(image_dir)
    files = {name: paths[0] for name, paths in folder.named(Path(image_dir), folder.files, None).items()}
    given = [Path(source)] if Path(source).is_file() else sorted(f for f in Path(source).rglob("*") if f.is_file())
    about = [VERSION, names, os.path.abspath(image_dir), *((str(f.resolve()), file_stamp(str(f))) for f in given)]
    key = hashlib.blake2b(json.dumps([about, sorted(files)], allow_nan=False).encode(), digest_size=10).hexdigest()
    kept = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_dbp" / "labels"
    kept.mkdir(parents=True, exist_ok=True)
    target = kept / key
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            draw(source, files, names, kept, target)
    return str(target), json.loads((target / NAMES).read_text(encoding="utf-8"))


def draw(source: str, files: dict[str, str], names: Sequence[str] | None, kept: Path, target: Path) -> None:
    """Draw the masks of labels into a temporary folder, then rename it."""

    def size_of(name: str) -> tuple[int, int]:
        if name not in files:
            raise UserError(
                f"{source} labels {name!r}, but there is no image with that name; images are called "
                f"{next(iter(files))!r} ..."
            )
        shape = np.asarray(stored({"bytes": None, "path": files[name]})).shape
        return shape[0], shape[1]

    images, found = read_labels(source, size_of)
    classes = list(names) if names is not None else ["background", *found]
    ids = {name: number for number, name in enumerate(classes)} | dict.fromkeys(("background", "_background_"), 0)
    unknown = sorted({shape.label for image in images for shape in image.shapes} - ids.keys())
    if unknown:
        raise UserError(f"{source} holds the class {unknown[0]!r}, which is not one of {', '.join(classes)}")
    with tempfile.TemporaryDirectory(dir=kept) as aside:
        for image in tqdm(images, "Drawing masks", leave=False):
            name = named(image.file, files, source)
            mask = painted(image, ids)
            path = Path(aside, "masks", f"{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.astype(np.uint8 if len(classes) <= 255 else np.uint16)).save(path)
        (Path(aside) / "masks" / NAMES).write_text(json.dumps(classes, allow_nan=False), encoding="utf-8")
        Path(aside, "masks").rename(target)


def named(file: str, files: dict[str, str], source: str) -> str:
    """The name of the image that labels refer to: by its path, else by its file name if that is unique.

    An image in ``validation`` is not the one that labels call ``train/0.png``, if there is a folder ``train``.
    """
    path = PurePosixPath(file.replace("\\", "/"))
    for name in (str(path), str(path.with_suffix(""))):
        if name in files:
            return name
    places = {name: PurePosixPath(name) for name in files}
    folder = path.parent.name
    known = folder and any(place.parent.name == folder for place in places.values())
    same = [
        name for name, place in places.items() if place.name == path.stem and (not known or place.parent.name == folder)
    ]
    if len(same) != 1:
        there = f"{len(same)} images have" if same else "no image has"
        raise UserError(f"{source} labels {file!r}, but {there} that name; images are called {next(iter(files))!r} ...")
    return same[0]
