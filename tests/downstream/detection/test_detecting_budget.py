"""A budget of time chooses the view, the queries and the decoder of a detector, and ends in time."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from object_images import object_folder
from transformers import ViTConfig, ViTModel

from hf_dbp.downstream import finetuning as shared
from hf_dbp.downstream.detection import budget_choices
from hf_dbp.downstream.detection.arguments import GROUPS
from hf_dbp.downstream.detection.budget_choices import EVALUATED, STEPS, TRAINED, choose, timed
from hf_dbp.downstream.detection.data import ObjectList, Oddities
from hf_dbp.downstream.detection.finetuning import main
from hf_dbp.downstream.detection.objects import Objects
from hf_dbp.inspection.object_survey import SMALL_DETECTOR
from hf_dbp.recipes import parse_arguments
from hf_dbp.training import budget
from hf_dbp.training.budget_plan import Timed, with_plan

SIDE, PATCH = 64, 8


def objects(thickness: float, number: int = 4, images: int = 40) -> ObjectList:
    """Images of 400 pixels with so many squares each."""
    boxes_N4 = np.tile([10.0, 10.0, 10.0 + thickness, 10.0 + thickness], (number, 1))
    crowd_N = np.zeros(number, bool)
    one = Objects((400, 400), boxes_N4, np.zeros(number, np.int64), np.full(number, thickness**2), crowd_N)
    return ObjectList([one] * images, ["square"], Oddities())


def choices(thickness: float, seconds: float, *, step: float = 0.01, **more: Any) -> dict[str, Any]:
    at = Timed(SIDE, step, step / 4)
    made = choose(objects(thickness, more.pop("number", 4)), 40, more.pop("validation", 8), seconds, at, PATCH, **more)
    assert all(choice.reason and "\n" not in choice.reason for choice in made)
    return {choice.flag: choice.value for choice in made}


def test_more_time_buys_larger_views_up_to_what_the_objects_ask_for() -> None:
    sizes = [choices(20, seconds)["image_size"] for seconds in (1, 30, 60, 120, 10**6)]
    assert sizes == sorted(sizes) and len(set(sizes)) > 2
    assert sizes[0] == SIDE and sizes[-1] == 160  # a patch of 8 pixels on 20 of 400
    assert not [size for size in sizes if size % PATCH]
    assert choices(200, 10**6)["image_size"] == SIDE  # large objects ask for no more than the encoder's own size
    chosen = choices(20, 60)
    steps = TRAINED * 60 / (chosen["per_device_train_batch_size"] * 0.01 * (chosen["image_size"] / SIDE) ** 2)
    larger = steps * (chosen["image_size"] / (chosen["image_size"] + PATCH)) ** 2
    assert larger < STEPS <= steps


def test_queries_start_from_patches() -> None:
    assert choices(20, 1, number=90)["num_queries"] == (SIDE // PATCH) ** 2
    assert choices(20, 10**6, number=90)["num_queries"] > 90


def test_evaluations_take_a_share_of_the_budget() -> None:
    assert "max_eval_samples" not in choices(200, 10**6, validation=1000)
    few = choices(200, 100, validation=10000)["max_eval_samples"]
    assert few * 0.01 / 4 <= EVALUATED * 100 < (few + 1) * 0.01 / 4


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                       image_size=32, patch_size=8)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.mark.parametrize("instances", [False, True])
def test_a_step_is_timed_with_the_decoder_that_will_be_used(encoder: str, instances: bool) -> None:
    head = {"query_groups": 1, "decoder_layers": 1, "decoder_width": 32, "instances": instances, "num_windows": 1}
    found = timed(ViTModel.from_pretrained(encoder, add_pooling_layer=False), ["a", "b"], 32, head)
    assert found.side == 32 and found.step > 0 and found.forward > 0


def test_the_plan_yields_to_flags(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, heads = object_folder(tmp_path / "data"), []
    monkeypatch.setattr(budget_choices, "timed", lambda *args: heads.append(args) or Timed(32, 0.01, 0.001))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["--train_dir", str(folder / "images"), "--train_mask_dir", str(folder / "labels.json")]
    given += ["--budget", "1m", "--decoder_width", "32", "--model_name_or_path", encoder]
    given += ["--output_dir", str(tmp_path / "out")]
    words = with_plan(given, GROUPS, budget_choices.chosen)
    assert heads[0][2] == 32 and heads[0][3]["decoder_width"] == 32 and heads[0][3]["query_groups"] == 3
    plan = yaml.safe_load((tmp_path / "out" / "budget.yaml").read_text())
    assert plan["decoder_width"] == 32 and plan["decoder_layers"] == SMALL_DETECTOR["decoder_layers"]
    model_args, _, args = parse_arguments(GROUPS, words)
    assert (model_args.decoder_width, model_args.image_size, args.learning_rate) == (32, [plan["image_size"]], 1e-3)


@pytest.mark.slow
def test_a_detector_ends_in_time(encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)

    def look() -> float:
        clock.now += 0.1
        return clock.now

    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=look))
    monkeypatch.setattr(shared, "command_began", lambda: clock.now)
    folder, output = object_folder(tmp_path / "data"), tmp_path / "out"
    own = [str(folder / "images"), str(folder / "labels.json"), "--output_dir", str(output), "--use_cpu"]
    record = main([*own, "--model_name_or_path", encoder, "--budget", "20s"])
    assert record["budget"]["seconds"] == 20 and 0.9 * 20 <= clock.now <= 1.05 * 20
    assert (output / "budget.yaml").is_file() and record["arguments"]["decoder_width"] == 128
