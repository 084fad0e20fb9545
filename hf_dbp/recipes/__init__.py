"""Recipes: YAML files of command-line flags, shipped with the package, and the parser that puts them under the user's.

    run_dbp_mae.py --config imagenet10_dbp.yaml --learning_rate 2e-3     # the recipe's flags, then the user's

A recipe is one flat mapping, flag name -> value. It is turned into arguments that stand *before* the user's, so the
user's win; values stay text until the flag's own type reads them (YAML would make a string of 5e-4 and False of `no`).
Reading a recipe cannot execute code.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

__all__ = ["parse_arguments", "recipe_arguments", "recipe_names", "recipe_path"]


def recipe_names() -> list[str]:
    """File names of the recipes in the package."""
    return sorted(file.name for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    """The recipe of that path or else of that name in the package. ValueError if neither exists."""
    for path in (Path(name), Path(str(resources.files(__name__) / name))):
        if path.is_file():
            return path
    raise ValueError(f"no recipe {name!r}: give a YAML file or one of {', '.join(recipe_names())}")


def recipe_arguments(name: str) -> list[str]:
    """The recipe as command-line arguments.

    Raises:
        ValueError: no such recipe, not YAML, or not one flat mapping.
    """
    path = recipe_path(name)
    try:
        text = path.read_text(encoding="utf-8")
        as_text, typed = yaml.load(text, Loader=yaml.BaseLoader), yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"recipe {path} is not readable YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(as_text, dict):
        raise ValueError(f"recipe {path} must be a mapping of flags to values, found {type(as_text).__name__}")
    arguments: list[str] = []
    for key, value in as_text.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise ValueError(f"recipe {path}: {key!r} is no flag name; write e.g. learning_rate: 5e-4")
        if value in ("", "null", "~"):
            continue  # the flag's default
        values = value if isinstance(value, list) else [json.dumps(typed[key]) if isinstance(value, dict) else value]
        arguments += [f"--{key}", *map(str, values)]
    return arguments


def parse_arguments(
    dataclasses: Sequence[type], arguments: Sequence[str] | None = None, **parser: Any
) -> tuple[Any, ...]:
    """Parse flags into dataclasses, with ``--config RECIPE`` under the user's own flags.

    Args:
        dataclasses: argument dataclasses, as for `transformers.HfArgumentParser`.
        arguments: command-line arguments (default: those of the process).
        parser: further arguments of the parser, such as ``description``.

    Returns:
        One instance per dataclass.

    Raises:
        ValueError: the recipe cannot be read, a flag is unknown, or a value is refused by its dataclass.
        SystemExit: a value of the wrong type (argparse's message on stderr).
    """
    own = list(sys.argv[1:] if arguments is None else arguments)
    own = [part for item in own for part in (item.split("=", 1) if item.startswith("--config=") else [item])]
    recipes: list[str] = []
    while "--config" in own:
        at = own.index("--config")
        if at + 1 == len(own):
            raise ValueError(f"--config needs a recipe: a YAML file or one of {', '.join(recipe_names())}")
        recipes += recipe_arguments(own[at + 1])
        del own[at : at + 2]
    description = parser.pop("description", None)
    hf_parser = HfArgumentParser(tuple(dataclasses), description=description, allow_abbrev=False, **parser)
    hf_parser.add_argument("--config", help=f"recipe under the flags given: a YAML file or {', '.join(recipe_names())}")
    *parsed, unknown = hf_parser.parse_args_into_dataclasses(
        [*recipes, *own], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        known = [flag for action in hf_parser._actions for flag in action.option_strings]
        similar = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(f"unknown flag {unknown[0]}" + (f"; did you mean {similar[0]}?" if similar else "; see --help"))
    return tuple(parsed[: len(dataclasses)])
