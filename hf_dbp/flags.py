"""Flags are fields of dataclasses: a parser for them, and a help text that shows our own flags first.

A class of arguments is a group of flags, and the first sentence of its docstring is the group's title. ``--help`` shows
the fields that this package declares and the most used ones of transformers' `TrainingArguments`; ``--help-all`` shows
the others too.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_type_hints

from transformers import HfArgumentParser

from hf_dbp.hub.arguments import HubFlags
from hf_dbp.natures import natures

__all__ = ["FlagParser", "flags_of", "own_flags", "title_of"]


def own_flags(group: type) -> list[str]:
    """The fields of a class of arguments that this package declares, in order, those of the Hub last."""
    ours = {
        name for kind in group.__mro__ if kind.__module__.startswith("hf_dbp") for name in vars(kind)["__annotations__"]
    }
    hub = {field.name for field in dataclasses.fields(HubFlags)}
    return sorted((field.name for field in dataclasses.fields(group) if field.name in ours), key=hub.__contains__)


def title_of(group: type) -> str:
    """The title of a group of flags: the first sentence of its docstring."""
    return str(group.__doc__).partition(".\n")[0].splitlines()[0].rstrip(".")


class ShowAll(argparse.Action):
    """``--help-all``: print the whole help text and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, FlagParser)
        parser.shows_all = True
        parser.print_help()
        parser.exit()


class FlagParser(HfArgumentParser):  # type: ignore[misc]
    """transformers' parser of dataclasses, with a help text in groups.

    Args:
        groups: the classes of arguments.
        description: what the command does.
    """

    def __init__(self, groups: Sequence[type], description: str | None = None) -> None:
        self.groups, self.shows_all = groups, False
        super().__init__(
            tuple(groups), description=description, allow_abbrev=False, formatter_class=argparse.HelpFormatter
        )
        for action in self._actions:
            if action.dest != "help":  # --image-size means --image_size and is not shown
                action.option_strings = action.option_strings[:1]
            if action.default not in (None, "", argparse.SUPPRESS) and "efault" not in str(action.help):
                action.help = f"{action.help or ''} (default: %(default)s)"
        text = "also show the other flags of transformers' TrainingArguments"
        self.add_argument("--help-all", action=ShowAll, nargs=0, help=text)

    def sections(self) -> Iterator[tuple[str, list[argparse.Action]]]:
        """Title and flags of each group: ours, the most used ones of transformers, all others."""
        waiting: dict[str, list[argparse.Action]] = {}
        for action in self._actions:  # a switch that is on by default also has --no_NAME
            waiting.setdefault(action.dest, []).append(action)

        def taken(names: Iterable[str]) -> list[argparse.Action]:
            return [action for name in names for action in waiting.pop(name, ())]

        yield "General", taken(["config", "help", "help_all"])
        for group in self.groups:
            yield title_of(group), taken(own_flags(group))
        if common := taken(name for name, flag in natures(*self.groups).items() if flag.common):
            yield "Most used flags of transformers' TrainingArguments (the others: --help-all)", common
        if waiting and self.shows_all:
            yield "Other flags of transformers' TrainingArguments", taken(list(waiting))

    def format_help(self) -> str:
        formatter = self.formatter_class(prog=self.prog)
        formatter.add_usage("%(prog)s [--config RECIPE] [FLAGS]", [], [])
        formatter.add_text(self.description)
        for title, actions in self.sections():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return str(formatter.format_help())


def flags_of(group: type, *names: str) -> HfArgumentParser:
    """A parser of some flags of a class of arguments, for the ``parents`` of an `argparse.ArgumentParser`."""
    hints, declared = get_type_hints(group), {field.name: field for field in dataclasses.fields(group)}
    fields = [
        (name, hints[name], dataclasses.field(default=declared[name].default, metadata=declared[name].metadata))
        for name in names
    ]
    parser = HfArgumentParser(dataclasses.make_dataclass(group.__name__, fields), add_help=False)
    for action in parser._actions:
        action.option_strings = action.option_strings[:1]
    return parser
