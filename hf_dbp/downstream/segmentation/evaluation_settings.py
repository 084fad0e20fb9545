"""How a model was evaluated, kept in its config.json so that prediction can give the same results.

    "hf_dbp_evaluated": {"crop_size": 512, "long_edge": null, "batch_size": 8, "autocast": null}

Stock classes keep the entry. Models of version 0.1.0 have it in the arguments of their `eval.json`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import read_json

__all__ = ["EVALUATED", "MEMORY_SETTINGS", "Evaluated", "autocast_of", "read_evaluated", "stock_crop"]

EVALUATED = "hf_dbp_evaluated"
MEMORY_SETTINGS = "retrieval.json"  # in the folder of a memory of `hf-dbp retrieve`, in place of that entry
LARGEST = 2**16  # pixels of a crop's side or of an edge


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """How whole images were prepared for the model.

    Args:
        crop_size: side of the windows in pixels, after scaling.
        long_edge: pixels that the long edge was scaled to; None for native resolution.
        batch_size: windows per forward pass.
        autocast: "bfloat16" or "float16" if evaluation ran under autocast.

    Raises:
        UserError: a value is impossible.
    """

    crop_size: int
    long_edge: int | None
    batch_size: int = 8
    autocast: str | None = None

    def __post_init__(self) -> None:
        numbers = {"crop_size": self.crop_size, "long_edge": self.long_edge or 1, "batch_size": self.batch_size}
        for name, value in numbers.items():
            if type(value) is not int or not 0 < value <= LARGEST:
                raise UserError(f"{name} is {value!r}: give a whole number from 1 to {LARGEST}")
        if self.autocast not in (None, "bfloat16", "float16"):
            raise UserError(f"autocast is {self.autocast!r}: expected bfloat16, float16 or nothing")

    def record(self) -> dict[str, Any]:
        """The entry in config.json."""
        return dataclasses.asdict(self)


def autocast_of(args: TrainingArguments) -> str | None:
    """The autocast type under which a run evaluates."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else None


def read_evaluated(config: Mapping[str, Any], source: str) -> Evaluated | None:
    """The entry in a model's config.json, else in the `eval.json` beside it; None if neither has one.

    Raises:
        UserError: a value is impossible.
    """
    found = config.get(EVALUATED)
    if found is None and (file := Path(source) / "eval.json").is_file():
        try:
            arguments = json.loads(file.read_text(encoding="utf-8"))["arguments"]
            long_edge = arguments["crop_size"] if arguments["long_edge"] is None else arguments["long_edge"] or None
            found = {
                "crop_size": arguments["crop_size"],
                "long_edge": long_edge,
                "batch_size": arguments["per_device_eval_batch_size"],
                "autocast": "bfloat16" if arguments.get("bf16") else "float16" if arguments.get("fp16") else None,
            }
        except (KeyError, TypeError, ValueError):  # from another task or another tool
            return None
    if found is None:
        return None
    names = {field.name for field in dataclasses.fields(Evaluated)}
    if not isinstance(found, dict) or not {"crop_size", "long_edge"} <= found.keys() <= names:
        raise UserError(f"{source}: {EVALUATED} in its config.json is {found!r:.100}; expected {sorted(names)}")
    return Evaluated(**found)


def stock_crop(model: str) -> int:
    """The size that a stock model's image processor resizes to. UserError if it names none."""
    found = read_json(model, "preprocessor_config.json")
    size = {} if found is None else found[1].get("size")
    sides = [size] if isinstance(size, int) else list(size.values()) if isinstance(size, dict) else []
    if not sides or not all(type(side) is int and side > 0 for side in sides):
        raise UserError(f"{model} does not say at which size it was trained: give --crop_size")
    return max(sides)
