"""What pre-training takes where the command line leaves it open.

`hf-dbp pretrain IMAGES` alone trains as `RECOMMENDED` says, whose settings docs/results/yardstick found best by the
loss. The scripts and the flags' own defaults stay those of transformers' `run_mae.py` and, but for the interval,
schedule and bound of eta, of the paper; a learning rate that nobody chose is named.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hf_dbp.recipes import flag_names, flag_values, recipe_arguments

__all__ = ["DESCRIPTION", "RECOMMENDED", "warn_of_layers", "warn_of_learning_rate", "with_recommended"]

logger = logging.getLogger(__name__)

RECOMMENDED = "whole_model.yaml"
#: with one of these flags the user has decided what to do, or starts from weights for which nothing was measured
DECIDED = ("config", "budget", "do_train", "do_eval", "model_name_or_path")
ANY = f"--{', --'.join(DECIDED[:-1])} or --{DECIDED[-1]}"
DESCRIPTION = (
    f"Pre-train a ViT by masked autoencoding. Without {ANY}, `hf-dbp pretrain IMAGES` takes the recipe {RECOMMENDED}; "
    "otherwise the defaults below hold. See also docs/flags.md."
)
RATES = {"learning_rate", "base_learning_rate"}
#: optimizer -> best of the rates tried on a mini model, plain and with the whole model decorrelated; batches of 64
#: (docs/results/yardstick and its VARIANTS)
BEST = {"muon": ("1e-2", "1e-2"), "soap": ("3e-3", "1e-2"), "adamw": ("2e-3", "4e-3")}


def with_recommended(given: Sequence[str]) -> list[str]:
    """The command line of `hf-dbp pretrain`, with the recommended recipe if it says neither what to do nor how."""
    if "-h" in given or flag_names(given) & {*DECIDED, "help", "help_all"}:
        return list(given)
    print(f"settings: --config {RECOMMENDED}, in the absence of {ANY}")
    return [*given, *followers(given), "--config", RECOMMENDED]


def followers(given: Sequence[str]) -> list[str]:
    """Flags that follow a given one, where the recipe's own value would contradict it."""
    names, found = flag_names(given), []
    for kind in ("strategy", "steps"):  # the best checkpoint is kept, so saves fall on evaluations
        if f"eval_{kind}" in names and f"save_{kind}" not in names:
            found += [f"--save_{kind}", flag_values(given, f"eval_{kind}")[-1]]
    if flag_values(given, "decorrelated_layers")[-1:] == ["block_inputs"] and "wide_blocks" not in names:
        found += ["--wide_blocks", "1"]
    return found


def advice(optimizer: str) -> str:
    """Which learning rate to give with an optimizer."""
    if optimizer not in BEST:
        return "give --learning_rate; none was measured"
    plain, decorrelated = BEST[optimizer]
    return f"give --learning_rate, such as {plain} or, with the whole model decorrelated, {decorrelated}"


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
    by_default = "muon" if "budget" in names else "adamw"  # a budget's plan does not repeat the flags that were given
    intended = (flag_values(settings, "optimizer") or [by_default])[-1]
    optimizer = (flag_values(given, "optimizer") or [intended])[-1]
    if not rates and "model_name_or_path" not in names:  # 5e-5 may suit weights that are trained already
        logger.warning(
            "transformers' default learning rate, 5e-5, is far too low for pre-training: %s; %s has one for muon",
            advice(optimizer), f"--config {RECOMMENDED}",
        )  # fmt: skip
    if rates and optimizer != intended:
        logger.warning(
            "the learning rate %s of %s is meant for %s: with --optimizer %s, %s",
            rates[-1], recipes[-1], intended, optimizer, advice(optimizer),
        )  # fmt: skip


def warn_of_layers(source: str, content: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Warn if a model of ours is decorrelated otherwise than the flags say.

    Args:
        source: its folder or Hub id.
        content: its config.json.
        fields: those of the new configuration.
    """
    names = [name for name in ("decorrelated_layers", "wide_blocks") if name in content and name in fields]
    if any(content[name] != fields[name] for name in names):
        was, now = (" ".join(f"--{name} {one[name]}" for name in names) for one in (content, fields))
        logger.warning("%s was trained with %s; this run has %s: give the former to go on as before", source, was, now)
