"""Flags for loading from the Hub: the revision, the download folder and the token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from hf_dbp.natures import Nature

__all__ = ["HubFlags"]


@dataclass
class HubFlags:
    """Models on the Hub."""

    model_revision: Annotated[str, Nature("model", "told")] = field(
        default="main", metadata={"help": "Revision of the model on the Hub."}
    )
    cache_dir: Annotated[str | None, Nature("nothing")] = field(
        default=None, metadata={"help": "Folder for downloads."}
    )
    token: Annotated[str | None, Nature("nothing")] = field(
        default=None, metadata={"help": "Hub token (default: the one from `hf auth login`)."}
    )

    @property
    def hub_options(self) -> dict[str, Any]:
        """The keyword arguments for ``from_pretrained``."""
        return {"revision": self.model_revision, "cache_dir": self.cache_dir, "token": self.token}
