"""Parquet files and tars as tables on disk, one row per image, with all their columns; every path is literal.

A column of encoded images is converted to {"bytes", "path"}, whether it stores bytes, paths, or structs of one or both,
with or without the metadata of `datasets`. Paths are relative to the folder of their parquet file.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.fingerprint import Hasher
from datasets.packaged_modules.parquet.parquet import Parquet

from hf_dbp.data.folders import IMAGE_FILES, file_stamp
from hf_dbp.data.left_out import LeftOut
from hf_dbp.data.tars import NUMBERS, TEXTS, Member, choose_members, member_value, no_images, sample_of, tar_members
from hf_dbp.hub.errors import explained

__all__ = ["encoded_column", "parquet_table", "tar_table"]


def parquet_table(files: Sequence[str], cache_dir: str | None) -> datasets.Dataset:
    """The rows of parquet files, converted to Arrow once.

    Args:
        files: absolute paths.
        cache_dir: as in `datasets.load_dataset`.
    """
    with explained(files[0] if len(files) == 1 else f"{posixpath.dirname(files[0])} ({len(files)} parquet files)"):
        names = [literal(file, cache_dir) for file in files]
        found = DataFilesDict(train=DataFilesList(names, [(file_stamp(file),) for file in files]))
        builder = Parquet(cache_dir=cache_dir, data_files=found)
        builder.download_and_prepare()
        table: datasets.Dataset = builder.as_dataset(split="train")
        counts = [pq.read_metadata(file).num_rows for file in files]
    folders = np.repeat([os.path.dirname(file) for file in files], counts)
    for column in table.column_names:
        table = with_paths(table, column, folders)
    return table


def literal(file: str, cache_dir: str | None) -> str:
    """A path of a parquet file that `datasets` takes literally: a link in place of a path with ``::``, which would
    chain file systems."""
    if "::" not in file:
        return file
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "hf_dbp" / "links"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / f"{Hasher.hash(file)}{Path(file).suffix}"
    if not link.is_symlink():
        with contextlib.suppress(FileExistsError):  # another process was faster
            link.symlink_to(file)
    return str(link)


def with_paths(table: datasets.Dataset, column: str, folders: Any) -> datasets.Dataset:
    """The table with the image paths in a column made absolute; unchanged if there are none.

    Args:
        table: the table as read.
        column: any of its columns.
        folders: the folder of each row's file.
    """
    values = table.data.column(column)
    encoded, paths = bytes_and_paths(values)
    if paths is None:
        return table
    wanted = pc.is_valid(paths) if encoded is None else pc.and_(pc.is_valid(paths), pc.is_null(encoded))
    rows = np.flatnonzero(wanted.to_numpy())
    if not len(rows):
        return table
    if not pa.types.is_struct(values.type) and Path(paths[int(rows[0])].as_py()).suffix.lower() not in IMAGE_FILES:
        return table  # a column of other text
    located = [os.path.join(folder, path) if path is not None else None
               for folder, path in zip(folders, paths.to_pylist(), strict=True)]  # fmt: skip
    return replaced(table, column, encoded, pa.chunked_array([pa.array(located, pa.string())]))


def encoded_column(table: datasets.Dataset, column: str) -> datasets.Dataset:
    """The table with the images of a column encoded, as {"bytes", "path"}; a column of arrays does not change."""
    feature = table.features[column]
    if isinstance(feature, datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    encoded, paths = bytes_and_paths(table.data.column(column))
    if (encoded is None and paths is None) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()):
        return table
    return replaced(table, column, encoded, paths)


def bytes_and_paths(values: pa.ChunkedArray) -> tuple[pa.ChunkedArray | None, pa.ChunkedArray | None]:
    """The bytes and the paths in a column; None for what it lacks."""
    kind = values.type
    if pa.types.is_struct(kind):
        parts = [kind.get_field_index(name) for name in ("bytes", "path")]
        encoded, paths = (None if part < 0 else pc.struct_field(values, [part]) for part in parts)
        good = encoded is None or pa.types.is_binary(encoded.type) or pa.types.is_large_binary(encoded.type)
        return (encoded, paths) if good else (None, None)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return values, None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return None, values
    return None, None


def replaced(
    table: datasets.Dataset, column: str, encoded: pa.ChunkedArray | None, paths: pa.ChunkedArray | None
) -> datasets.Dataset:
    """The Arrow table with a column replaced by {"bytes", "path"}; bytes are not copied."""
    table = table.flatten_indices() if table._indices is not None else table
    chunks = []
    lengths = [len(chunk) for chunk in (encoded if encoded is not None else paths).chunks]  # type: ignore[union-attr]
    for start, length in zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True):
        parts = [
            pa.nulls(length, kind) if part is None else part.slice(start, length).combine_chunks().cast(kind)
            for part, kind in ((encoded, pa.binary()), (paths, pa.string()))
        ]
        chunks.append(pa.StructArray.from_arrays(parts, ["bytes", "path"]))
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    fingerprint = Hasher.hash((table._fingerprint, column, "encoded"))
    rest = table.remove_columns(column)
    feature = datasets.Image(decode=False)
    if not rest.column_names:
        features = datasets.Features({column: feature})
        return datasets.Dataset(
            pa.table({column: pa.chunked_array(chunks, kind)}),
            info=datasets.DatasetInfo(features=features),
            fingerprint=fingerprint,
        )
    return rest.add_column(column, pa.chunked_array(chunks, kind), new_fingerprint=fingerprint, feature=feature)


def tar_table(files: Sequence[str], column: str, cache_dir: str | None, left_out: LeftOut) -> datasets.Dataset:
    """The images in tars and the other members of their samples, one column per extension.

    Args:
        files: paths.
        column: extension of the members that are images, or ``image`` for all pictures; also the name of their column.
        cache_dir: where to keep the table.
        left_out: collects what is not used.
    """
    chosen = {}
    extensions: set[str] = set()
    for file in files:
        members = tar_members(file)
        images = chosen[file] = choose_members(file, members, column, left_out)
        names = {name for name, _, _ in images}
        extensions |= {sample_of(name)[1] for name, _, _ in members if name not in names}
    if not any(chosen.values()):
        raise no_images(files, column, left_out)
    kinds: dict[str, Any] = {column: {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
    for extension in sorted(extensions - {column, ""}):
        suffix = f".{extension.rpartition('.')[2]}"
        if suffix in IMAGE_FILES:
            kinds[extension] = dict(kinds[column])
        else:
            kinds[extension] = datasets.Value(
                "int64" if extension in NUMBERS else "string" if extension in TEXTS else "binary"
            )
    stamps = tuple(map(file_stamp, files))
    images_of = json.dumps(chosen, allow_nan=False)
    how = {"files": tuple(files), "stamps": stamps, "column": column, "chosen": images_of, "kinds": tuple(kinds)}
    return datasets.Dataset.from_generator(tar_rows, datasets.Features(kinds), cache_dir=cache_dir, gen_kwargs=how)


def tar_rows(
    files: Sequence[str], stamps: Sequence[str], column: str, chosen: str, kinds: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row per image; the stamps only tell one table from another."""
    images_of: dict[str, list[Member]] = json.loads(chosen)
    for file in files:
        rest: dict[str, dict[str, Member]] = {}
        images = {name for name, _, _ in images_of[file]}
        for member in tar_members(file):
            sample, extension = sample_of(member[0])
            if extension in kinds and member[0] not in images and member[2] >= 0:
                rest.setdefault(sample, {})[extension] = member
        with Path(file).open("rb") as opened:

            def content(member: Member | list[Any], opened: Any = opened) -> bytes:
                opened.seek(member[1])
                return bytes(opened.read(member[2]))

            for image in images_of[file]:
                row: dict[str, Any] = dict.fromkeys(kinds)
                row[column] = {"bytes": content(image), "path": f"{file}, {image[0]}"}
                for extension, member in rest.get(sample_of(image[0])[0], {}).items():
                    row[extension] = member_value(extension, content(member), f"{file}, {member[0]}")
                yield row
