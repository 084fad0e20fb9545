"""What pre-training takes where the command line leaves it open.

`hf-dbp pretrain IMAGES` alone trains as `RECOMMENDED` says, whose settings docs/results/yardstick found best by the
loss. The scripts and the flags' own defaults stay those of transformers' `run_mae.py` and of the paper; a learning rate
that nobody chose is named.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from hf_dbp.recipes import flag_names, flag_values, recipe_arguments

__all__ = ["DESCRIPTION", "RECOMMENDED", "warn_of_learning_rate", "with_recommended"]

logger = logging.getLogger(__name__)

RECOMMENDED = "whole_model.yaml"
DESCRIPTION = (
    "Pre-train a ViT by masked autoencoding. `hf-dbp pretrain IMAGES` without --config, --budget, --do_train, "
    f"--do_eval and --model_name_or_path takes the recipe {RECOMMENDED}; the defaults below hold otherwise. "
    "See also docs/flags.md."
)
#: with one of these flags the user has decided what to do, or starts from weights for which nothing was measured
DECIDED = {"config", "budget", "do_train", "do_eval", "model_name_or_path", "help", "help_all"}
RATES = {"learning_rate", "base_learning_rate"}
BEST = (  # docs/results/yardstick and its VARIANTS: batches of 64
    "best of those tried on a mini model, plain and with the whole model decorrelated: muon 1e-2 and 1e-2, soap 3e-3 "
    "and 1e-2, adamw 2e-3 and 4e-3"
)


def with_recommended(given: Sequence[str]) -> list[str]:
    """The command line of `hf-dbp pretrain`, with the recommended recipe if it says neither what to do nor how."""
    if "-h" in given or flag_names(given) & DECIDED:
        return list(given)
    print(f"settings: --config {RECOMMENDED}, since none of --config, --budget and --do_train is given")
    return [*given, "--config", RECOMMENDED]


def warn_of_learning_rate(given: Sequence[str], trains: bool) -> None:
    """Warn if the learning rate is transformers' default, or a recipe's for another optimizer than the given one.

    Args:
        given: the command line, whose --config is the plan of its --budget if it has one.
        trains: whether it asks for training.

    Raises:
        UserError: a recipe cannot be read.
    """
    names, recipes = flag_names(given), flag_values(given, "config")
    if not trains or RATES & names:
        return
    settings = [part for recipe in recipes for part in recipe_arguments(recipe)]
    rates = [rate for name in sorted(RATES) for rate in flag_values(settings, name)]
    if not rates:
        logger.warning(
            "no learning rate is given: transformers' default, 5e-5, is far too low for pre-training; give "
            "--learning_rate (%s)", BEST,
        )  # fmt: skip
        return
    by_default = "muon" if "budget" in names else "adamw"  # a budget's plan does not repeat the flags that were given
    intended = (flag_values(settings, "optimizer") or [by_default])[-1]
    optimizer = (flag_values(given, "optimizer") or [intended])[-1]
    if optimizer != intended:
        logger.warning(
            "the learning rate %s of %s is meant for %s: with --optimizer %s give --learning_rate too (%s)",
            rates[-1], recipes[-1], intended, optimizer, BEST,
        )  # fmt: skip
