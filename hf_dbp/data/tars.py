"""Tars of images: their members, and which of these are images."""

from __future__ import annotations

import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import fsspec  # type: ignore[import-untyped]

from hf_dbp.data.folders import HIDDEN, IMAGE_FILES, classify
from hf_dbp.data.left_out import LeftOut
from hf_dbp.errors import UserError
from hf_dbp.hub.errors import explained

__all__ = [
    "NUMBERS",
    "TEXTS",
    "Member",
    "choose_members",
    "member_value",
    "no_images",
    "open_binary",
    "sample_of",
    "tar_members",
]

OTHER_PICTURES = "other pictures of a sample"
Member = tuple[str, int, int]  # name, offset and size of a file in a tar
NUMBERS = {"cls", "cls2", "class", "count", "index", "inx", "id"}  # members that hold a whole number, as in WebDataset
TEXTS = {"txt", "text", "transcript", "json"}


def open_binary(file: str, token: str | None, cache_type: str = "none") -> IO[bytes]:
    """Open a local file or one on the Hub (``hf://``), which is read exactly in the requested ranges, or ahead."""
    if "://" not in file:
        return Path(file).open("rb")
    filesystem, path = fsspec.core.url_to_fs(file, token=token)
    return filesystem.open(path, "rb", cache_type=cache_type)  # type: ignore[no-any-return]


def tar_members(file: str, token: str | None = None) -> list[Member]:
    """The files in a tar, in order; links have size -1. UserError if it is compressed or not a tar."""
    with explained(file), open_binary(file, token, "readahead") as opened:
        try:
            with tarfile.open(fileobj=opened, mode="r:") as tar:
                return [
                    (member.name, member.offset_data, member.size if member.isfile() else -1)
                    for member in tar
                    if member.isfile() or member.islnk() or member.issym()
                ]
        except tarfile.ReadError as error:
            raise UserError(f"{file} is not an uncompressed tar ({error}); unpack it") from error


def sample_of(name: str) -> tuple[str, str]:
    """Sample and extension of a tar's member: its path up to the first dot of the name, and the rest in lower case.

    As in WebDataset, ``a/0001.seg.png`` is ``seg.png`` of the sample ``a/0001``.
    """
    folder, base = posixpath.split(posixpath.normpath(name))
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def choose_members(file: str, members: Sequence[Member], column: str, left_out: LeftOut) -> list[Member]:
    """Which files of a tar are images; the others are counted.

    If ``column`` is an extension, members with that extension are images; if it is ``image``, all pictures are. A
    picture whose name has further dots, such as ``0001.seg.png``, belongs to the picture of its sample, if there is
    one, and does not count as an image.

    Raises:
        UserError: a sample has pictures of two extensions.
    """
    pictures: dict[str, list[tuple[str, Member]]] = defaultdict(list)
    for member in members:
        sample, extension = sample_of(member[0])
        where = f"{file}, {member[0]}"
        if any(part.startswith(".") for part in posixpath.normpath(member[0]).split("/")):
            left_out.add(HIDDEN, [where])
        elif extension == column or extension.endswith(f".{column}"):
            pictures[sample].append((extension, member))
        elif kind := classify(member[0], left_out):
            if kind == "picture":
                pictures[sample].append((extension, member))
            else:
                left_out.add("archives in a tar; unpack them", [where])
    chosen = []
    for sample, found in pictures.items():
        wanted = [entry for entry in found if entry[0] == column or entry[0].endswith(f".{column}")]
        plain = [entry for entry in found if "." not in entry[0]]
        if column == "image" and len({extension for extension, _ in plain}) > 1:
            raise UserError(
                f"{file}: sample {sample} holds {' and '.join(extension for extension, _ in plain)}; name the images "
                "by --image_column_name EXTENSION"
            )
        used = (plain or found) if column == "image" else wanted
        chosen += [member for _, member in used if member[2] >= 0]
        links = [f"{file}, {member[0]}" for _, member in used if member[2] < 0]
        left_out.add("links in a tar; store the files themselves", links)
        others = [f"{file}, {member[0]}" for extension, member in found if (extension, member) not in used]
        left_out.add(OTHER_PICTURES if column == "image" else f"of another extension than {column}", others)
    return sorted(chosen, key=lambda member: member[1])


def no_images(files: Sequence[str], column: str, left_out: LeftOut) -> UserError:
    """The error for tars without images, which says what they hold."""
    kind = "images" if column == "image" else f"members of extension {column!r}"
    kinds = ", ".join(sorted(left_out.other_files | {reason.partition(" ")[0]: 1 for reason in left_out.counts}))
    remedy = f"they hold {kinds}: name the images by --image_column_name EXTENSION" if kinds else "they are empty"
    return UserError(f"{files[0]}{' and similar files hold' if len(files) > 1 else ' holds'} no {kind}; {remedy}")


def member_value(extension: str, content: bytes, name: str) -> Any:
    """The content of a member of a tar: an encoded picture, a number, a text, or bytes."""
    if f".{extension.rpartition('.')[2]}" in IMAGE_FILES:
        return {"bytes": content, "path": name}
    if extension in NUMBERS:
        return int(content)
    return content.decode(errors="replace") if extension in TEXTS else content
