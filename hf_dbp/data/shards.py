"""Read images in place, piece by piece: parquet files, webdataset tars and picture files, local or on the Hub.

Nothing is copied or unpacked first. A *listing* tells which images there are without reading them: from the parquet
footers, the tar headers or the file names. It gives a streamed data set a known length and every image a row number,
the same as in the downloaded data set. Images are read in *pieces*, a parquet row group or a run of tar members: asking
for one image reads its whole piece, and the latest pieces are kept. An order that stays within few pieces at a time
(`hf_dbp.data.order`) therefore reads each about once.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from hf_dbp.data.folders import file_stamp
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.subset import Keys, content_key, readable_bytes
from hf_dbp.data.tars import choose_members, no_images, open_binary, tar_members
from hf_dbp.data.threads import in_threads
from hf_dbp.errors import UserError
from hf_dbp.hub.errors import explained

__all__ = [
    "Listing",
    "ShardedImages",
    "list_shards",
]

BUFFER_BYTES = 256 * 2**20  # encoded images kept per process
LISTING = 2  # version of stored listings
TAR_PIECE = (256, 32 * 2**20)  # members and bytes per piece

Integers = NDArray[np.int64]


@dataclass
class Listing:
    """The list of images: N images in P pieces, in order.

    Attributes:
        kind: ``parquet``, ``webdataset`` or ``imagefolder``.
        column: parquet column; for tars, the extension of the members that are images, or ``image`` for all pictures.
        files: the files.
        piece_file, piece_group: file of each piece, and row group within it (P).
        piece_bytes: bytes of each piece (P).
        first: number of the first image of each piece, and N at the end (P + 1).
        members, offsets, sizes: name, offset and size of each image in its tar (N); empty for other kinds.
        left_out: JSON, from `LeftOut.record`, of what the tars hold besides the images; empty for other kinds.
    """

    kind: str
    column: str
    files: list[str]
    piece_file: Integers
    piece_group: Integers
    piece_bytes: Integers
    first: Integers
    members: list[str] = field(default_factory=list)
    offsets: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    sizes: Integers = field(default_factory=lambda: np.zeros(0, np.int64))
    left_out: str = ""

    ARRAYS = ("piece_file", "piece_group", "piece_bytes", "first", "members", "offsets", "sizes", "left_out")

    def write(self, path: Path) -> None:
        """Save the arrays, whole or not at all."""
        part = path.with_name(f".{path.name}.{os.getpid()}.npz")
        np.savez(part, **{name: np.asarray(getattr(self, name)) for name in self.ARRAYS})  # type: ignore[arg-type]
        part.replace(path)

    @classmethod
    def read(cls, path: Path, kind: str, column: str, files: list[str]) -> Listing:
        with np.load(path) as saved:
            arrays = {name: saved[name] for name in cls.ARRAYS}
        return cls(
            kind, column, files, **arrays | {"members": arrays["members"].tolist(), "left_out": str(arrays["left_out"])}
        )


def fingerprint(files: Sequence[str], *settings: object) -> str:
    """A name for the contents of files: on the Hub their address with the commit, locally their size and time."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=12)
    for file in files:
        digest.update(file.encode())
        if "://" not in file:
            digest.update(file_stamp(file).encode())
    return digest.hexdigest()


def list_shards(kind: str, files: Sequence[str], column: str, folder: Path, token: str | None) -> ShardedImages:
    """The images in these files; one process at a time makes the listing, which is kept in ``folder``.

    Raises:
        UserError: the column holds no encoded images, an archive is compressed, or the Hub refuses.
    """
    files = list(files)
    if kind == "imagefolder":
        numbers = np.arange(len(files))
        nothing = np.zeros(len(files), np.int64)
        listing = Listing(kind, column, files, numbers, nothing, nothing, np.arange(len(files) + 1))
        return ShardedImages(listing, folder, token)
    path = folder / f"{fingerprint(files, kind, column, LISTING)}.npz"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            make = list_parquet if kind == "parquet" else list_tars
            make(files, column, token).write(path)
    return ShardedImages(Listing.read(path, kind, column, files), folder, token)


