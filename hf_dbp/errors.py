"""A user's mistake ends in one line; a bug of ours ends in its traceback.

We raise `UserError` on purpose, for flags, data, checkpoints and settings that cannot work. `command` wraps the main of
every command. Three kinds of error end with one line on stderr and exit status 2:

- `UserError`;
- a file system error that concerns one of the user's files and is listed in `REMEDIES`: no permission, read-only ...;
- a package that a flag needs and that is not installed (W&B, MLflow, bitsandbytes ...), as reported by the library that
  needs it.

Any other exception keeps its traceback and says where to report it. ``--log_level debug``, or the environment variable
HF_DBP_DEBUG=1 for commands without that flag, shows the traceback of a user's mistake above its line.

Ctrl-C ends a command in one line too, with exit status 130; from Python it stays a KeyboardInterrupt.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

__all__ = ["UserError", "command", "message_of"]

P = ParamSpec("P")
T = TypeVar("T")

PACKAGE = Path(__file__).resolve().parent
REPORT = "This is a bug in hf_dbp, not a mistake of yours. Please report it with this traceback and the command."
WRITABLE = "choose a place that you may write to, or change its permissions"
PLACE = "check the path"
ROOM = "make room, or choose another place"
#: file system errors that a user can put right, and how
REMEDIES = {
    errno.EACCES: WRITABLE, errno.EPERM: WRITABLE, errno.EROFS: WRITABLE,
    errno.ENOENT: PLACE, errno.ENOTDIR: PLACE, errno.EISDIR: PLACE, errno.EEXIST: PLACE, errno.ENAMETOOLONG: PLACE,
    errno.ENOSPC: ROOM, errno.EDQUOT: ROOM, errno.EFBIG: ROOM,
}  # fmt: skip


class UserError(ValueError):
    """A mistake that the user can correct; the message names the value and what to do."""


def message_of(error: BaseException) -> str:
    """The error's message, without the traceback that a loader worker wraps around it."""
    text = str(error).strip()
    return re.split(r"\n[\w.]*Error: ", text)[-1] if text.startswith("Caught ") else text


def raised_by_us(error: BaseException) -> bool:
    """Whether a line of this package raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(PACKAGE)


def mistake(error: BaseException) -> str | None:
    """The line that tells users how to correct this error; None if it is not their mistake."""
    if isinstance(error, UserError):
        return message_of(error)
    if isinstance(error, OSError):
        file = error.filename
        theirs = isinstance(file, str | os.PathLike) and not Path(file).resolve().is_relative_to(PACKAGE)
        if theirs and error.errno in REMEDIES:
            return f"{file}: {str(error.strerror).lower()}; {REMEDIES[error.errno]}"
        return None
    if isinstance(error, ImportError | RuntimeError) and not raised_by_us(error):
        return missing_package(error)
    return None


def missing_package(error: ImportError | RuntimeError) -> str | None:
    """The line about a package that a library reports as missing; None for any other error."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        name = error.name.partition(".")[0]
        return None if name == "hf_dbp" else f"these flags need the package {name}: pip install {name}"
    text = " ".join(str(error).split())
    return f"these flags need a package that is not installed: {text}" if re.search(r"\bpip install\b", text) else None


def debugging(arguments: Sequence[str]) -> bool:
    """Whether the user asked for tracebacks of mistakes."""
    pairs = itertools.pairwise(arguments)
    asked = ("--log_level", "debug") in pairs or "--log_level=debug" in arguments
    return asked or os.environ.get("HF_DBP_DEBUG", "0") not in ("", "0")


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Decorate the main of a command: a user's mistake ends with one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return main(*args, **kwargs)
        except Exception as error:
            line = mistake(error)
            if line is None:
                if REPORT not in getattr(error, "__notes__", ()):
                    error.add_note(REPORT)
                raise
            given = args[0] if args and isinstance(args[0], Sequence) else sys.argv
            if debugging([str(one) for one in given]):
                traceback.print_exception(error)
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(2) from error
        except KeyboardInterrupt:
            if args or kwargs or debugging(sys.argv):  # called from Python
                raise
            print("stopped by SIGINT", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None

    return wrapped
