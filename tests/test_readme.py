"""What the README and docs tell users to type is what works."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
from benchmark_scripts import load_benchmark
from PIL import Image
from transformers import BeitImageProcessorPil, ViTConfig, ViTModel

from hf_dbp import cli, pretraining
from hf_dbp.callbacks import DecorrelationArguments
from hf_dbp.comparison import runner as comparison
from hf_dbp.downstream import probe
from hf_dbp.downstream.classification import finetuning as classification
from hf_dbp.downstream.detection import finetuning as detection
from hf_dbp.downstream.segmentation import budget_choices, finetuning, retrieval
from hf_dbp.downstream.segmentation.upernet import build_upernet
from hf_dbp.training.arguments import ModelArguments, PretrainingArguments

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


class Taken(Exception):
    """A main took its arguments and was about to work."""


def typed_commands(text):
    """The command lines of a page, in bash blocks or indented, without comments and trailing dots."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [line for line in lines if re.match(r"\s*(make|python|accelerate launch|torchrun|hf-dbp) \S", line)]
    return [[part for part in shlex.split(line, comments=True) if part != "..."] for line in found]


def documented():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "results" / "README.md"]
    for page in pages:
        if page.name != "industrial.md":  # test_industrial runs it as written
            for command in typed_commands(page.read_text(encoding="utf-8")):
                yield pytest.param(command, id=f"{page.name}: {' '.join(command)}")


def runner(command):
    """The main that a command starts, and its arguments."""
    for number, part in enumerate(command):
        rest = command[number + 1 :]
        if part.startswith("training_scripts/"):
            source = (ROOT / part).read_text(encoding="utf-8")
            return importlib.import_module(re.search(r"from (\S+) import main", source)[1]).main, rest
        if part.startswith("benchmarks/"):
            return load_benchmark(Path(part).stem).main, rest
        if part == "-m":
            return importlib.import_module(rest[0]).main, rest[1:]
        if part == "hf-dbp":
            return cli.main, rest
    raise AssertionError(f"what does {command} run?")


@pytest.fixture
def parsing_alone(monkeypatch):
    """Mains stop with `Taken` once their arguments are parsed."""

    def stop(*args, **kwargs):
        raise Taken

    def parse_args(self, *args, **kwargs):
        whole(self, *args, **kwargs)
        raise Taken

    whole = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    for module, name in (
        (pretraining, "run"), (pretraining, "load_images"), (finetuning, "run"), (retrieval, "run"), (probe, "run"),
        (classification, "run"), (detection, "run"), (comparison, "run_plan"), (budget_choices, "load_labelled_images"),
        (detection, "chosen"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, stop)


@pytest.mark.parametrize("command", documented())
def test_commands_are_taken(command, parsing_alone, monkeypatch):
    if command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    main, arguments = runner([part.replace("RECIPE", "demo.yaml") for part in command])
    if "imagenet10_dbp.yaml" in arguments:
        arguments.append("--use_cpu")  # or bf16 wants a GPU
    monkeypatch.setattr("sys.argv", [command[0], *arguments])
    with pytest.raises(Taken):
        main()


def test_a_command_with_a_wrong_flag_is_not_taken(parsing_alone, monkeypatch):
    for script in sorted((ROOT / "training_scripts").glob("run_*.py")):
        main, _ = runner([f"training_scripts/{script.name}"])
        monkeypatch.setattr("sys.argv", ["run", "--learning_rat", "1"])
        with pytest.raises(SystemExit):
            main()


def test_every_flag_of_the_table_exists():
    groups = (ModelArguments, DecorrelationArguments, PretrainingArguments)
    known = {name for group in groups for name in group.__dataclass_fields__}
    flags = re.findall(r"`--(\w+)`", README)
    assert flags
    assert set(flags) - known <= {"config"}


def test_the_file_listing_is_the_package():
    """Every file and folder of the top floor and of the rooms whose files are listed is named, and nothing else is."""
    listing = README.split("```\nhf_dbp/\n")[1].split("```")[0].split("training_scripts/")[0]
    rooms, named = [ROOT / "hf_dbp"], {}
    for line in listing.splitlines():
        indent, names = re.match(r"( +)(.*?)(?:  |$)", line).groups()
        rooms = rooms[: len(indent) // 2]
        named.setdefault(rooms[-1], set()).add(names)
        assert (rooms[-1] / names).exists(), line
        if names.endswith("/"):
            rooms.append(rooms[-1] / names)
    for room, names in named.items():
        files = {path.name for path in room.glob("*.py") if not path.name.startswith("_")}
        missing = (files | {f"{path.parent.name}/" for path in room.glob("*/__init__.py")}) - names
        assert not {name for name in missing if name not in listing}, room
