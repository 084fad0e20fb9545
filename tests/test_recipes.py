"""Recipes become flags under the user's own, with values read by the flags' types."""

from dataclasses import dataclass, field

import pytest

from hf_dbp.callbacks import DecorrelationArguments
from hf_dbp.recipes import parse_arguments, recipe_arguments, recipe_names
from hf_dbp.training.arguments import DataArguments, ModelArguments, PretrainingArguments

PRETRAINING = (ModelArguments, DataArguments, DecorrelationArguments, PretrainingArguments)


@dataclass
class Flags:
    learning_rate: float = 0.0
    eval_strategy: str = "epoch"
    bf16: bool = True
    image_size: list[int] = field(default_factory=list)
    note: str | None = "unset"


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_values_keep_the_meaning_of_their_flag(tmp_path):
    """YAML alone would read 5e-4 as a string and `no` as False."""
    recipe = write(tmp_path, "learning_rate: 5e-4\neval_strategy: no\nbf16: false\nimage_size: [32, 64]\nnote: null\n")
    (flags,) = parse_arguments([Flags], ["--config", recipe])
    assert flags == Flags(5e-4, "no", False, [32, 64], "unset")


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_the_users_flags_win_wherever_they_stand(tmp_path, form):
    config = [part.format(write(tmp_path, "learning_rate: 1.0\nbf16: false")) for part in form]
    for arguments in (["--learning_rate", "2.0", *config], [*config, "--learning_rate", "2.0"]):
        (flags,) = parse_arguments([Flags], arguments)
        assert (flags.learning_rate, flags.bf16) == (2.0, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "must be a mapping"),
        ("a: [1", "not readable YAML"),
        ("1 2: 3", "not a flag name"),
        ("note: !!python/object/apply:os.system ['true']", "not readable YAML"),
        ("note: !!python/name:os.system", "not readable YAML"),
        ("note: &a [1, 2]\nimage_size: *a", r"an alias \(\*name\)"),
        ("note: 2020-13-45", "not readable YAML: month"),
        ("note: " + "[" * 1000, "not readable YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        recipe_arguments(write(tmp_path, text))


def test_a_plan_is_told_from_a_recipe():
    with pytest.raises(ValueError, match=r"is the plan of a comparison.*: hf-dbp compare --plan compare_methods.yaml"):
        parse_arguments(PRETRAINING, ["--config", "compare_methods.yaml"])


def test_unknown_recipes_and_flags_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe 'nowhere.yaml'.*demo.yaml"):
        parse_arguments([Flags], ["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="--config needs a recipe"):
        parse_arguments([Flags], ["--config"])
    with pytest.raises(ValueError, match="unknown flag --learnin_rate; did you mean --learning_rate"):
        parse_arguments([Flags], ["--config", write(tmp_path, "learnin_rate: 1")])


PAPER = {  # section 2.3 of the paper
    "learning_rate": {"imagenet10_dbp.yaml": 1e-3, "imagenet10_bp.yaml": 5e-4},
    "method": {"imagenet10_dbp.yaml": "dbp", "imagenet10_bp.yaml": "bp"},
    "num_train_epochs": 1000,
    "warmup_steps": 40 / 1000,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
    "model_size": "base",
    "image_size": [224],
    "patch_size": 16,
    "train_fraction": 0.1,
}
PAPER_DBP = {"eta": 5e-4, "eta_schedule": "constant", "sample_fraction": 0.1, "kappa": 0.0, "update_interval": 1}
PAPER_DBP |= {"bound_eta": False}


@pytest.mark.parametrize("recipe", ["imagenet10_dbp.yaml", "imagenet10_bp.yaml"])
def test_the_papers_recipes_hold_the_papers_values(recipe, tmp_path):
    groups = parse_arguments(PRETRAINING, ["--config", recipe, "--bf16", "false", "--output_dir", str(tmp_path)])
    values = {name: getattr(group, name) for name in PAPER | PAPER_DBP for group in groups if hasattr(group, name)}
    expected = PAPER | (PAPER_DBP if "dbp" in recipe else {})
    for name, value in expected.items():
        assert values[name] == (value[recipe] if isinstance(value, dict) else value), name
    training = groups[3]
    gpus = 2  # the paper's
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * gpus
    assert batch == 4096
    assert groups[2].row_floor is None
    assert groups[2].row_cap is None


@pytest.mark.parametrize("recipe", ["small_photographs.yaml", "demo.yaml"])
def test_recipes_whose_figures_we_quote_keep_their_interval(recipe):
    """They were measured before the default became 5."""
    arguments = recipe_arguments(recipe)
    assert arguments[arguments.index("--update_interval") + 1] == "1"


def test_every_shipped_recipe_is_read():
    for name in recipe_names():
        assert recipe_arguments(name)
