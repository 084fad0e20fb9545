"""run.json: what is written can be read, and nothing secret or invented is in it."""

import ast
import json
import math
from pathlib import Path

import pytest

import hf_dbp
from hf_dbp.records import RunRecord, arguments_record, without_secrets
from hf_dbp.training.arguments import ModelArguments


def record(*losses):
    rows = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    return RunRecord("pretraining", "dbp", "adamw", 0, rows=rows)


def test_a_record_survives_writing_and_reading(tmp_path):
    before = record(2.0, 1.0, 1.5)
    before.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json") == before
    assert json.loads((tmp_path / "run.json").read_text())["best"] == {"step": 1, "eval_loss": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_best_is_the_lowest_finite_row_and_absent_without_rows():
    assert record(3.0, math.nan, 2.0).best["step"] == 2
    assert record().best is None


def test_a_resumed_run_replaces_the_rows_it_repeats():
    resumed = record(4.0, 3.0, 2.0)
    resumed.add_row({"step": 1, "eval_loss": 3.5})
    assert [row["eval_loss"] for row in resumed.rows] == [4.0, 3.5]


def test_tokens_are_left_out():
    assert "token" not in arguments_record(ModelArguments(token="hf_secret"))
    assert "hf_secret" not in json.dumps(arguments_record(ModelArguments(token="hf_secret")))
    given = ["--seed", "1", "--token", "hf_secret", "--hub_token=hf_secret", "--push_to_hub"]
    assert without_secrets(given) == ["--seed", "1", "--token", "...", "--hub_token=...", "--push_to_hub"]


@pytest.mark.parametrize("flag", ["token", "hub_token", "hub-token", "wandb_token"])
def test_tokens_of_any_name_and_spelling_are_left_out(flag):
    assert without_secrets([f"--{flag}", "s", f"--{flag}=s", "s"]) == [f"--{flag}", "...", f"--{flag}=...", "s"]
    assert without_secrets(["--num_tokens", "3", "--tokenizer", "x"]) == ["--num_tokens", "3", "--tokenizer", "x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", "schema"), ('{"schema": 2}', "schema"), ('{"schema": 1}', "not a complete run record")],
)
def test_what_is_no_record_is_refused(tmp_path, content, message):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        RunRecord.read(tmp_path / "run.json")


def test_what_is_not_finite_is_null_on_disk_and_nan_again_when_read(tmp_path):
    """JSON has no NaN: other programs read every file that is written."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    written = record(3.0, math.nan, math.inf)
    written.results["mean_iou"] = math.nan
    written.write(tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert [row["eval_loss"] for row in content["rows"]] == [3.0, None, None]
    assert content["results"] == {"mean_iou": None}
    again = RunRecord.read(tmp_path / "run.json")
    assert math.isnan(again.rows[1]["eval_loss"])
    assert again.best["eval_loss"] == 3.0


#: where what is not a number may pass: flags before `write_json`, a value of a recipe, an example that needs no hf_dbp
ELSEWHERE = {"records.py", "recipes/__init__.py", "downstream/onnx_run.py"}


def test_whatever_else_is_written_as_json_cannot_hold_what_is_not_finite():
    """This holds for caches and journals too, which do not go through `write_json`."""
    package, found = Path(hf_dbp.__file__).parent, []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                strict = any(key.arg == "allow_nan" and ast.unparse(key.value) == "False" for key in node.keywords)
                found.append((file.relative_to(package).as_posix(), strict))
    assert {name for name, strict in found if not strict} == ELSEWHERE
    assert len(found) > 10
