"""Errors of the Hub, in reading a data set or pushing a model, as one line that says what to do.

The Hub client itself retries broken connections, timeouts, 429 and 5xx with growing pauses; errors that arrive here are
final.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import pyarrow as pa
from huggingface_hub import HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # from the HTTP library that the client uses, which has changed
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_dbp.errors import UserError

__all__ = ["LOGIN", "explained", "explained_push"]

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
AGAIN = "run the same command again: the cache is kept, and training resumes from its last checkpoint"


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn the errors of the Hub client, `datasets` and files into a UserError about ``name``, a data set or a file."""
    try:
        yield
    except (OSError, RuntimeError, HTTPError, pa.ArrowInvalid, datasets.exceptions.DatasetsError) as error:
        # RuntimeError: `datasets` refuses a loading script
        raise UserError(_message(name, error)) from error


def _message(name: str, error: BaseException) -> str:
    where, name = name, name.removeprefix("hf://datasets/").partition("@")[0]
    page = f"{HfApi().endpoint}/datasets/{name}"
    causes = _chain(error)
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            if cause.response.status_code == 401:
                return (
                    f"data set {name} is gated: log in with `hf auth login` (or pass --token), and accept its "
                    f"conditions at {page}"
                )
            return f"data set {name} is gated and this account has no access yet: accept its conditions at {page}"
        if isinstance(cause, RevisionNotFoundError):
            return f"data set {name} has no such revision; see {page}/tree/main"
        if isinstance(cause, RepositoryNotFoundError):
            return (
                f"no data set {name} on the Hub, or a private one: check the name at {page}, and log in with "
                "`hf auth login` if it is private"
            )
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            return _status_message(name, page, cause.response.status_code, cause)
        if isinstance(cause, HTTPError):
            return f"the connection to the Hub broke while reading {name} ({type(cause).__name__}); {AGAIN}"
    return f"{where} cannot be read: {' '.join(str(error).split())}"


def _status_message(name: str, page: str, status: int, error: Exception) -> str:
    if status == 401:
        return f"the Hub refused the token for {name} (401): log in again with `hf auth login`, or pass another --token"
    if status == 403:
        return f"the Hub forbids reading {name} (403): the token lacks permission, or you must request access at {page}"
    if status == 404:
        return f"a file of data set {name} is gone (404): {' '.join(str(error).split())[:200]}; see {page}"
    if status == 429:
        return f"the Hub limits the rate of requests for {name} (429): wait a few minutes, then {AGAIN}"
    return f"the Hub fails for {name} ({status}), even after several retries; {AGAIN}"


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


@contextmanager
def explained_push(repo_id: str, remedy: str = "") -> Iterator[None]:
    """Turn the Hub client's errors into a one-line UserError that ends with ``remedy``."""
    try:
        yield
    except (OSError, HTTPError, RuntimeError, ValueError) as error:  # RuntimeError: an upload of large files failed
        raise UserError(f"{_push_message(repo_id, error)}{remedy}") from error


def _push_message(repo_id: str, error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the Hub does not accept the token for {repo_id} (401): {LOGIN}"
    if status == 403:
        return f"this account may not write to {repo_id} (403): choose a name under your own account, or ask its owner"
    if status == 404:
        return f"there is no repository or branch with that name: {repo_id} (404)"
    if status is not None:
        return f"the Hub failed on {repo_id} ({status})"
    if isinstance(error, HTTPError | RuntimeError):
        return f"the connection to the Hub at {HfApi().endpoint} failed or broke ({type(error).__name__})"
    return f"pushing to {repo_id} failed: {' '.join(str(error).split())}"
