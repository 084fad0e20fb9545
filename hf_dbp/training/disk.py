"""Report a full disk, quota or shared memory in one line."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hf_dbp.errors import UserError

__all__ = ["DiskFull", "SharedMemoryFull", "disk_errors"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_MESSAGES = ("No space left", "File too large", "quota exceeded", "inline_container", "PytorchStreamWriter failed")
SHARED_MEMORY_MESSAGES = ("</torch_", "shared memory(shm)", "out of shared memory", "Bus error")
SHARED_MEMORY_ADVICE = (
    "the workers of the data loader have no room left in shared memory, /dev/shm (by default 64 MiB in a Docker "
    "container; this is not the disk): start the container with --shm-size 8g or --ipc host, or lower "
    "--dataloader_num_workers or --per_device_train_batch_size; repeat the command to resume"
)


class SharedMemoryFull(UserError):
    """The loader's workers have no room in /dev/shm; the message says what to do."""


class DiskFull(OSError, UserError):
    """There is no room for a file of the run; the message says which."""


def from_workers(error: BaseException) -> bool:
    """Whether an error comes from starting the loader's workers, whose locks and queues use shared memory."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).parent.name == "multiprocessing"


@contextmanager
def disk_errors(what: object) -> Iterator[None]:
    """Turn the errors of Python, torch and safetensors on a full disk into `DiskFull`; likewise for shared memory."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in FULL
        full = full or any(text in str(error) for text in FULL_MESSAGES)
        if any(text in str(error) for text in SHARED_MEMORY_MESSAGES) or (full and from_workers(error)):
            raise SharedMemoryFull(SHARED_MEMORY_ADVICE) from error
        if not full:
            raise
        raise DiskFull(
            f"no room on the disk, or in the quota, for {what}; make room and repeat the command: it resumes from its "
            f"last checkpoint"
        ) from error
