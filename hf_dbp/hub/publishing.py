"""Push models to the Hub: which files, where to, and what to say if it fails.

A push is one commit: a repository holds all of a model or, after an interruption, nothing of it. Only files with
certain names in a model's folder are pushed (`PUSHED`), never its checkpoints, optimizer states or anything else.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_dbp.errors import UserError
from hf_dbp.hub.errors import LOGIN, explained_push

__all__ = ["Destination", "claim_push"]

PUSHED = (
    "README.md",
    "config.json",
    "preprocessor_config.json",
    "run.json",
    "eval.json",
    "*.safetensors",
    "*.safetensors.index*.json",
    "*.png",
)
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")


@dataclasses.dataclass(frozen=True)
class Destination:
    """A model repository on the Hub.

    Args:
        repo_id: ``user/name``, or ``name`` for the user's own.
        private: whether to make a new repository private; None for the account's default.
        token: a token with write permission; None for that of `hf auth login` or HF_TOKEN.
        revision: branch to push to, or a pull request such as ``refs/pr/1``.
    """

    repo_id: str
    private: bool | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    revision: str | None = None

    def opened(self) -> Destination:
        """The same repository with its full name; creates it and the branch if they do not exist.

        Raises:
            UserError: no token, no write permission, a bad name, or no connection.
        """
        if self.token is None and get_token() is None:
            raise UserError(f"no Hub token, which pushing to {self.repo_id} needs: {LOGIN}")
        with explained_push(self.repo_id):
            api = HfApi(token=self.token)
            url = api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            if self.revision is not None and self.revision.startswith(
                "refs/"
            ):  # a pull request, which we do not create
                api.model_info(url.repo_id, revision=self.revision)
            elif self.revision not in (None, "main"):
                api.create_branch(url.repo_id, branch=self.revision, exist_ok=True)
        return dataclasses.replace(self, repo_id=url.repo_id)

    @property
    def unfused(self) -> Destination:
        """The repository of the unfused model, with a name that nobody mistakes for the stock model's."""
        return dataclasses.replace(self, repo_id=f"{self.repo_id}-unfused")

    def push(self, folder: Path) -> str:
        """Commit the model in ``folder`` with its card, record and pictures; return the repository's address.

        Pushing the same files again changes nothing.

        Raises:
            UserError: it failed (the message says how to repeat it; the files are unchanged), or a file holds a token.
        """
        matches = {pattern: [*folder.glob(pattern)] for pattern in PUSHED}
        files = sorted({file for found in matches.values() for file in found})
        self.refuse_tokens(files)
        api = HfApi(token=self.token)
        again = self.command(folder, [pattern for pattern, found in matches.items() if found])
        with explained_push(self.repo_id, remedy=f"; nothing is lost; push again with: {again}"):
            api.create_commit(
                self.repo_id,
                [CommitOperationAdd(file.name, file) for file in files],
                commit_message=f"Push {'the unfused ' if self.repo_id.endswith('-unfused') else 'the '}model",
                revision=self.revision,
            )
        return f"{api.endpoint}/{self.repo_id}"

    def command(self, folder: Path, patterns: list[str]) -> str:
        """The command that pushes the files with these names in ``folder``, but no subfolder, in the same way."""
        parts = ["hf", "upload", self.repo_id, str(folder), "."]
        parts += [part for pattern in patterns for part in ("--include", pattern)] + ["--exclude", "*/*"]
        parts += [] if self.revision is None else ["--revision", self.revision]
        return shlex.join([*parts, *(["--private"] if self.private else [])])

    def refuse_tokens(self, files: list[Path]) -> None:
        """Raise a UserError if one of the text files holds a Hub token."""
        own = (self.token or get_token() or "").encode()
        for file in files:
            content = file.read_bytes() if file.suffix in (".json", ".md") else b""
            if (own and own in content) or TOKEN.search(content):
                raise UserError(f"{file} holds a Hub token; remove it, and revoke it if others saw it")


def claim_push(args: TrainingArguments, token: str | None = None) -> Destination | None:
    """Take over pushing from the Trainer: returns where to push at the end of the run, or None.

    The Trainer would push its raw folder, unfused weights included, at every save. This is called before training, so a
    missing token or permission is detected before any work is done.

    Args:
        args: with ``push_to_hub``, which is switched off, and ``hub_model_id``, ``hub_private_repo``, ``hub_token``,
            ``hub_revision``.
        token: used if ``hub_token`` is not given.

    Raises:
        UserError: as for `Destination.opened`, or the strategy pushes checkpoints.
    """
    if not args.push_to_hub:
        return None
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise UserError(
            f"--hub_strategy {args.hub_strategy.value}: checkpoints are not pushed; the model is, at the end of the run"
        )
    args.push_to_hub = False
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    destination = Destination(name, args.hub_private_repo, args.hub_token or token, args.hub_revision)
    return destination.opened() if args.process_index == 0 else destination
