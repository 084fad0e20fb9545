"""Recipes: YAML files of command-line flags, shipped with the package, and the parser that combines them with yours.

    run_dbp_mae.py --config imagenet10_dbp.yaml --learning_rate 2e-3     # the recipe's flags, then the user's

A recipe is one flat mapping, flag name -> value. It becomes arguments *before* the user's, so the user's win. Values
stay text until the flag's own type parses them (YAML would turn 5e-4 into a string and `no` into False). Reading a
recipe cannot execute code.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from hf_dbp.errors import UserError
from hf_dbp.flags import FlagParser

__all__ = [
    "flag_arguments",
    "parse_arguments",
    "plan_names",
    "read_yaml",
    "recipe_arguments",
    "recipe_names",
    "recipe_path",
    "safe_yaml",
]

RESOLVER = yaml.resolver.Resolver()
PLAN_PREFIXES = ("compare_", "ablation_")


def recipe_names() -> list[str]:
    """File names of the recipes in the package; plans of comparisons are named by `plan_names`."""
    return [name for name in yaml_names() if not name.startswith(PLAN_PREFIXES)]


def plan_names() -> list[str]:
    """File names of the plans in the package, see `hf_dbp.comparison.plans`."""
    return [name for name in yaml_names() if name.startswith(PLAN_PREFIXES)]


def yaml_names() -> list[str]:
    return sorted(file.name for file in resources.files(__name__).iterdir() if file.name.endswith(".yaml"))


def recipe_path(name: str) -> Path:
    """The recipe with that path, or else with that name in the package. UserError if neither exists."""
    for path in (Path(name), Path(str(resources.files(__name__) / name))):
        if path.is_file():
            return path
    raise UserError(f"no recipe {name!r}: give a YAML file or one of {', '.join(recipe_names())}")


def recipe_arguments(name: str) -> list[str]:
    """The recipe as command-line arguments.

    Raises:
        UserError: there is no such recipe, or it is not YAML, not one flat mapping, or the plan of a comparison.
    """
    path = recipe_path(name)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must be a mapping of flags to values, found {type(content).__name__}")
    if "axes" in content:
        raise UserError(f"{name} is the plan of a comparison, not a recipe: hf-dbp compare --plan {name}")
    return flag_arguments(content, f"recipe {path}")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file with every scalar as text. UserError if it is not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
        safe_yaml(text)  # refuses everything but data
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"recipe {path} is not readable YAML: {str(error).splitlines()[0]}") from error


def safe_yaml(text: str) -> Any:
    """Parse YAML without Python tags and without aliases, a few of which can expand to any number of values.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is not such YAML.
    """
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise yaml.YAMLError("it holds an alias (*name); write the value out")
    return yaml.safe_load(text)


def flag_arguments(flags: dict[str, Any], source: str) -> list[str]:
    """Flags and their values, as text, in the form of command-line arguments. UserError for an invalid flag name."""
    arguments: list[str] = []
    for key, value in flags.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise UserError(f"{source}: {key!r} is not a flag name; write e.g. learning_rate: 5e-4")
        if value in ("", "null", "~"):
            continue  # the flag's default
        values = value if isinstance(value, list) else [json.dumps(typed(value)) if isinstance(value, dict) else value]
        arguments += [f"--{key}", *map(str, values)]
    return arguments


def flag_names(arguments: Sequence[str]) -> set[str]:
    """The names of the flags on a command line, however they are spelled: ``--do-train``, ``--do_train=true``."""
    return {part[2:].partition("=")[0].replace("-", "_") for part in arguments if part.startswith("--")}


def flag_values(arguments: Sequence[str], flag: str) -> list[str]:
    """The values of a flag on a command line, one for each time that it is given."""
    return [
        part.partition("=")[2] or following
        for part, following in itertools.pairwise([*arguments, ""])
        if flag in flag_names([part])
    ]


def typed(value: Any) -> Any:
    """A value read as text, converted to a number, boolean or null if it is one in YAML."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if not isinstance(value, str):
        return [typed(item) for item in value]
    kind = str(RESOLVER.resolve(yaml.ScalarNode, value, (True, False))).rpartition(":")[2]  # type: ignore[no-untyped-call]
    with contextlib.suppress(ValueError):  # 0b_ looks like a number
        return yaml.safe_load(value) if kind in ("int", "float", "bool", "null") else value
    return value


def parse_arguments(
    dataclasses: Sequence[type], arguments: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """Parse flags into dataclasses; the user's flags override those of ``--config RECIPE``.

    Args:
        dataclasses: argument dataclasses, as for `hf_dbp.flags.FlagParser`.
        arguments: command-line arguments (default: those of the process).
        description: what the command does, for its help text.

    Returns:
        One instance per dataclass.

    Raises:
        UserError: the recipe cannot be read, a flag is unknown, or a dataclass refuses a value.
        SystemExit: a value has the wrong type (argparse's message on stderr).
    """
    own = list(sys.argv[1:] if arguments is None else arguments)
    own = [part for item in own for part in (item.split("=", 1) if item.startswith("--config=") else [item])]
    recipes: list[str] = []
    while "--config" in own:
        at = own.index("--config")
        if at + 1 == len(own):
            raise UserError(f"--config needs a recipe: a YAML file or one of {', '.join(recipe_names())}")
        recipes += recipe_arguments(own[at + 1])
        del own[at : at + 2]
    hf_parser = FlagParser(dataclasses, description)
    hf_parser.add_argument(
        "--config", help=f"recipe that the given flags override: a YAML file or {', '.join(recipe_names())}"
    )
    *parsed, unknown = hf_parser.parse_args_into_dataclasses(
        [*recipes, *own], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        flag = " ".join(unknown[0].partition("=")[0].split())  # its value may be a token
        known = [flag for action in hf_parser._actions for flag in action.option_strings]
        similar = difflib.get_close_matches(flag, known, n=1)
        raise UserError(f"unknown flag {flag}" + (f"; did you mean {similar[0]}?" if similar else "; see --help"))
    return tuple(parsed[: len(dataclasses)])
