"""When the command began, and durations as people write them. Nothing but the standard library is imported here."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hf_dbp.errors import UserError

__all__ = ["command_began", "noted_beginning", "parse_duration"]

_BEGAN: list[float] = []


@contextmanager
def noted_beginning() -> Iterator[None]:
    """Note that a command begins now, before what it needs is imported."""
    _BEGAN.append(time.monotonic())
    try:
        yield
    finally:
        _BEGAN.pop()


def command_began() -> float:
    """When the command that runs began, by `time.monotonic`; now, if nobody noted it."""
    return _BEGAN[-1] if _BEGAN else time.monotonic()


def parse_duration(text: str) -> float:
    """Seconds of ``2h``, ``30m``, ``90s``, ``1h30m``, ``1.5h`` or a bare number of seconds.

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
