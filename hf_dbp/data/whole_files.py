"""Files that appear complete or not at all: written under another name, then renamed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["clear_parts", "whole_file"]

PART = ".part"


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``file`` when the block ends; an error leaves the old file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}{PART}")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def clear_parts(folder: Path) -> None:
    """Remove the partial files of killed processes anywhere below the folder."""
    for file in folder.rglob(f".*{PART}"):
        file.unlink()
