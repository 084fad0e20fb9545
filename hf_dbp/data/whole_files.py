"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["clear_parts", "whole_file"]

PART = ".part"


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Where to write ``file``: it takes its place as the block ends; an error leaves what was there before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}{PART}")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def clear_parts(folder: Path) -> None:
    """Remove what a process that was killed had begun to write anywhere below the folder."""
    for file in folder.rglob(f".*{PART}"):
        file.unlink()
