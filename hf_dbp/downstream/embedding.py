"""Features of many images in a table: the main of `hf-dbp embed`.

1. Every image's largest central square, scaled to the ViT's size, goes once through the frozen ViT. Its feature is the
   mean of the final patch tokens, or the class token; all patch tokens can be kept too.
2. Features go to a memory-mapped file beside the table as they are computed, so memory does not grow with the number of
   images, and a stopped run resumes where it was. At the end they become one parquet file.
3. `hf_dbp.downstream.neighbours` compares them with one another and finds near-duplicates and outliers.

Columns of the table: row (in the data), name, feature (D; null if the image cannot be read), duplicate_of (a name, or
null), outlier_score, error. The schema's metadata say, as JSON under ``hf_dbp``, what was embedded and how fast.

Shapes: N images, T patch tokens of an image, D features.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from hf_dbp.data.decoding import decode
from hf_dbp.data.images import ImageList, images_digest
from hf_dbp.data.one_split import image_name, image_source, open_images, split_flags
from hf_dbp.data.wire_bonding import WireBonding
from hf_dbp.downstream.features import (
    FrozenEncoder,
    load_encoder,
    pooled,
    token_batches,
)
from hf_dbp.downstream.neighbours import centred, near_duplicates, nearest, outlier_scores
from hf_dbp.downstream.partial import EMBEDDED, UNREADABLE, WAITING, Work, fits
from hf_dbp.errors import UserError, command
from hf_dbp.locking import one_writer
from hf_dbp.records import versions

__all__ = ["Embeddings", "embed_images", "main", "nearest_of_queries", "read_embeddings"]

logger = logging.getLogger(__name__)

BLOCK = 1024  # rows written at a time
COMPARED = 200_000  # images; with more, comparing all pairs takes hours


def fingerprint(encoder: FrozenEncoder, images: ImageList, how: dict[str, Any]) -> str:
    """A name for these images, this model and these settings; an embedding under another name is not resumed."""
    about = [how, encoder.size, list(encoder.mean), list(encoder.std)]
    digest = hashlib.blake2b(json.dumps(about, allow_nan=False).encode())
    for name, tensor in sorted(encoder.vit.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if isinstance(images.samples, WireBonding):
        digest.update(images.samples[0]["image"].tobytes() + str(len(images)).encode())
    else:  # all files, by size and time; some of the pictures inside data sets, by their bytes
        value = images.samples[0][images.column]
        files = isinstance(value, dict) and value["bytes"] is None
        picks = range(len(images)) if files else np.linspace(0, len(images) - 1, min(500, len(images))).astype(int)
        digest.update(images_digest(images, [int(pick) for pick in picks]).encode())
    return digest.hexdigest()[:32]


def embed_images(
    encoder: FrozenEncoder,
    images: ImageList,
    file: str | os.PathLike[str],
    *,
    pooling: str = "mean",
    patch_file: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    workers: int = 0,
    threshold: float = 0.98,
    neighbours: int = 5,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Embed every image and write the table; the work of an earlier call is reused.

    Args:
        encoder: from `load_encoder`.
        images: from `open_images`.
        file: parquet file to write.
        pooling: ``mean`` of the patch tokens, or ``cls``.
        patch_file: ``.npy`` file for all patch tokens (N, T, D), float16; ``numpy.load(..., mmap_mode="r")`` reads it.
        batch_size: images per forward pass.
        workers: processes that decode.
        threshold: cosine of centred features from which an image is a near-duplicate.
        neighbours: k of the outlier score.
        data: description of the images for the metadata, from which `hf-dbp select` reopens them.

    Returns:
        The metadata: images, unreadable, near_duplicates, images_per_second (for those embedded now) ...

    Raises:
        UserError: too many unreadable images, no readable image, no room on the disk, or another process writes the
            table.
    """
    path, patch_size = Path(file), encoder.vit.config.patch_size
    sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    tokens, width = (encoder.size[0] // sides[0]) * (encoder.size[1] // sides[1]), encoder.vit.config.hidden_size
    how = {"pooling": pooling, "patches": patch_file is not None and str(patch_file), "version": 1}
    name = fingerprint(encoder, images, how)
    analysis = {"threshold": threshold, "neighbours": neighbours}
    patches = None if patch_file is None else (Path(patch_file), (len(images), tokens, width))

    def finished() -> dict[str, Any]:
        known = described(path)
        whole = known.get("fingerprint") == name and (patches is None or fits(patches[0], np.float16, patches[1]))
        return known if whole else {}

    if (known := finished()).get("analysis") == analysis:
        return known | {"embedded_now": 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_writer(path):
        if known := finished():
            return compare_again(path, known | {"analysis": analysis}) | {"embedded_now": 0}
        work = Work(path, name, (len(images), width), patches)
        now, seconds = embed_rest(encoder, images, work, pooling, batch_size, workers)
        record = {
            "schema": 1, "task": "embedding", "fingerprint": name, "model": encoder.name, "data": data or {}, **how,
            "image_size": list(encoder.size), "image_mean": list(encoder.mean), "image_std": list(encoder.std),
            "analysis": analysis, "images": len(images), "unreadable": int((work.state_N == UNREADABLE).sum()),
            "embedded_now": now, "seconds": round(seconds, 3),
            "images_per_second": round(now / seconds, 2) if now else None, "versions": versions(),
        }  # fmt: skip
        record = write_table(path, work, images, record)
        shutil.rmtree(work.folder)
    return record


def embed_rest(
    encoder: FrozenEncoder, images: ImageList, work: Work, pooling: str, batch_size: int, workers: int
) -> tuple[int, float]:
    """Embed the images that are not done; return how many these were, and the seconds. UserError if no image can be
    read."""
    images.unreadable.flags |= torch.from_numpy(work.state_N == UNREADABLE)
    rows = np.flatnonzero(work.state_N == WAITING)
    began = time.monotonic()
    waiting = torch.utils.data.Subset(encoder.squares(images), rows.tolist())
    with tqdm(total=len(images), initial=len(images) - len(rows), desc="Images", leave=False) as progress:
        at = 0
        for batch, readable in token_batches(encoder.vit, waiting, batch_size, workers):
            work.add(rows[at : at + len(readable)].tolist(), readable, batch, pooling)
            at += len(readable)
            progress.update(len(readable))
    work.flush()
    if not (work.state_N == EMBEDDED).any():
        raise UserError(f"none of the {len(images)} images can be read")
    return len(rows), time.monotonic() - began


def compare(features_ND: Tensor, names: Sequence[str], record: dict[str, Any]) -> tuple[pa.Array, pa.Array]:
    """The columns ``duplicate_of`` and ``outlier_score`` of a table of features; adds the number of duplicates to the
    record."""
    record["compared"] = len(names) <= COMPARED
    if not record["compared"]:
        logger.warning("%d images are more than %d: they are not compared with one another", len(names), COMPARED)
        record["near_duplicates"] = None
        return pa.nulls(len(names), pa.string()), pa.nulls(len(names), pa.float32())
    features_ND = centred(features_ND)
    first = near_duplicates(features_ND, record["analysis"]["threshold"])
    record["near_duplicates"] = int((first != np.arange(len(first))).sum())
    leaders = [names[leader] if leader != row else None for row, leader in enumerate(first)]
    return pa.array(leaders, pa.string()), pa.array(outlier_scores(features_ND, record["analysis"]["neighbours"]))


def schema_of(width: int, record: dict[str, Any]) -> pa.Schema:
    columns = [
        ("row", pa.int64()), ("name", pa.string()), ("feature", pa.list_(pa.float32(), width)),
        ("duplicate_of", pa.string()), ("outlier_score", pa.float32()), ("error", pa.string()),
    ]  # fmt: skip
    return pa.schema(columns, metadata={"hf_dbp": json.dumps(record, allow_nan=False)})


def write_table(path: Path, work: Work, images: ImageList, record: dict[str, Any]) -> dict[str, Any]:
    """Compare the features and write all rows, a block at a time; the file gets its final name at the end."""
    names = [image_name(images, row) for row in range(len(images))]
    there, width = work.state_N == EMBEDDED, work.features_ND.shape[1]
    duplicate_of, score = compare(
        torch.from_numpy(work.features_ND[there]), [names[row] for row in np.flatnonzero(there)], record
    )
    place = pa.array(
        np.where(there, np.cumsum(there) - 1, 0), mask=~there
    )  # position of each row among the readable ones
    reasons = images.unreadable_images()
    errors = [None if known else reasons.get(name) for name, known in zip(names, there, strict=True)]
    schema = schema_of(width, record)
    with pq.ParquetWriter(work.folder / "table.parquet", schema) as writer:
        for start in range(0, len(images), BLOCK):
            part = slice(start, start + BLOCK)
            flat = pa.array(np.asarray(work.features_ND[part]).reshape(-1))
            columns = [
                pa.array(np.arange(len(images))[part]),
                pa.array(names[part]),
                pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(~there[part])),
                duplicate_of.take(place[part]),
                score.take(place[part]),
                pa.array(errors[part], pa.string()),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    os.replace(work.folder / "table.parquet", path)
    return record


def compare_again(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Rewrite the table with another threshold or k, without embedding anything again."""
    table, known = pq.read_table(path), read_embeddings(path)
    duplicate_of, score = compare(known.features_ND, known.names, record)
    there = table["feature"].is_valid().to_numpy()
    place = pa.array(np.where(there, np.cumsum(there) - 1, 0), mask=~there)
    columns = [
        table["row"],
        table["name"],
        table["feature"],
        duplicate_of.take(place),
        score.take(place),
        table["error"],
    ]
    aside = path.with_name(f"{path.name}.new")
    pq.write_table(pa.table(columns, schema=schema_of(known.features_ND.shape[1], record)), aside, row_group_size=BLOCK)
    os.replace(aside, path)
    return record


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The readable images of a table.

    Attributes:
        rows: their rows in the data (N).
        names: their names (N).
        features_ND: float32.
        duplicate_of: for each, the name of the image that it nearly duplicates, or None.
        outlier_scores: 1 - cosine to the k-th nearest neighbour (N); NaN if pairs were not compared.
        record: what was embedded and how.
    """

    rows: NDArray[np.int64]
    names: list[str]
    features_ND: Tensor
    duplicate_of: list[str | None]
    outlier_scores: NDArray[np.float32]
    record: dict[str, Any]


def described(path: Path) -> dict[str, Any]:
    """The record in a table of features; empty if the file does not exist.

    UserError for a file that `hf-dbp embed` did not write.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads((pq.read_schema(path).metadata or {})[b"hf_dbp"])
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a table of `hf-dbp embed`; give another file") from error
    return dict(content)


def read_embeddings(file: str | os.PathLike[str]) -> Embeddings:
    """Read a table of `hf-dbp embed`.

    Raises:
        UserError: there is none, or it is something else.
    """
    path = Path(file)
    record = described(path)
    if not record:
        raise UserError(f"{path}: there is no such table; write it with hf-dbp embed VIT IMAGES -o {path}")
    table = pq.read_table(path, memory_map=True)
    table = table.filter(table["feature"].is_valid())
    width = table.schema.field("feature").type.list_size
    flat = table["feature"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return Embeddings(
        table["row"].to_numpy(), table["name"].to_pylist(), torch.from_numpy(np.array(flat).reshape(-1, width)),
        table["duplicate_of"].to_pylist(), table["outlier_score"].to_numpy().astype(np.float32), record,
    )  # fmt: skip


def nearest_of_queries(
    encoder: FrozenEncoder, files: Sequence[str], table: Embeddings, k: int
) -> list[list[tuple[float, str]]]:
    """For each picture file, the k most similar images of the table, with their cosines."""
    none = ImageList([], "image", encoder.vit.config.num_channels)
    none.value_range = encoder.value_range
    squares = encoder.squares(none)
    views = [
        squares.view(decode({"bytes": None, "path": file}, encoder.vit.config.num_channels, file)) for file in files
    ]
    features = []
    with torch.no_grad():
        for view in views:
            features.append(
                pooled(encoder.vit(view[None].to(encoder.vit.device)).last_hidden_state, table.record["pooling"])
            )
    mean_D = table.features_ND.mean(dim=0)
    found = nearest(centred(table.features_ND, mean_D), centred(torch.cat(features).float().cpu(), mean_D), k)
    return [
        [(float(s), table.names[int(row)]) for s, row in zip(similarities, rows, strict=True)]
        for similarities, rows in zip(*found, strict=True)
    ]


@command
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, embed and report. A user's mistake ends with one line on stderr and exit status 2."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    transformers.utils.logging.set_verbosity_warning()
    parser = argparse.ArgumentParser(
        prog="hf-dbp embed", description="Write the features of images as a parquet table.", parents=split_flags()
    )
    parser.add_argument("model", help="Stock ViT, folder or Hub id.")
    parser.add_argument("images", help="Folder of images or parquet files, a Hub id, or wire_bonding.")
    parser.add_argument("-o", "--output_file", required=True, help="Parquet file to write.")
    parser.add_argument(
        "--patch_features", help="Also keep all patch tokens (float16) in this memory-mapped .npy file."
    )
    parser.add_argument("--pooling", choices=["mean", "cls"], default="mean", help="Mean of the patch tokens, or cls.")
    parser.add_argument("--query", nargs="+", default=[], help="Picture files: print the images most similar to each.")
    parser.add_argument("--nearest", type=int, default=5, help="How many to print, and k of the outlier score.")
    parser.add_argument("--threshold", type=float, default=0.98, help="Cosine from which images are near-duplicates.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images per forward pass.")
    parser.add_argument("--workers", type=int, default=0, help="Processes that decode images.")
    args = parser.parse_args(arguments)
    if args.nearest < 1 or args.batch_size < 1:
        raise UserError(f"--nearest and --batch_size are at least 1, got {args.nearest} and {args.batch_size}")
    if not -1 <= args.threshold <= 1:
        raise UserError(f"--threshold is a cosine, from -1 to 1, got {args.threshold}")
    source = image_source(args)
    images = open_images(source, args.split)
    encoder = load_encoder(args.model, images, cache_dir=args.cache_dir, token=args.token)
    kept = {name: value for name, value in dataclasses.asdict(source).items() if name != "token"}
    record = embed_images(
        encoder, images, args.output_file, pooling=args.pooling, patch_file=args.patch_features,
        batch_size=args.batch_size, workers=args.workers, threshold=args.threshold, neighbours=args.nearest,
        data={"source": kept, "split": args.split},
    )  # fmt: skip
    table = read_embeddings(args.output_file)
    print("\n".join(report(args.output_file, table, record)))
    if args.query:
        for file, found in zip(args.query, nearest_of_queries(encoder, args.query, table, args.nearest), strict=True):
            print(f"nearest to {file}\n" + "\n".join(f"  {cosine:7.4f}  {name}" for cosine, name in found))
    return record


def report(file: str, table: Embeddings, record: dict[str, Any]) -> list[str]:
    """Lines that describe a table of features."""
    speed = f"{record['images_per_second']} images/s" if record["embedded_now"] else "they were already there"
    lines = [f"images      {record['images']}, {record['embedded_now']} embedded now: {speed}"]
    if record["unreadable"]:
        lines.append(f"unreadable  {record['unreadable']}, left out; the column `error` says why")
    if record["compared"]:
        pairs = [(name, first) for name, first in zip(table.names, table.duplicate_of, strict=True) if first]
        example = f", e.g. {pairs[0][0]} of {pairs[0][1]}" if pairs else ""
        lines.append(f"copies      {len(pairs)} near-duplicates (column `duplicate_of`){example}")
        order = np.argsort(-table.outlier_scores)[:5]
        lines.append("outliers    farthest from their neighbours (column `outlier_score`):")
        lines += [f"            {table.outlier_scores[row]:.3f}  {table.names[row]}" for row in order]
    lines += [f"written     {file}", f"next        hf-dbp select {shlex.quote(file)} --budget 40"]
    return lines


if __name__ == "__main__":
    main()
