"""What pre-training takes where the command line leaves it open.

`hf-dbp pretrain IMAGES` alone trains as `RECOMMENDED` says, whose settings docs/results/yardstick found best by the
loss. The scripts and the flags' own defaults stay those of transformers' `run_mae.py` and of the paper; a learning rate
that nobody chose is named.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from hf_dbp.recipes import recipe_arguments

__all__ = ["RECOMMENDED", "warn_of_learning_rate", "with_recommended"]

logger = logging.getLogger(__name__)

RECOMMENDED = "whole_model.yaml"
CHOSEN = {"config", "budget", "do_train", "do_eval", "help", "help-all"}  # with one of them, the user has decided
RATES = {"learning_rate", "base_learning_rate"}
BEST = "1e-2 for muon, 3e-3 for soap, 2e-3 for adamw"  # docs/results/yardstick, yardstick_tiny; batches of 64 and 32


def flag_names(given: Sequence[str]) -> set[str]:
    """The names of the flags on a command line."""
    return {part.lstrip("-").partition("=")[0] for part in given if part.startswith("--")}


def value_of(given: Sequence[str], flag: str) -> str | None:
    """The last value of a flag on a command line; None without it."""
    values = [
        part.partition("=")[2] or following
        for part, following in itertools.pairwise([*given, ""])
        if part.partition("=")[0] == f"--{flag}"
    ]
    return values[-1] if values else None


def with_recommended(given: Sequence[str]) -> list[str]:
    """The command line of `hf-dbp pretrain`, with the recommended recipe if it says neither what to do nor how."""
    if "-h" in given or flag_names(given) & CHOSEN:
        return list(given)
    print(f"settings: --config {RECOMMENDED}, since none of --config, --budget and --do_train is given")
    return [*given, "--config", RECOMMENDED]


def warn_of_learning_rate(given: Sequence[str], trains: bool) -> None:
    """Warn if the learning rate is transformers' default, or a recipe's for another optimizer than the given one.

    Args:
        given: the command line.
        trains: whether it asks for training.

    Raises:
        UserError: the recipe cannot be read.
    """
    names = flag_names(given)
    if not trains or RATES & names:
        return
    recipe = value_of(given, "config")
    settings = [] if recipe is None else recipe_arguments(recipe)
    rate = next((found for name in sorted(RATES) if (found := value_of(settings, name)) is not None), None)
    intended, optimizer = value_of(settings, "optimizer") or "adamw", value_of(given, "optimizer")
    if rate is not None and optimizer not in (None, intended):
        logger.warning(
            "the learning rate %s of %s is meant for %s: with --optimizer %s give --learning_rate too (best in our "
            "trials: %s)", rate, recipe, intended, optimizer, BEST,
        )  # fmt: skip
    if rate is None:
        logger.warning(
            "no learning rate is given: transformers' default, 5e-5, is far too low for pre-training; give "
            "--learning_rate (best in our trials: %s)", BEST,
        )  # fmt: skip
