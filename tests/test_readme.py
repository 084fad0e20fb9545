"""What the README and docs tell users to type is what works."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from transformers import BeitImageProcessorPil, ViTConfig, ViTModel

from hf_dbp.callbacks import DecorrelationArguments
from hf_dbp.pretraining import DataArguments, ModelArguments, PretrainingArguments
from hf_dbp.recipes import parse_arguments
from hf_dbp.segmentation.upernet import build_upernet

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def segmenter(folder):
    """The model and the picture that the example of segmentation speaks of."""
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    model = build_upernet(
        ViTModel(config, add_pooling_layer=False), {0: "road", 1: "sky"}, ignore_index=255, hidden_size=8,
        auxiliary_channels=8,
    )  # fmt: skip
    model.save_pretrained(folder / "segmenter")
    BeitImageProcessorPil(do_center_crop=False, size={"max_height": 32, "max_width": 32}).save_pretrained(
        folder / "segmenter"
    )
    Image.new("RGB", (60, 40)).save(folder / "street.png")


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python_runs_as_written(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "segmenter" in code:
        segmenter(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def commands():
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_exist_and_take_these_flags(command, tmp_path):
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    script = next(part for part in command if part.endswith(".py"))
    assert (ROOT / script).is_file()
    if script.endswith("run_dbp_mae.py"):
        groups = (ModelArguments, DataArguments, DecorrelationArguments, PretrainingArguments)
        parse_arguments(groups, [*command[command.index(script) + 1 :], "--use_cpu"])


def test_every_flag_of_the_table_exists():
    groups = (ModelArguments, DecorrelationArguments, PretrainingArguments)
    known = {name for group in groups for name in group.__dataclass_fields__}
    flags = re.findall(r"`--(\w+)`", README)
    assert flags
    assert set(flags) - known <= {"config"}


def test_the_file_listing_is_the_package():
    listing = README.split("```\nhf_dbp/\n")[1].split("```")[0]
    named = set(re.findall(r"(\w+)\.py", listing)) | set(re.findall(r"^  .*?(\w+)/", listing, flags=re.MULTILINE))
    package = ROOT / "hf_dbp"
    actual = {path.stem for path in package.glob("*.py")} | {p.parent.name for p in package.glob("*/__init__.py")}
    assert named == actual - {"__init__"}
