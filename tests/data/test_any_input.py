"""Any content of a recipe, config.json, run.json or command line is either accepted or refused in one line.

Cases are valid inputs with something changed: values of other types, absurd numbers, unknown and missing keys, nesting,
Unicode, tags. Refusal is a UserError of one line, or argparse's exit status 2; never another exception.
"""

import contextlib
import dataclasses
import json
import math

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import made_run
from tiny import TINY
from transformers import AutoConfig

from hf_dbp.comparison.plans import plan_of, read_plan
from hf_dbp.comparison.runs import collect_runs, variant_of
from hf_dbp.config_limits import parameter_count
from hf_dbp.configuration_dbp_vit_mae import DBPViTMAEConfig
from hf_dbp.data.images import ImageSource
from hf_dbp.downstream.segmentation import arguments as finetuning
from hf_dbp.errors import UserError
from hf_dbp.hub.untrusted import known_fields, read_config
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining
from hf_dbp.pretraining import model_config
from hf_dbp.recipes import parse_arguments, recipe_arguments, recipe_names, recipe_path
from hf_dbp.records import RunRecord
from hf_dbp.training.arguments import GROUPS

CASES = [60, pytest.param(400, marks=pytest.mark.slow)]


def cases(*strategies):
    """Run a test, which takes a folder and drawn values, on 60 cases, and in the slow tier on 400."""

    def decorate(test):
        @pytest.mark.parametrize("count", CASES)
        def run(tmp_path, count):
            several = settings(
                max_examples=count,
                derandomize=True,
                deadline=None,
                database=None,
                suppress_health_check=[HealthCheck.too_slow],
            )
            several(given(st.tuples(*strategies))(lambda values: test(tmp_path, *values)))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


WORDS = [
    *(
        "",
        " ",
        "null",
        "~",
        "no",
        "true",
        "nan",
        "-inf",
        "1e999",
        "-1",
        "0",
        "1",
        "0.5",
        "10**9",
        "0x10",
        "1_000",
        "½",
        "١٢",
    ),
    *(
        "5e-4",
        "2020-13-45",
        "!!python/name:os.system",
        "*a",
        "&a",
        "{",
        "[",
        "]",
        "- ",
        "a: b",
        "'",
        '"',
        "#",
        "--",
        "-",
    ),
    *("../../etc/passwd", "/dev/null", "a\nb", "\t", "\x00", "é", "日本", "\U0001f600", "9" * 5000, "x" * 300, "None"),
    *(
        "demo.yaml",
        "adamw",
        "cosine",
        "polynomial",
        "epoch",
        "steps",
        "wire_bonding",
        "hf_" + "a" * 34,
        "[1, 2]",
        '{"a": 1}',
    ),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(WORDS),
    st.integers(-3, 300),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def changed(draw, valid):
    """A valid mapping of mappings with one to three things in it changed, at any depth."""
    content = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        at = content
        while True:
            keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and draw(st.booleans()):
                at = at[key]
                continue
            match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
                case "replace":
                    at[key] = draw(VALUES)
                case "remove":
                    del at[key]
                case "add" if isinstance(at, dict):
                    at[draw(st.sampled_from(["token", "extra", "é", "", "__class__", "--seed", "a b"]))] = draw(VALUES)
                case _:
                    at.append(draw(VALUES))
            break
    return content


@contextlib.contextmanager
def refusing():
    """Any refusal is a UserError of one line that says something, or argparse's exit."""
    try:
        yield
    except ValueError as error:
        assert isinstance(error, UserError), repr(error)
        assert "\n" not in str(error) and len(str(error)) > 15, str(error)
    except SystemExit as stop:
        assert stop.code == 2


def recipe(name):
    return yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))


PRETRAINING = recipe("demo.yaml") | {
    "eta": 5e-4,
    "lr_scheduler_kwargs": {"num_cycles": 1},
    "config_overrides": "num_hidden_layers=2",
    "train_dir": None,
}
FINETUNING = recipe("demo_upernet.yaml") | {"model_size": "mini"}
SEGMENTATION = finetuning.GROUPS


