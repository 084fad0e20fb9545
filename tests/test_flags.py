"""Flags: our own come first in the help text, and docs/flags.md is made of them."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
from flags_page import COMMANDS, page
from transformers import HfArgumentParser, TrainingArguments

from hf_dbp import cli
from hf_dbp.data.arguments import FolderFlags
from hf_dbp.downstream.segmentation.source import LabelFlags
from hf_dbp.flags import FlagParser, own_flags
from hf_dbp.hub.arguments import HubFlags
from hf_dbp.training.arguments import RunArguments

COMMON = [name for name, flag in RunArguments.STOCK.items() if flag.common]
ROOT = Path(__file__).parents[1]


def flags_of(text):
    """Flags in their order, without the --no_ form of switches."""
    found = re.findall(r"^  (?:-\w, )?--([\w-]+)", text, flags=re.MULTILINE)
    return [name for name in found if not name.startswith("no_")]


def shown(command, flag, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, flag])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["pretrain", "finetune", "classify", "detect", "probe"])
def test_our_own_flags_come_first_and_every_flag_once(command, capsys):
    groups = COMMANDS[f"hf-dbp {command}"]
    ours = [name for group in groups for name in own_flags(group)]
    seen = flags_of(shown(command, "--help", capsys))
    assert seen[: len(ours) + 3] == ["config", "help", "help-all", *ours]
    assert set(seen[len(ours) + 3 :]) <= set(COMMON)
    every = flags_of(shown(command, "--help-all", capsys))
    assert every[: len(seen)] == seen
    fields = {field.name for group in groups for field in dataclasses.fields(group) if field.init}
    assert sorted(every) == sorted({*fields, "config", "help", "help-all"})


def test_the_flags_of_training_arguments_stand_behind_help_all(capsys):
    brief, whole = (flags_of(shown("pretrain", flag, capsys)) for flag in ("--help", "--help-all"))
    assert "torch_empty_cache_steps" in whole and "torch_empty_cache_steps" not in brief
    assert len(whole) - len(brief) > 60
    assert set(COMMON) <= TrainingArguments.__dataclass_fields__.keys()


def test_a_default_is_shown_once_and_none_is_not():
    for groups in COMMANDS.values():
        for action in FlagParser(groups)._actions:
            counted = str(action.help).count("(default:")
            assert counted <= 1 and not (counted and action.default is None and "%(default)s" in action.help), action


@pytest.mark.parametrize("command", ["embed", "export", "inspect", "predict", "select"])
def test_a_flag_means_the_same_in_every_command(command, monkeypatch):
    """What a dataclass declares has its help text, type and default in the commands of argparse too."""

    class Parsed(Exception):
        pass

    def stop(self, *_):
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed) as parsed:
        cli.main([command])
    ours = {action.dest: action for action in parsed.value.args[0]._actions}
    declared = {}
    for group in (FolderFlags, LabelFlags, HubFlags):
        declared |= {action.dest: action for action in HfArgumentParser(group, add_help=False)._actions}
    shared = ours.keys() & declared.keys() - {"ignore_index"}  # predict's default is the model's
    assert shared
    for name in shared:
        assert [getattr(ours[name], of) for of in ("help", "type", "nargs", "default")] == [
            getattr(declared[name], of) for of in ("help", "type", "nargs", "default")
        ], name


def test_both_spellings_are_read():
    arguments = ["--model_name_or_path", "x", "--train-dir", "y"]
    probe, *_ = FlagParser(COMMANDS["hf-dbp probe"]).parse_args_into_dataclasses(arguments)
    assert probe.train_dir == "y"


def test_the_page_of_flags_is_made_of_them():
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert text == page(), "python tests/flags_page.py > docs/flags.md"
