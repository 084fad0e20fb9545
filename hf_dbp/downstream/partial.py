"""The unfinished work of `hf-dbp embed`: memory-mapped arrays from which a repeated command resumes.

Features reach the disk before they are marked as done, so a crash at any moment costs a few seconds of work.

Shapes: N images, T patch tokens of an image, D features.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_dbp.downstream.features import pooled
from hf_dbp.errors import UserError
from hf_dbp.records import write_json

__all__ = ["EMBEDDED", "UNREADABLE", "WAITING", "Work", "fits"]

logger = logging.getLogger(__name__)

FLUSHED = 10.0  # seconds between states to resume from
WAITING = 0  # state of a row
EMBEDDED = 1
UNREADABLE = 2


class Work:
    """The unfinished table: memory-mapped features, and which rows are done, in the folder ``FILE.partial``.

    Args:
        file: the future table.
        name: `fingerprint` of the work; work under another name is discarded.
        shape_ND: shape of the features.
        patches: file and shape (N, T, D) of the patch tokens, if they are kept.
    """

    def __init__(
        self, file: Path, name: str, shape_ND: tuple[int, int], patches: tuple[Path, tuple[int, ...]] | None
    ) -> None:
        self.folder = file.with_name(f"{file.name}.partial")
        arrays = [
            (self.folder / "features.npy", np.float32, shape_ND),
            (self.folder / "state.npy", np.uint8, shape_ND[:1]),
        ]
        arrays += [] if patches is None else [(patches[0], np.float16, patches[1])]
        note = self.folder / "work.json"
        there = json.loads(note.read_text(encoding="utf-8"))["fingerprint"] if note.is_file() else None
        if there == name and all(fits(*array) for array in arrays):
            mapped = [np.load(path, mmap_mode="r+") for path, _, _ in arrays]
        else:
            if there is not None:
                logger.warning("%s holds other work, or part of it is gone; starting over", self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            mapped = [new_map(*array) for array in arrays]
        self.features_ND, self.state_N = mapped[0], mapped[1]
        self.patches_NTD = mapped[2] if patches is not None else None
        write_json(note, {"fingerprint": name})
        self.pending: list[tuple[int, int]] = []
        self.flushed = time.monotonic()

    def add(self, rows: Sequence[int], readable: Sequence[bool], tokens_BTD: Tensor | None, pooling: str) -> None:
        there = [row for row, known in zip(rows, readable, strict=True) if known]
        if tokens_BTD is not None:
            self.features_ND[there] = pooled(tokens_BTD, pooling).float().cpu().numpy()
            if self.patches_NTD is not None:
                self.patches_NTD[there] = tokens_BTD[:, 1:].to(torch.float16).cpu().numpy()
        self.pending += [(row, EMBEDDED if known else UNREADABLE) for row, known in zip(rows, readable, strict=True)]
        if time.monotonic() - self.flushed > FLUSHED:
            self.flush()

    def flush(self) -> None:
        """Flush the features to the disk, then mark them as done."""
        for array in (self.features_ND, self.patches_NTD):
            if array is not None:
                array.flush()
        for row, state in self.pending:
            self.state_N[row] = state
        self.state_N.flush()
        self.pending, self.flushed = [], time.monotonic()


def fits(path: Path, dtype: Any, shape: tuple[int, ...]) -> bool:
    """Whether the file of unfinished features holds an array of that type and shape."""
    if not path.is_file():
        return False
    there = np.load(path, mmap_mode="r")
    return bool(there.shape == shape and there.dtype == dtype)


def new_map(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Create a memory-mapped array of zeros for features. UserError if the disk has no room for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = int(np.prod(shape)) * np.dtype(dtype).itemsize, shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path} takes {needed / 1e9:.1f} GB but only {free / 1e9:.1f} GB are free; choose another place"
        )
    return np.lib.format.open_memmap(path, "w+", dtype, shape)
