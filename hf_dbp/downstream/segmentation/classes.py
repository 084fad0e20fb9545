"""The classes of a segmentation model, in its config.json: their names by id, and the id that is not learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_dbp.errors import UserError

__all__ = ["check_names", "class_fields"]


def class_fields(id2label: Mapping[int, str], ignore_index: int) -> dict[str, Any]:
    """The fields of a model's configuration for these classes.

    Args:
        id2label: class names by id 0..K-1.
        ignore_index: label id that the loss ignores; not a class id.

    Raises:
        UserError: too few classes, gaps in the class ids, or an ignored class.
    """
    classes = len(id2label)
    if classes < 2 or sorted(id2label) != list(range(classes)):
        raise UserError(f"class ids are {sorted(id2label)}: give 0..K-1 without gaps, at least two")
    if ignore_index in id2label:
        raise UserError(
            f"ignore_index {ignore_index} is the class {id2label[ignore_index]!r}: choose another, e.g. 255"
        )
    names = {name: number for number, name in id2label.items()}
    return {"id2label": dict(id2label), "label2id": names, "loss_ignore_index": ignore_index}


def check_names(content: Mapping[str, Any], file: str, id2label: Mapping[int, str]) -> None:
    """Raise a UserError unless a config.json has the classes of the labels."""
    names = content.get("id2label")
    if names != {str(number): label for number, label in id2label.items()}:
        raise UserError(
            f"{file} has the classes {names!r:.200}, but the labels have {dict(id2label)}: give those of its training"
        )
