"""Training's loaders open the data with the flags that inspect chose, and what they say is reported too."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_dbp.data.images import ImageSource, load_images
from hf_dbp.downstream.segmentation.data import load_labelled_images
from hf_dbp.downstream.segmentation.source import SegmentationSource
from hf_dbp.errors import UserError
from hf_dbp.inspection.choices import (
    Findings,
)

__all__ = ["hearing", "known", "rehearse", "unsaid"]


class Heard(logging.Handler):
    """Collects the warnings of training's code instead of showing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def known(source: type[ImageSource], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the inspected flags that a source has."""
    names = {field.name for field in dataclasses.fields(source) if field.init}
    return {name: value for name, value in flags.items() if name in names and value is not None}


def rehearse(data: Mapping[str, Any], found: Findings) -> list[str]:
    """The messages of training's loaders about the data with the flags of the recipes, except those already reported.

    Args:
        data: flags that name the images.
        found: findings with the flags of the recipes and the problems already reported.
    """
    with hearing() as messages:
        if found.finetuning:
            flags = known(SegmentationSource, {**data, **found.finetuning})
            load_labelled_images(SegmentationSource(**flags, seed=flags.get("subset_seed", 0)))
        load_images(ImageSource(**known(ImageSource, {**data, **found.pretraining})))
    return unsaid(messages, found)


@contextlib.contextmanager
def hearing() -> Iterator[list[str]]:
    """The warnings of training's code, and the mistake that ends it."""
    heard, logger = Heard(), logging.getLogger("hf_dbp")
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(heard)
    try:
        yield heard.messages
    except UserError as error:
        heard.messages.append(str(error))
    finally:
        logger.removeHandler(heard)
        logger.propagate = propagated


def unsaid(messages: Sequence[str], found: Findings) -> list[str]:
    """The messages that are not reported yet."""
    said = {gist(problem) for problem in found.problems}
    fresh = (
        message for message in dict.fromkeys(messages) if " left out: " not in message
    )  # these are already reported
    text = "\n".join(found.problems)
    reasons = ((message, message.partition(": ")[2] or message) for message in fresh)
    return [message for message, reason in reasons if gist(reason) not in said and reason not in text]


def gist(message: str) -> str:
    """A warning without its example and its counts, which differ between parts of the data."""
    return re.sub(r"\d+", "N", message.partition(", e.g. ")[0])
