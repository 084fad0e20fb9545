"""One writer at a time: the same command started twice must not write two runs into one folder."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from hf_dbp.errors import UserError

__all__ = ["one_writer"]

logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds; the loader workers of a killed run notice within five, and hold its lock until then
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems without locks say, besides ENOSYS


@contextmanager
def one_writer(target: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder or a file; the lock of a process that is killed ends with it.

    A thread that has the lock may take it again. On a file system without locks, a warning takes the lock's place.

    Args:
        target: a folder, locked by `.lock` in it; or a file, by `.NAME.lock` beside it.

    Raises:
        UserError: another process holds the lock.
    """
    path = target / ".lock" if target.is_dir() else target.with_name(f".{target.name}.lock")
    lock = FileLock(path, is_singleton=True)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(
            f"{target}: another process is writing there; wait until it ends, stop it, or give another place"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    if isinstance(lock, SoftFileLock):  # on ENOSYS; its file would outlive a process killed on another host
        lock.release()
    if not lock.is_locked:
        logger.warning("%s is on a file system without locks: see to it that no other process writes there", target)
    try:
        yield
    finally:
        if lock.lock_counter <= 1:
            path.unlink(missing_ok=True)
        lock.release()
