"""Each flag says what it does to a run, and whatever depends on that follows."""

import dataclasses
from typing import Annotated, Any, ClassVar

import pytest
from flags_page import COMMANDS
from transformers import HfArgumentParser, TrainingArguments

from hf_dbp.callbacks import DecorrelationArguments
from hf_dbp.comparison.runs import settings
from hf_dbp.downstream.segmentation.arguments import FinetuningArguments
from hf_dbp.downstream.segmentation.retrieval import RetrievalArguments, RetrievalData
from hf_dbp.downstream.segmentation.trainer import SegmentationTrainer
from hf_dbp.flags import own_flags
from hf_dbp.natures import Nature, natures
from hf_dbp.records import RunRecord
from hf_dbp.training.arguments import GROUPS, PretrainingArguments, RunArguments
from hf_dbp.training.restoring import changed_arguments, compared_arguments

STOCK = {field.name for field in dataclasses.fields(TrainingArguments)}
CLASSES = [*dict.fromkeys(kind for kinds in COMMANDS.values() for kind in kinds), RetrievalArguments, RetrievalData]


def undeclared(group: type) -> list[str]:
    """Flags of ours that do not say what they do."""
    return [name for name in own_flags(group) if name not in STOCK and name not in natures(group)]


@pytest.mark.parametrize("group", CLASSES, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_flag_of_ours_says_what_it_does(group: type) -> None:
    assert undeclared(group) == []


def test_a_new_flag_that_says_nothing_is_found() -> None:
    @dataclasses.dataclass
    class More(PretrainingArguments):
        speed: int = 0

    More.__module__ = "hf_dbp.more"
    assert undeclared(More) == ["speed"]


@pytest.mark.parametrize("group", [PretrainingArguments, FinetuningArguments])
def test_the_flags_of_training_arguments_stand_in_one_table(group: type[RunArguments]) -> None:
    """The natures of existing flags, and no others; a flag redeclared with another default states no nature."""
    assert group.STOCK.keys() <= STOCK
    annotated = {name for name in natures(group) if name not in group.STOCK}
    assert not annotated & STOCK


def test_a_class_below_may_say_it_otherwise() -> None:
    @dataclasses.dataclass
    class One:
        a: Annotated[int, Nature("data")] = 0
        b: Annotated[int, Nature("nothing")] = 0
        d: Annotated[int, Nature("method")] = 0
        STOCK: ClassVar = {"c": Nature("training")}

    @dataclasses.dataclass
    class Two(One):
        b: Annotated[int, Nature("model")] = 0
        d: int = 1  # another default; the nature stays
        STOCK: ClassVar = {"c": Nature("chance")}

    assert {name: nature.shapes for name, nature in natures(Two).items()} == {
        "a": "data",
        "b": "model",
        "d": "method",
        "c": "chance",
    }
    assert natures(One)["c"].shapes == "training"


def test_transformers_own_parser_reads_annotated_flags() -> None:
    """Scripts pass our classes to it."""
    (arguments,) = HfArgumentParser(DecorrelationArguments).parse_args_into_dataclasses(["--eta", "0.25"])
    assert arguments.eta == 0.25


def record(**fields: Any) -> RunRecord:
    """A record that asks nobody for versions and hardware."""
    known = {"task": "pretraining", "method": "dbp", "optimizer": "adamw", "seed": 1, "commit": "unknown"}
    return RunRecord(**known | {"versions": {"python": "3"}, "hardware": {"cores": 1}} | fields)


def value_of(name: str, which: str) -> str:
    return f"{which} {name}"


@pytest.mark.parametrize("method", ["dbp", "bp"])
def test_a_resumed_run_tells_what_its_flags_say(method: str) -> None:
    """Each flag of pre-training, changed alone, is told, refused or ignored as declared."""
    flags = natures(*GROUPS)
    same = {name: value_of(name, "old") for name in flags} | {"method": method, "optimizer": "adamw", "seed": 1}
    before = record(method=method, arguments=same)
    for name, flag in flags.items():
        if name in ("method", "optimizer", "seed"):
            continue
        now = record(method=method, arguments=same | {name: value_of(name, "new")})
        if flag.on_resume == "refused" and (method == "dbp" or not flag.dbp):
            with pytest.raises(ValueError, match=f"with --{name} old {name}, not new {name}"):
                changed_arguments(before, now, "checkpoint-1")
        else:
            told = flag.on_resume == "told" and (method == "dbp" or not flag.dbp)
            expected = {name: [value_of(name, "old"), value_of(name, "new")]} if told else {}
            assert changed_arguments(before, now, "checkpoint-1") == expected
    for other in ({"method": "stock"}, {"optimizer": "muon"}, {"seed": 2}):
        now = record(**{"method": method} | other)
        with pytest.raises(ValueError, match=f"--{min(other)}"):
            changed_arguments(before, now, "checkpoint-1")


def test_fine_tuning_refuses_other_images_and_tells_the_rest() -> None:
    flags = SegmentationTrainer.natures()
    before = {name: value_of(name, "old") for name in flags}
    for name in ("train_dir", "palette", "num_labels", "crop_size", "model_name_or_path", "optim", "seed"):
        with pytest.raises(ValueError, match=f"--{name}"):
            compared_arguments(before, before | {name: None}, flags, "checkpoint-1")
    for name in ("learning_rate", "loss", "long_edge", "gradient_accumulation_steps"):
        assert compared_arguments(before, before | {name: 7}, flags, "c-1") == {name: [before[name], 7]}
    for name in ("max_unreadable", "cache_dir", "logging_steps", "detection_recall"):
        assert compared_arguments(before, before | {name: 7}, flags, "c-1") == {}


def test_settings_of_a_comparison_are_what_the_result_depends_on() -> None:
    assert {"train_dir", "image_size", "learning_rate", "eta", "per_device_train_batch_size"} <= set(settings())
    assert not {"method", "optimizer", "seed", "data_seed", "cache_dir", "output_dir", "budget"} & set(settings())
