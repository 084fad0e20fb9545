"""Fine-tuning takes a budget of time as pre-training does."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from hf_dbp.downstream import finetuning as shared
from hf_dbp.downstream.segmentation import budget_choices, finetuning
from hf_dbp.downstream.segmentation.arguments import GROUPS, ModelArguments
from hf_dbp.downstream.segmentation.budget_choices import choose, timed
from hf_dbp.downstream.segmentation.data import LabelledImages
from hf_dbp.downstream.segmentation.sliding import window_origins
from hf_dbp.recipes import parse_arguments
from hf_dbp.training import budget
from hf_dbp.training.budget_plan import Timed, with_plan

FLAGS = [
    *("wire_bonding", "--built_in_size", "48", "--max_train_samples", "8", "--max_eval_samples", "3"),
    *("--crop_size", "32", "--long_edge", "40", "--head_size", "8", "--auxiliary_head_size", "8"),
    *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2", "--learning_rate", "1e-3"),
    *("--use_cpu", "--report_to", "none", "--disable_tqdm", "1", "--logging_steps", "1"),
]
NAMES = {0: "background", 1: "square", 2: "speck"}


@pytest.mark.slow
def test_fine_tuning_ends_in_time_along_the_schedule(vit, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def look():
        clock.now += 0.1
        return clock.now

    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=look))
    monkeypatch.setattr(shared, "command_began", lambda: clock.now)
    vit(num_channels=2).save_pretrained(tmp_path / "vit")
    where = ["--model_name_or_path", str(tmp_path / "vit"), "--output_dir", str(tmp_path / "out")]
    record = finetuning.main([*FLAGS, *where, "--budget", "20s"])
    assert record["budget"]["seconds"] == 20
    assert 0.9 * 20 <= clock.now <= 1.05 * 20
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    rates = [row["learning_rate"] for row in state["log_history"] if "learning_rate" in row]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(1e-3, rel=0.1)
    assert rates[0] < 0.5e-3 and peak < 0.3 * len(rates)
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and rates[-1] < 0.2e-3
    assert 2 <= len(record["evaluations"]) <= 4


def labelled(count, size, rare=0):
    """Pairs of an image and a mask with a large square; ``rare`` of them have a small one too."""
    mask = np.zeros(size, np.int32)
    mask[: size[0] // 2, : size[1] // 2] = 1
    small = mask.copy()
    small[-8:, -8:] = 2
    samples = [{"image": np.zeros((*size, 3), np.uint8), "mask": small if i < rare else mask} for i in range(count)]
    return LabelledImages(samples, ("image", "mask"), num_labels=3, ignore_index=255)


def reasons(train, seconds):
    made = choose(train, labelled(4, (96, 96)), NAMES, seconds, Timed(64, 0.01, 0.002), patch=8)
    return {choice.flag: choice.reason for choice in made}


def choices(train, seconds, *, step=0.01, forward=0.002, side=64, validation=None):
    validation = labelled(4, (96, 96)) if validation is None else validation
    made = choose(train, validation, NAMES, seconds, Timed(side, step, forward), patch=8)
    assert all(choice.reason and "\n" not in choice.reason for choice in made)
    return {choice.flag: choice.value for choice in made}


def test_more_time_buys_larger_crops_up_to_the_images():
    sides = [choices(labelled(40, (256, 300)), seconds)["crop_size"] for seconds in (1, 60, 180, 600, 10**6)]
    assert sides == sorted(sides) and (sides[0], sides[-1]) == (64, 256) and len(set(sides)) > 2
    assert choices(labelled(40, (100, 300)), 10**6)["crop_size"] == 96
    assert choices(labelled(40, (40, 50)), 10**6)["crop_size"] == 64  # smaller images are padded
    said = {seconds: reasons(labelled(40, (256, 300)), seconds)["crop_size"] for seconds in (1, 600)}
    assert said[1].startswith("the smallest of 64") and said[600].startswith("the largest of 64")


def test_rare_classes_get_crops_dice_and_weights():
    with_specks, without = choices(labelled(40, (128, 128), rare=40), 60), choices(labelled(40, (128, 128)), 60)
    assert with_specks["rare_crops"] == 0.33 and with_specks["loss"] == "ce+dice"
    assert reasons(labelled(40, (128, 128), rare=40), 60)["rare_crops"].endswith("a quarter of an even share")
    assert not {"rare_crops", "loss", "class_weights"} & without.keys()


def test_crops_are_whole_patches_and_one_that_is_given_is_reckoned_with():
    """Patches of 14, as DINOv2's, divide none of the round numbers."""
    for patch in (8, 14, 16, 96):
        sides = budget_choices.sides_of(patch)
        assert sides == sorted(set(sides)) and not [side for side in sides if side % patch]
    validation = labelled(100, (256, 256))
    most = []
    for crop in (64, 256):
        made = choose(validation, validation, NAMES, 100, Timed(64, 0.01, 0.01), 8, given=crop)
        most.append({choice.flag: choice.value for choice in made}["max_eval_samples"])
    assert most[0] != most[1]


