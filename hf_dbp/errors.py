"""What a user can mend ends in one line; a bug of ours ends in its traceback.

`UserError` is raised where we mean it: flags, data, checkpoints and settings that cannot be. `command` wraps the main
of every command: it catches `UserError` and the few foreign errors named in `MENDABLE`, prints one line on stderr and
exits with status 2; anything else passes through with its traceback and says where to report it. ``--log_level debug``,
or the environment variable HF_DBP_DEBUG=1 for commands without that flag, shows the traceback of a user's mistake too.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["UserError", "command", "message_of"]

P = ParamSpec("P")
T = TypeVar("T")

REPORT = "This is a bug in hf_dbp, not a mistake of yours. Please report it with this traceback and the command."
#: errors of the file system that a user mends: no permission, read-only, no such place, no room
MENDABLE = frozenset({
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST,
    errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
})  # fmt: skip


class UserError(ValueError):
    """A mistake that the user can mend; the message names the value and what to do."""


def message_of(error: BaseException) -> str:
    """The error in one piece: what a loader worker wraps in its traceback is taken out of it."""
    text = str(error).strip()
    return re.split(r"\n[\w.]*Error: ", text)[-1] if text.startswith("Caught ") else text


def mendable(error: BaseException) -> bool:
    """Whether a user can mend it."""
    named = isinstance(error, OSError) and error.errno in MENDABLE and error.filename is not None
    return named or isinstance(error, UserError)


def debugging() -> bool:
    """Whether tracebacks of user mistakes are asked for."""
    pairs = zip(sys.argv, sys.argv[1:], strict=False)
    return os.environ.get("HF_DBP_DEBUG", "0") not in ("", "0") or ("--log_level", "debug") in pairs


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Decorate the main of a command: a user's mistake ends with one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return main(*args, **kwargs)
        except Exception as error:
            if mendable(error):
                if debugging():
                    raise
                print(f"error: {message_of(error)}", file=sys.stderr)
                raise SystemExit(2) from error
            if REPORT not in getattr(error, "__notes__", ()):
                error.add_note(REPORT)
            raise

    return wrapped
