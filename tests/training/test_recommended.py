"""`hf-dbp pretrain IMAGES` alone takes the recommended recipe; a learning rate that nobody chose is named."""

import logging
from pathlib import Path

import pytest
from PIL import Image

from hf_dbp import SIZES, DBPViTMAEConfig, DBPViTMAEForPreTraining, cli
from hf_dbp.errors import UserError
from hf_dbp.pretraining import build_model
from hf_dbp.recipes import parse_arguments, read_yaml, recipe_path
from hf_dbp.records import RunRecord
from hf_dbp.training.arguments import GROUPS
from hf_dbp.training.recommended import RECOMMENDED, warn_of_learning_rate, with_recommended

SMALL = ["--model_size", "mini", "--image_size", "32", "--patch_size", "4", "--max_steps", "6", "--use_cpu"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(48):
        Image.effect_noise((40, 40), 60 + number).convert("RGB").save(folder / f"{number}.png")
    return str(folder)


def test_a_folder_alone_is_trained_as_the_recommended_recipe_says(photos, tmp_path, capsys):
    cli.main(["pretrain", photos, "--output_dir", str(tmp_path / "run"), "--eta", "1e-3", *SMALL])
    assert f"settings: --config {RECOMMENDED}, in the absence of" in capsys.readouterr().out
    record = RunRecord.read(tmp_path / "run" / "run.json")
    recipe = read_yaml(recipe_path(RECOMMENDED))
    for name in ("optimizer", "decorrelated_layers"):
        assert record.arguments[name] == recipe[name]
    for name in ("wide_blocks", "update_interval", "kappa", "learning_rate", "per_device_train_batch_size"):
        assert record.arguments[name] == float(recipe[name])
    assert record.arguments["eta"] == 1e-3  # the user's flags override it
    assert record.results["finished"] and record.results["model"]["eval_loss"] > 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], True),
        (["--decorrelated_layers", "full"], True),
        (["--decorrelated_layers", "full", "--wide_blocks", "4"], False),
        (["--method", "bp"], True),
        (["--method", "stock"], False),
    ],
)
def test_a_start_from_a_model_that_is_decorrelated_otherwise_says_so(flags, told, tmp_path, caplog):
    config = DBPViTMAEConfig(image_size=32, patch_size=4, decorrelated_layers="full", wide_blocks=4, **SIZES["mini"])
    DBPViTMAEForPreTraining(config).save_pretrained(tmp_path)
    line = ["--model_name_or_path", str(tmp_path), "--train_dir", "photos", "--output_dir", "run", *flags]
    with caplog.at_level(logging.WARNING):
        build_model(parse_arguments(GROUPS, line)[0], 3, seed=0)
    assert ("was trained with --decorrelated_layers full --wide_blocks 4" in caplog.text) == told


def test_flags_that_the_recipe_would_contradict_are_followed(capsys):
    layers = with_recommended(["--decorrelated-layers", "block_inputs"])
    assert layers[2:] == ["--wide_blocks", "1", "--config", RECOMMENDED]
    evaluated = with_recommended(["--eval_strategy=steps", "--eval_steps", "10"])
    assert evaluated[3:] == ["--save_strategy", "steps", "--save_steps", "10", "--config", RECOMMENDED]
    both = ["--eval_strategy", "no", "--save_strategy", "no", "--wide_blocks", "2"]
    assert with_recommended(both) == [*both, "--config", RECOMMENDED]


@pytest.mark.parametrize(
    "given",
    [
        ["--config", "demo.yaml"],
        ["--config=demo.yaml"],
        ["--budget", "1h"],
        ["--do_train"],
        ["--do_eval", "true"],
        ["-h"],
    ],
)
def test_a_user_who_has_decided_keeps_the_flags(given, capsys):
    line = ["--train_dir", "photos", *given]
    assert with_recommended(line) == line
    assert not capsys.readouterr().out


def test_the_script_still_asks_what_to_do(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["run_dbp_mae.py"])
    from hf_dbp.pretraining import main

    with pytest.raises((UserError, SystemExit)):
        main([photos, "--output_dir", str(tmp_path / "run"), *SMALL])
    assert "nothing to do: give --do_train" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("given", "warning"),
    [
        (["--do_train"], "5e-5, is far too low for pre-training: give --learning_rate, such as 2e-3 or"),
        (["--do_train", "--optimizer", "adai"], "none was measured"),
        (["--config", RECOMMENDED, "--optimizer", "soap"], f"1e-2 of {RECOMMENDED} is meant for muon"),
        (["--config=demo.yaml", "--optimizer=adamw"], "4e-3 of demo.yaml is meant for muon"),
        (
            ["--config", RECOMMENDED, "--config", "demo.yaml", "--optimizer", "soap"],
            "4e-3 of demo.yaml is meant for muon",
        ),
        (["--config", "demo.yaml", "--config", "OWN"], None),
        (["--config", "OWN"], "5e-5, is far too low for pre-training"),
        (["--config", "PLAN", "--budget", "1h", "--optimizer", "adamw"], "4e-3 of PLAN is meant for muon"),
        (["--config", "PLAN", "--budget", "1h", "--optimizer", "muon"], None),
        (["--do_train", "--learning-rate", "1e-3"], None),
        (["--do_train", "--learning_rate", "1e-3"], None),
        (["--do_train", "--base_learning_rate=1e-3"], None),
        (["--config", RECOMMENDED], None),
        (["--config", RECOMMENDED, "--optimizer", "muon"], None),
        (["--config", RECOMMENDED, "--optimizer", "adamw", "--learning_rate", "2e-3"], None),
        (["--do_eval"], None),
        (["--do_train", "--model_name_or_path", "facebook/vit-mae-base"], None),
        (["--config", RECOMMENDED, "--optimizer", "adamw", "--do_train", "false"], None),
    ],
)
def test_a_learning_rate_that_nobody_chose_is_named(given, warning, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("OWN").write_text("do_train: true\n")
    Path("PLAN").write_text("do_train: true\nlearning_rate: 4e-3\n")  # of a budget, whose optimizer was given
    with caplog.at_level(logging.WARNING):
        line = ["--train_dir", "photos", "--output_dir", "run", *given]
        warn_of_learning_rate(line, parse_arguments(GROUPS, line)[-1].do_train)
    assert (warning in caplog.text) if warning else not caplog.records