def use(groups):
    """What a run does with its flags before it reads data."""
    by_type = {type(group).__name__: group for group in groups}
    data, model = by_type["DataArguments"], by_type["ModelArguments"]
    if hasattr(data, "source"):
        data.source(model.cache_dir, model.token)
    else:
        ImageSource(**dataclasses.asdict(data), cache_dir=model.cache_dir, token=model.token)
        if not (model.config_name or model.model_name_or_path):
            model_config(model, 3)


@cases(st.one_of(changed(PRETRAINING), changed(FINETUNING)), st.sampled_from(["", "# é\n", "\ufeff", "---\n", "- a\n"]))
def test_recipes(tmp_path, content, before):
    file = tmp_path / "recipe.yaml"
    with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
        file.write_text(before + yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    groups = SEGMENTATION if "crop_size" in content else GROUPS
    with refusing():
        use(parse_arguments(groups, ["--config", str(file), "--use_cpu", "true", "--bf16", "false"]))


@cases(st.sampled_from(recipe_names()), st.integers(0, 10**4), st.sampled_from(WORDS), st.integers(0, 3))
def test_recipes_that_are_cut_and_pasted(tmp_path, name, at, word, length):
    text = recipe_path(name).read_text(encoding="utf-8")
    at %= len(text)
    (tmp_path / "recipe.yaml").write_text(text[:at] + word + text[at + length :], encoding="utf-8")
    with refusing():
        recipe_arguments(str(tmp_path / "recipe.yaml"))


ARGUMENTS = [(key, value) for key, value in PRETRAINING.items() if value is not None]


@cases(
    st.lists(st.sampled_from(ARGUMENTS), max_size=6),
    st.lists(
        st.tuples(
            st.sampled_from([field.name for group in GROUPS for field in dataclasses.fields(group)]),
            st.one_of(st.sampled_from(WORDS), st.integers().map(str), st.floats().map(str), st.text(max_size=8)),
        ),
        min_size=1,
        max_size=2,
    ),
    st.booleans(),
)
def test_flags(tmp_path, valid, odd, joined):
    arguments = ["--use_cpu", "true"]
    for key, value in [*valid, *odd]:
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        arguments += [f"--{key}={text}"] if joined else [f"--{key}", text]
    with refusing():
        use(parse_arguments(GROUPS, arguments))


CONFIG = json.loads(DBPViTMAEConfig(**TINY).to_json_string(use_diff=False))


@cases(changed(CONFIG))
def test_configurations(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    if content.get("model_type") == "dbp_vit_mae":
        with refusing():
            AutoConfig.from_pretrained(tmp_path)
    with refusing():
        fields = known_fields(read_config(tmp_path), DBPViTMAEConfig)
        depths = fields.get("num_hidden_layers", 12), fields.get("decoder_num_hidden_layers", 8)
        if parameter_count(fields) < 10**8 and max(depths) < 20:
            with torch.device("meta"):
                DBPViTMAEForPreTraining(DBPViTMAEConfig(**fields))


RECORD = json.loads(json.dumps({"schema": 1} | dataclasses.asdict(made_run().record)))


@cases(changed(RECORD))
def test_run_records(tmp_path, content):
    (tmp_path / "run.json").write_text(json.dumps(content))
    with refusing():
        read = RunRecord.read(tmp_path / "run.json")
        variant_of(read)
        assert read.best is None or math.isfinite(read.best["eval_loss"])
        read.write(tmp_path / "again.json")
        runs = collect_runs([str(tmp_path)])
        assert runs[0].diverged in (True, False)
        plan_of(runs)


PLAN = recipe("compare_methods.yaml") | {"seeds": [0, 1], "against": None}


@cases(changed(PLAN))
def test_plans(tmp_path, content):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    with refusing():
        read_plan(str(tmp_path / "plan.yaml"))