def list_parquet(files: list[str], column: str, token: str | None) -> Listing:
    """Pieces are row groups, known from the footers."""

    def groups(file: str) -> list[tuple[int, int]]:
        with explained(file), open_binary(file, token) as opened:
            parquet = pq.ParquetFile(opened)
            kind = parquet.schema_arrow.field(column).type
            if not holds_encoded(kind):
                raise UserError(f"column {column!r} of {file} holds {kind}, not encoded images; leave out --streaming")
            if is_text(kind) and "://" in file:
                raise UserError(f"column {column!r} of {file} holds paths, which can be read only if the file is local")
            rows = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
            return [(group.num_rows, group.total_byte_size) for group in rows]

    found = list(in_threads(groups, files))
    counts = np.array([rows for groups in found for rows, _ in groups], np.int64)
    return Listing(
        "parquet",
        column,
        files,
        piece_file=np.repeat(np.arange(len(files)), [len(groups) for groups in found]),
        piece_group=np.array([number for groups in found for number in range(len(groups))], np.int64),
        piece_bytes=np.array([size for groups in found for _, size in groups], np.int64),
        first=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    )


def holds_encoded(kind: pa.DataType) -> bool:
    """Whether a column of this type holds encoded images: bytes, paths, or structs of them."""
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0 or kind.get_field_index("path") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or is_text(kind))


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def encoded_value(value: Any, file: str, name: str) -> dict[str, Any]:
    """{"bytes", "path"} of a value in a parquet file; paths are relative to the file's folder.

    Args:
        value: bytes, a path, a mapping of both, or None.
        file: the parquet file.
        name: how messages refer to bytes.
    """
    encoded, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if isinstance(encoded, str):
        encoded, path = None, encoded
    if encoded is None and path and "://" not in file:
        return {"bytes": None, "path": os.path.join(os.path.dirname(file), path)}
    return {"bytes": encoded or b"", "path": name}


def list_tars(files: list[str], column: str, token: str | None) -> Listing:
    """Pieces are runs of members; each tar is scanned once for its headers."""

    left_out = LeftOut()
    read = in_threads(lambda file: tar_members(file, token), files)
    found = [choose_members(file, members, column, left_out) for file, members in zip(files, read, strict=True)]
    if not any(found):
        raise no_images(files, column, left_out)
    pieces: list[tuple[int, int, int]] = []  # file, first image, bytes
    total = 0
    for number, entries in enumerate(found):
        count = size = 0
        for _, _, length in entries:
            if count == 0 or count >= TAR_PIECE[0] or size + length > TAR_PIECE[1]:
                pieces.append((number, total, 0))
                count = size = 0
            count, size, total = count + 1, size + length, total + 1
            pieces[-1] = (number, pieces[-1][1], size)
    table = np.array(pieces, np.int64).reshape(-1, 3)
    flat = [entry for entries in found for entry in entries]
    return Listing(
        "webdataset",
        column,
        files,
        piece_file=table[:, 0],
        piece_group=np.zeros(len(table), np.int64),
        piece_bytes=table[:, 2],
        first=np.append(table[:, 1], total),
        members=[name for name, _, _ in flat],
        offsets=np.array([offset for _, offset, _ in flat], np.int64),
        sizes=np.array([size for _, _, size in flat], np.int64),
        left_out=json.dumps(left_out.record(), allow_nan=False),
    )


