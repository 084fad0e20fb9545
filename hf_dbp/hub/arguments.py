"""The flags of whatever is loaded from the Hub: which revision, kept where, with what right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from hf_dbp.natures import Nature

__all__ = ["HubFlags"]


@dataclass
class HubFlags:
    """Models on the Hub."""

    model_revision: Annotated[str, Nature("model")] = field(
        default="main", metadata={"help": "Revision of the model on the Hub."}
    )
    cache_dir: Annotated[str | None, Nature("nothing")] = field(
        default=None, metadata={"help": "Where downloads are kept."}
    )
    token: Annotated[str | None, Nature("nothing")] = field(
        default=None, metadata={"help": "Hub token (default: that of `hf auth login`)."}
    )

    @property
    def hub_options(self) -> dict[str, Any]:
        """As ``from_pretrained`` takes them."""
        return {"revision": self.model_revision, "cache_dir": self.cache_dir, "token": self.token}