def test_the_reason_of_the_scale_is_whole():
    thin = labelled(8, (256, 300))
    for sample in thin.samples:
        sample["mask"][:, 200] = sample["mask"][:, 250] = 2  # lines of one pixel
    said = reasons(thin, 60)["long_edge"]
    assert said.startswith("native resolution (long_edge: 0)") and said.endswith("a cell of the feature maps, 2 pixels")
    assert "; the smallest objects" in said


def test_evaluations_take_a_share_of_the_budget():
    """Of images larger than the crop, windows count."""
    large = labelled(100, (256, 256))
    assert "max_eval_samples" not in choices(large, 10**6, validation=large)
    few = choices(large, 100, validation=large, forward=0.01)
    windows = len(window_origins(256, few["crop_size"])) ** 2
    each = windows * 0.01 * (few["crop_size"] / 64) ** 2
    assert few["max_eval_samples"] * each <= 0.06 * 100 < (few["max_eval_samples"] + 1) * each


def test_the_plan_names_the_encoder_and_yields_to_flags(vit, tmp_path, monkeypatch):
    vit(num_channels=2).save_pretrained(tmp_path / "vit")
    monkeypatch.setattr(budget_choices, "timed", lambda *_: Timed(64, 0.01, 0.001))
    given = ["--dataset_name", "wire_bonding", "--built_in_size", "96", "--max_train_samples", "8", "--num_labels", "5",
             "--budget=1m", "--model_name_or_path", str(tmp_path / "vit"), "--head_size", "8", "--token", "secret",
             "--output_dir", str(tmp_path / "out")]  # fmt: skip
    words = with_plan(given, GROUPS, budget_choices.chosen)
    text = (tmp_path / "out" / "budget.yaml").read_text()
    plan = yaml.safe_load(text)
    assert words == ["--config", str(tmp_path / "out" / "budget.yaml"), *given]
    assert plan["model_name_or_path"] == str(tmp_path / "vit") and plan["crop_size"] in (64, 96)
    assert plan["head_size"] == 8 and "a wide head" not in text.partition("head_size")[2].partition("\n")[0]
    assert "secret" not in text
    model_args, data_args, args = parse_arguments(GROUPS, words)
    assert (model_args.head_size, data_args.crop_size, args.budget) == (8, plan["crop_size"], "1m")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["budget.yaml"]


def test_an_eomt_has_a_loss_of_its_own_and_no_widths(vit, tmp_path, monkeypatch):
    vit().save_pretrained(tmp_path / "vit")
    images = labelled(40, (96, 96), rare=40), labelled(4, (96, 96))
    monkeypatch.setattr(budget_choices, "load_labelled_images", lambda _: images)
    monkeypatch.setattr(budget_choices, "timed", lambda *_: Timed(64, 0.01, 0.001))
    found = {}
    for head in ("upernet", "eomt"):
        flags = ["--train_dir", "unused", "--num_labels", "3", "--model_name_or_path", str(tmp_path / "vit")]
        parsed = parse_arguments(GROUPS, [*flags, "--head", head, "--output_dir", str(tmp_path / "out")])
        found[head] = {choice.flag: choice.value for choice in budget_choices.chosen(parsed, 60, {"head"})}
    own = {"loss", "class_weights", "head_size", "auxiliary_head_size"}
    assert own <= found["upernet"].keys()
    assert found["eomt"] == {flag: value for flag, value in found["upernet"].items() if flag not in own}
    assert "rare_crops" in found["eomt"]


@pytest.mark.parametrize("head", ["upernet", "eomt"])
def test_a_step_is_timed_with_the_head_that_will_be_used(vit, tmp_path, head):
    vit().save_pretrained(tmp_path / "vit")
    encoder = ModelArguments(model_name_or_path=str(tmp_path / "vit"), head=head)
    sizes = {"head_size": 8, "auxiliary_head_size": 8} if head == "upernet" else {}
    found = timed(encoder, {0: "a", 1: "b"}, 3, 32, sizes)
    assert found.side == 32 and found.forward > 0 and found.step > 0
    assert found.scaled(found.step, 64) == 4 * found.step