class ShardedImages:
    """Encoded images in files, as {column: {"bytes", "path"}} by index; see the module's docstring.

    Args:
        listing: the images.
        folder: where their listing and keys are kept.
        token: Hub token.
        rows: which of the images, in ascending order; all by default.
    """

    def __init__(self, listing: Listing, folder: Path, token: str | None, rows: Integers | None = None) -> None:
        self.listing, self.folder, self.token = listing, folder, token
        self.rows = np.arange(listing.first[-1]) if rows is None else rows
        self._buffer: OrderedDict[int, dict[int, dict[str, Any]]] = OrderedDict()
        self._buffered = 0
        self._footers: dict[str, pq.FileMetaData] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def left_out(self) -> LeftOut:
        """What the files hold besides the images."""
        return LeftOut.of(json.loads(self.listing.left_out)) if self.listing.left_out else LeftOut()

    def select(self, rows: Integers) -> ShardedImages:
        """The same with only these images."""
        return ShardedImages(self.listing, self.folder, self.token, self.rows[rows])

    def piece_of(self, row: int) -> int:
        return int(np.searchsorted(self.listing.first, row, side="right")) - 1

    def pieces(self) -> list[int]:
        """The pieces that hold any of the images."""
        return [int(piece) for piece in np.unique(np.searchsorted(self.listing.first, self.rows, side="right") - 1)]

    def blocks(self) -> tuple[Integers, Integers] | None:
        """For each piece, in order, the number of images and bytes to read; None if every image is a separate file."""
        if self.listing.kind == "imagefolder":
            return None
        pieces = np.searchsorted(self.listing.first, self.rows, side="right") - 1
        numbers, counts = np.unique(pieces, return_counts=True)
        return counts.astype(np.int64), self.listing.piece_bytes[numbers]

    def __getitem__(self, index: int) -> dict[str, dict[str, Any]]:
        row = int(self.rows[index])
        piece = self.piece_of(row)
        if piece not in self._buffer:
            self._buffer[piece] = dict(self.read(piece))
            self._buffered += int(self.listing.piece_bytes[piece])
            while self._buffered > BUFFER_BYTES and len(self._buffer) > 1:
                oldest, _ = self._buffer.popitem(last=False)
                self._buffered -= int(self.listing.piece_bytes[oldest])
            if self.listing.kind == "imagefolder":  # read once per epoch: nothing to keep
                return {self.listing.column: self._buffer.pop(piece)[row]}
        self._buffer.move_to_end(piece)
        return {self.listing.column: self._buffer[piece][row]}

    def read(self, piece: int) -> list[tuple[int, dict[str, Any]]]:
        """(row, {"bytes", "path"}) of the wanted images of a piece.

        Raises:
            UserError: the Hub refuses or the connection is lost for good.
        """
        listing = self.listing
        low, high = (bisect.bisect_left(self.rows, int(listing.first[piece + end])) for end in (0, 1))
        rows = [int(row) for row in self.rows[low:high]]
        file = listing.files[int(listing.piece_file[piece])]
        if listing.kind == "imagefolder" and "://" not in file:
            return [(row, {"bytes": None, "path": file}) for row in rows]
        with explained(file), open_binary(file, self.token) as opened:
            if listing.kind == "parquet":
                values = self._read_row_group(opened, piece, rows)
            elif listing.kind == "webdataset":
                values = self._read_members(opened, rows)
            else:
                values = [{"bytes": opened.read(), "path": file}]
        return list(zip(rows, values, strict=True))

    def _read_row_group(self, opened: IO[bytes], piece: int, rows: list[int]) -> list[dict[str, Any]]:
        listing = self.listing
        file = listing.files[int(listing.piece_file[piece])]
        parquet = pq.ParquetFile(opened, metadata=self._footers.get(file), pre_buffer=True)
        self._footers[file] = parquet.metadata
        first, group = int(listing.first[piece]), int(listing.piece_group[piece])
        table = parquet.read_row_group(group, columns=[listing.column])
        values = []
        for row, value in zip(rows, table.column(0).take([row - first for row in rows]).to_pylist(), strict=True):
            values.append(encoded_value(value, file, f"{file}, row {row - first} of group {group}"))
        return values

    def _read_members(self, opened: IO[bytes], rows: list[int]) -> list[dict[str, Any]]:
        offsets, sizes = self.listing.offsets, self.listing.sizes
        opened.seek(int(offsets[rows[0]]))
        start = int(offsets[rows[0]])
        span = opened.read(int(offsets[rows[-1]] + sizes[rows[-1]]) - start)
        file, members = self.listing.files[int(self.listing.piece_file[self.piece_of(rows[0])])], self.listing.members
        return [
            {"bytes": span[offsets[row] - start : offsets[row] + sizes[row] - start], "path": f"{file}, {members[row]}"}
            for row in rows
        ]

    def keys(self) -> Keys:
        """Content keys of the images; one process reads all images once, and the keys are kept."""
        path = self.folder / f"{fingerprint(self.listing.files, self.listing.column, LISTING)}-keys.npy"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                everything = ShardedImages(self.listing, self.folder, self.token)
                found = in_threads(everything.piece_keys, everything.pieces())
                part = path.with_name(f".{path.stem}.{os.getpid()}.npy")
                np.save(part, np.fromiter((key for keys in found for key in keys), dtype=np.uint64))
                part.replace(path)
        keys: Keys = np.load(path)
        return keys[self.rows]

    def piece_keys(self, piece: int) -> list[int]:
        return [content_key(readable_bytes(value)) for _, value in self.read(piece)]
