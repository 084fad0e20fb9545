"""Which images a run uses: a share chosen by content, and a validation split if the data has none.

The key of an image is the hash of its encoded bytes. It is the same for downloaded and streamed data sets, in every
process and worker, and however files are named, sorted or sharded. A copy of an image has the key of its original and
is chosen with it. Image i is chosen if

    h(seed, key_i) < fraction,        h uniform in [0, 1)

so the count is binomial (10 % of ImageNet's 1,281,167: 128,117 +- 340) and a smaller fraction with the same seed is
part of a larger one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_dbp.data.decoding import encoded_bytes
from hf_dbp.errors import UserError

__all__ = ["Keys", "chosen", "content_key", "content_keys", "draw", "keys_digest", "readable_bytes", "split_rows"]

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64]


def content_key(encoded: bytes) -> int:
    """64-bit hash of an encoded image."""
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def chosen(keys: Keys, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which images belong to the subset: a function of each image's key alone."""
    salt = seed.to_bytes(16, "little", signed=True)
    hashes = (hashlib.blake2b(int(key).to_bytes(8, "little"), digest_size=8, salt=salt).digest() for key in keys)
    numbers = np.frombuffer(b"".join(hashes), dtype="<u8")
    return numbers.astype(np.float64) < fraction * 2.0**64 if fraction < 1 else np.ones(len(keys), np.bool_)


def keys_digest(keys: Iterable[int]) -> str:
    """A short name for a set of images in any order: equal digests mean equal images."""
    ordered = np.sort(np.fromiter(keys, dtype="<u8"))
    return hashlib.blake2b(ordered.tobytes(), digest_size=8).hexdigest()


def split_rows(count: int, share: float, seed: int) -> tuple[Rows, Rows]:
    """Training and validation rows of ``count`` images, with the share ``share`` for validation, both in order.

    Raises:
        UserError: there are too few images for both.
    """
    num_validation = max(1, round(count * share))
    if count - num_validation < 1:
        raise UserError(f"{count} images are too few to hold out {share:.0%} of them for validation")
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def draw(rows: Rows, limit: int | None, seed: int) -> Rows:
    """At most ``limit`` of the images' rows, drawn at random but kept in order."""
    if limit is None or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))


def content_keys(data: Any, column: str) -> Keys:
    """Keys of all images of a `datasets.Dataset`, read once; `datasets` caches them beside the data."""
    mapped = data.map(
        _batch_keys,
        batched=True,
        batch_size=64,
        fn_kwargs={"column": column},
        remove_columns=data.column_names,
        desc="Keys of the images",
    )
    return np.asarray(mapped.with_format("numpy")["key"][:], dtype=np.uint64)


def _batch_keys(batch: dict[str, list[Any]], column: str) -> dict[str, list[np.uint64]]:
    return {"key": [np.uint64(content_key(readable_bytes(value))) for value in batch[column]]}


def readable_bytes(value: Any) -> bytes:
    """The encoded image; empty if its file cannot be read, which is counted when the image is decoded."""
    try:
        return encoded_bytes(value)
    except OSError:
        return b""
