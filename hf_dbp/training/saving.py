"""Atomic checkpoints: how they are written, checked, kept and found again.

A checkpoint is written into `.unfinished` in the run's folder, flushed to the disk, listed with the sizes of its files
in its `checkpoint.json`, and only then renamed to `checkpoint-N`; older ones are deleted after that. So a folder with
that name is always complete, for stock tools too, and an interrupted save does not touch earlier ones.

A checkpoint can still be incomplete after an interrupted deletion or copy, or if another program wrote it:
- with a `checkpoint.json`, every listed file must be there with its size;
- without one (from a stock Trainer or an older version), every file needed to resume must be there and complete as far
  as its format tells: JSON parses, safetensors cover their file, archives have their end.
An incomplete checkpoint is skipped and left in place.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_dbp.records import write_json

__all__ = [
    "UNFINISHED",
    "checkpoint_step",
    "clear",
    "fault",
    "last_checkpoint",
    "move_files",
    "publish",
    "rotate",
    "whole_checkpoints",
]

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
LISTING = "checkpoint.json"
JSON_FILES, ARCHIVES = ("config.json", "trainer_state.json"), ("optimizer.pt", "scheduler.pt")

# ---- finding checkpoints ----


def checkpoint_step(folder: Path) -> int | None:
    """N of `checkpoint-N`; None for any other name."""
    number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number != folder.name and number.isdecimal() else None


def fault(folder: Path) -> str | None:
    """Why a checkpoint is incomplete, by the rules above; None if it is complete."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / LISTING).is_file():
        return _fault_of_unlisted(folder)
    try:
        sizes: dict[str, int] = json.loads((folder / LISTING).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return f"{LISTING} is not readable"
    for name, size in sizes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} of {size} bytes"
    return None


def _fault_of_unlisted(folder: Path) -> str | None:
    weights, states = sorted(folder.glob("*.safetensors")), sorted(folder.glob("rng_state*.pth"))
    for name, found in (("weights (*.safetensors)", weights), ("rng_state.pth", states)):
        if not found:
            return f"{name} is missing"
    for path in (*(folder / name for name in (*JSON_FILES, *ARCHIVES)), *weights, *states):
        if not path.is_file():
            return f"{path.name} is missing"
        if not _whole_file(path):
            return f"{path.name} is cut off"
    return None


def _whole_file(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        else:
            return zipfile.is_zipfile(path)
    except (ValueError, SafetensorError):
        return False
    return True


def checkpoints(run: Path) -> dict[int, Path]:
    """Everything in a run's folder with the name of a checkpoint, by step."""
    found = {checkpoint_step(folder): folder for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir()}
    return dict(sorted((step, folder) for step, folder in found.items() if step is not None))


def whole_checkpoints(run: Path) -> dict[int, Path]:
    """The complete checkpoints in a run's folder, by step."""
    return {step: folder for step, folder in checkpoints(run).items() if fault(folder) is None}


def last_checkpoint(run: str | os.PathLike[str]) -> str | None:
    """The complete checkpoint with the highest step in a run's folder, to resume from; None if there is none."""
    for folder in reversed(checkpoints(Path(run)).values()):
        problem = fault(folder)
        if problem is None:
            return str(folder)
        logger.warning("%s is skipped: %s", folder, problem)
    return None


# ---- writing and deleting ----


def clear(folder: Path) -> None:
    """Remove a checkpoint's folder with its content, if it exists."""
    if folder.is_dir():
        shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Flush a checkpoint's file or folder to the disk."""
    if path.is_file():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    elif os.name == "posix":  # other systems cannot open a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(written: Path, target: Path) -> None:
    """Flush a completely written checkpoint to the disk, then give it its name in one step."""
    paths = sorted(written.rglob("*"))
    write_json(
        written / LISTING,
        {"files": {path.relative_to(written).as_posix(): path.stat().st_size for path in paths if path.is_file()}},
    )
    for path in (*paths, written):
        sync(path)
    if target.exists():  # from an earlier attempt at the same step
        discard(target)
    written.replace(target)
    sync(target.parent)


def move_files(written: Path, target: Path) -> None:
    """Move the files of a saved model to ``target``, each in one step, and remove the weights of an earlier model
    there.

    ``config.json``, which identifies a model, is removed first and written last, so a mixture of two models has none.
    """
    target.mkdir(parents=True, exist_ok=True)
    new = sorted(written.iterdir(), key=lambda path: path.name == "config.json")
    (target / "config.json").unlink(missing_ok=True)
    for old in {*target.glob("model*.safetensors"), *target.glob("model*.safetensors.index*.json")}:
        if not (written / old.name).exists():
            old.unlink()
    for path in new:
        sync(path)
        path.replace(target / path.name)
    sync(target)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; under its name it is either complete or gone."""
    bin_folder = checkpoint.parent / UNFINISHED / f"deleted-{checkpoint.name}"
    clear(bin_folder)
    bin_folder.parent.mkdir(exist_ok=True)
    checkpoint.replace(bin_folder)
    shutil.rmtree(bin_folder, ignore_errors=True)


def rotate(run: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Delete the complete checkpoints with the lowest steps beyond ``limit``, except those to ``keep``."""
    if not limit or limit < 0:
        return
    whole = [*whole_checkpoints(run).values()]  # by step, because file times do not survive a copy
    surplus = max(len(whole) - max(limit, len(keep)), 0)
    for old in [folder for folder in whole if folder not in keep][:surplus]:
        discard(old)
