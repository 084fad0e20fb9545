"""When the command began, and durations as people write them. Its import loads only the standard library."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hf_dbp.errors import UserError

__all__ = ["command_began", "noted_beginning", "parse_duration", "process_began"]

_BEGAN: list[float] = []


def process_began() -> float:
    """When this process began, from `time.monotonic`, to about a second: before Python itself started, which takes
    seconds on a busy machine."""
    import psutil

    ago = time.time() - float(psutil.Process().create_time())
    return time.monotonic() - max(0.0, ago)


@contextmanager
def noted_beginning(began: float | None = None) -> Iterator[None]:
    """Record that a command began then, from `time.monotonic`, or begins now, before its imports."""
    _BEGAN.append(time.monotonic() if began is None else began)
    try:
        yield
    finally:
        _BEGAN.pop()


def command_began() -> float:
    """When the current command began, from `time.monotonic`; now, if that was not recorded."""
    return _BEGAN[-1] if _BEGAN else time.monotonic()


def parse_duration(text: str) -> float:
    """The seconds in ``2h``, ``30m``, ``90s``, ``1h30m``, ``1.5h`` or a plain number of seconds.

    Raises:
        UserError: it is none of these, or zero.
    """
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s?)?", text.strip().lower())
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if seconds <= 0:
        raise UserError(f"--budget {text!r}: give a time such as 2h, 30m, 90s or 1h30m")
    return seconds
