"""One writer at a time: the same command started twice must not write two runs into one folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hf_dbp.errors import UserError

__all__ = ["one_writer"]

logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds; the loader workers of a killed run notice within five, and hold its lock until then


@contextmanager
def one_writer(target: Path) -> Iterator[None]:
    """Hold a folder, or a file that is being made, against other processes; one that is killed lets go of it.

    Args:
        target: a folder, locked by `.lock` in it; or a file, by `.NAME.lock` beside it.

    Raises:
        UserError: another process holds it.
    """
    lock = FileLock(target / ".lock" if target.is_dir() else target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(
            f"{target}: another process is writing there; wait until it ends, stop it, or give another place"
        ) from None
    except NotImplementedError:
        logger.warning("%s is on a file system without locks: see to it that no other process writes there", target)
    try:
        yield
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
