"""`hf-dbp`: the mains of the scripts under one name."""

import importlib
from pathlib import Path

import pytest

from hf_dbp import cli

SCRIPTS = {
    "pretrain": "run_dbp_mae.py",
    "fuse": "fuse_checkpoint.py",
    "finetune": "run_upernet.py",
    "probe": "run_probe.py",
    "compare": "run_comparison.py",
}


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert f"usage: hf-dbp {command} " in " ".join(out.split()) and "--output_" in out


@pytest.mark.parametrize(("command", "script"), SCRIPTS.items())
def test_commands_run_the_mains_of_the_scripts(command, script, monkeypatch):
    text = (Path(__file__).parents[1] / "training_scripts" / script).read_text()
    assert f"from {cli.COMMANDS[command]} import main" in text
    seen = []
    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[command]), "main", seen.append)
    cli.main([command, "--some", "flag"])
    assert seen == [["--some", "flag"]]


def test_the_demo_chains_three_commands(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "run_command", lambda command, arguments: seen.append((command, arguments)))
    cli.main(["demo", "here"])
    assert [command for command, _ in seen] == ["pretrain", "fuse", "finetune"]
    assert seen[1][1][0] == seen[0][1][-1] == "here/demo"
    assert "here/demo-fused" in seen[1][1] and "here/demo-fused" in seen[2][1]


@pytest.mark.parametrize("arguments", [["--output_dir", "x"], ["--output_dir=x"], ["here", "there"]])
def test_the_demo_takes_no_flag_for_a_folder(arguments, monkeypatch, capsys):
    monkeypatch.setattr(cli, "run_command", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *arguments])
    assert stop.value.code == 2
    assert f"hf-dbp demo [FOLDER]; got {' '.join(arguments)}" in capsys.readouterr().err


def test_help_lists_every_command_and_a_mistake_ends_with_it(capsys):
    for arguments in ([], ["--help"], ["demo", "--help"]):
        cli.main(arguments)
        out = capsys.readouterr().out
        assert all(f"hf-dbp {command} " in out for command in [*cli.COMMANDS, "demo"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrian"])
    assert stop.value.code == 2
    assert "unknown command 'pretrian'; did you mean pretrain?" in capsys.readouterr().err


def test_the_installed_name():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'hf-dbp = "hf_dbp.cli:main"' in project
