"""A budget of time: what is chosen, how the schedule is laid, that it ends in time and resumes with the rest."""

import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_dbp import DecorrelationArguments, DecorrelationCallback, cli, pretraining
from hf_dbp.cli import main
from hf_dbp.configuration_dbp_vit_mae import SIZES
from hf_dbp.data.images import ImageList
from hf_dbp.errors import UserError
from hf_dbp.training import budget, budget_plan, duration
from hf_dbp.training.arguments import GROUPS, PretrainingArguments
from hf_dbp.training.budget import BudgetCallback, schedule
from hf_dbp.training.budget_plan import LADDER, choose, cost, images_first, with_plan, write_plan
from hf_dbp.training.duration import command_began, noted_beginning, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("30m", 1800), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400), ("45", 45), (" 10M ", 600)],
)
def test_durations_are_read_as_written(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0m", "2 hours", "-5m", "m", "1h2h", "nan"])
def test_other_texts_are_no_durations(text):
    with pytest.raises(ValueError, match="give a time such as 2h, 30m"):
        parse_duration(text)


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_schedule_warms_up_and_falls_as_a_cosine(a, b):
    low, high = sorted((a, b))
    assert 0 <= schedule(low) <= 1
    if high < 0.05:
        assert schedule(low) <= schedule(high)
    elif low >= 0.05:
        assert schedule(low) >= schedule(high)
    assert (schedule(0), schedule(0.05), schedule(1)) == (0, 1, pytest.approx(0))
    assert schedule(0.525) == pytest.approx(0.5)


def test_a_command_begins_before_its_imports(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(duration.time, "monotonic", lambda: next(clock))
    with noted_beginning():
        assert command_began() == command_began() == 0
    assert command_began() == 1


def test_a_command_line_begins_with_its_process(monkeypatch):
    """Python's own start takes seconds on a busy machine."""
    code = "import time; from hf_dbp.training.duration import process_began; print(time.monotonic() - process_began())"
    before = time.monotonic()
    ago = float(subprocess.run([sys.executable, "-c", "import time; time.sleep(1.3); " + code], capture_output=True,
                               text=True, check=True).stdout)  # fmt: skip
    assert 0.3 < ago < time.monotonic() - before + 1  # the kernel says when it booted in whole seconds
    seen = []
    monkeypatch.setattr(pretraining, "main", lambda arguments: seen.append(command_began()))
    monkeypatch.setattr(cli, "process_began", lambda: -1.0)
    monkeypatch.setattr(sys, "argv", ["hf-dbp", "pretrain"])
    cli.main()
    cli.main(["pretrain"])
    assert seen[0] == -1.0 and seen[1] > before


def pictures(count, size, channels, dtype=np.uint8):
    image = np.zeros((*size, channels), dtype)
    return ImageList([{"image": image}] * count, "image", channels)


def chosen(*args, **kwargs):
    return {choice.flag: choice.value for choice in choose(*args, **kwargs)}


def test_more_time_a_faster_machine_and_fewer_images_buy_dearer_models():
    images = pictures(100, (300, 400), 3)
    sizes = [chosen(images, seconds, rate=100.0) for seconds in (60, 600, 7200, 86400, 864000)]
    places = [[r.size for r in LADDER].index(one["model_size"]) for one in sizes]
    assert places == sorted(places) and places[0] == 0 and places[-1] == len(LADDER) - 1
    assert chosen(images, 60, rate=1e6)["model_size"] != sizes[0]["model_size"]
    assert chosen(pictures(10**6, (300, 400), 3), 7200, rate=100.0)["model_size"] == "mini"
    for one in sizes:
        assert one["learning_rate"] == pytest.approx(
            4e-3 * (128 / SIZES[one["model_size"]]["hidden_size"]) ** 0.5, rel=0.01
        )


def test_the_forecast_counts_multiplications():
    """Twice the tokens, twice the cost; of masked tokens the decoder alone."""
    mini = LADDER[0]
    assert cost(mini._replace(view=128), 0.75) == 4 * cost(mini, 0.75)
    assert cost(mini, 0.75) < cost(mini, 0.4) < cost(mini._replace(size="tiny"), 0.4)


def test_views_are_never_larger_than_the_images_and_tiles_are_for_fine_detail():
    assert chosen(pictures(10, (70, 90), 3), 10**6, rate=1e3)["image_size"] == 64
    industrial = chosen(pictures(10, (800, 900), 2, np.uint16), 600, rate=100.0)
    assert (industrial["num_channels"], industrial["native_tiles"], industrial["mask_ratio"]) == (2, True, 0.4)
    photographs = chosen(pictures(10, (800, 900), 3), 600, rate=100.0)
    assert (photographs["native_tiles"], photographs["mask_ratio"]) == (False, 0.75)
    assert photographs["per_device_train_batch_size"] == 10


def test_the_plan_is_written_with_its_reasons_and_kept_once_edited(tmp_path):
    file, choices = tmp_path / "out" / "budget.yaml", choose(pictures(50, (99, 99), 3), 60, rate=50.0)
    write_plan(file, "1m", {"train_dir": "pictures", "num_channels": None}, choices, ["eta"])
    plan = yaml.safe_load(file.read_text())
    assert plan["budget"] == "1m" and plan["train_dir"] == "pictures"
    assert {choice.flag: choice.value for choice in choices if choice.flag != "eta"}.items() <= plan.items()
    assert "eta" not in plan
    assert all("#" in line for line in file.read_text().splitlines()[3:])
    edited = file.read_text().replace('model_size: "mini"', 'model_size: "tiny"')
    file.write_text(edited)
    write_plan(file, "60s", {"train_dir": "pictures"}, [], [])
    assert file.read_text() == edited
    for budget_now, folder in (("2m", "pictures"), ("1m", "others")):
        with pytest.raises(ValueError, match="is the plan of another run"):
            write_plan(file, budget_now, {"train_dir": folder}, [], [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pictures/all", "--x"], ["--dataset_name", "pictures/all", "--x"]),
        (["./pictures"], ["--train_dir", "./pictures"]),
        (["wire_bonding"], ["--dataset_name", "wire_bonding"]),
        (["--x", "y"], ["--x", "y"]),
        ([], []),
    ],
)
def test_images_may_come_first(arguments, expected):
    assert images_first(arguments) == expected


def test_masks_may_come_second():
    flags = ["--train_dir", "./images", "--train_mask_dir", "masks", "--x"]
    assert images_first(["./images", "masks", "--x"], "--train_mask_dir") == flags
    assert images_first(["wire_bonding", "--x"], "--train_mask_dir") == ["--dataset_name", "wire_bonding", "--x"]


def test_labels_in_the_place_of_images_are_refused(tmp_path):
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(UserError, match=r"labels\.json is a file of labels; the folder of images comes first"):
        images_first([str(tmp_path / "labels.json"), str(tmp_path)], "--train_mask_dir")


@pytest.mark.parametrize("more", [[], ["--config", "demo.yaml"]])
def test_flags_that_a_budget_takes_the_place_of_are_named(more, tmp_path, caplog):
    given = ["--budget", "1m", "--eval_strategy=epoch", "--save_steps", "3", "--output_dir", str(tmp_path), *more]
    with_plan(given, GROUPS, lambda *_: [])
    (line,) = caplog.messages
    assert line.endswith("when to evaluate, save and end; not used: --eval_strategy, --save_steps")
    caplog.clear()
    with_plan(["--eval_strategy", "no", "--output_dir", str(tmp_path), *more], GROUPS, lambda *_: [])
    assert not caplog.messages


class Clock:
    """A clock that advances at every look."""

    def __init__(self, tick):
        self.now, self.tick = 0.0, tick

    def monotonic(self):
        self.now += self.tick
        return self.now


TINY = [
    "--config_overrides", "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,"
    "decoder_hidden_size=16,decoder_num_attention_heads=2,decoder_intermediate_size=16,decoder_num_hidden_layers=1",
    "--image_size", "32", "--patch_size", "16", "--per_device_train_batch_size", "4", "--dataloader_num_workers", "0",
    "--dataloader_persistent_workers", "false", "--logging_steps", "1", "--use_cpu", "--max_eval_samples", "4",
]  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A clock for the budget alone, so that tests mean the same on every machine."""
    clock = Clock(0.25)
    monkeypatch.setattr(budget, "time", clock)
    monkeypatch.setattr(pretraining, "command_began", lambda: clock.now)
    monkeypatch.setattr(budget_plan, "measured_rate", lambda *_: 50.0)
    return clock


def pretrain(folder):
    main(["pretrain", "wire_bonding", "--built_in_size", "32", "--max_train_samples", "16", "--budget=40s",
          "--output_dir", str(folder), *TINY])  # fmt: skip


@pytest.mark.slow
def test_a_run_ends_in_time_along_the_schedule(tmp_path, clock):
    pretrain(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert yaml.safe_load((tmp_path / "run" / "budget.yaml").read_text())["budget"] == "40s"
    used = record["results"]["budget"]
    assert used["seconds"] == 40
    assert 0.95 * 40 <= clock.now <= 1.02 * 40
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    rates = [row["learning_rate"] for row in state["log_history"] if "learning_rate" in row]
    peak = int(np.argmax(rates))
    assert max(rates) == pytest.approx(4e-3, rel=0.05) and rates[0] < 0.5 * max(rates)
    assert peak < 0.2 * len(rates) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.1 * max(rates)
    steps = [row["step"] for row in record["rows"]]
    assert 3 <= len(steps) <= 4  # early, at 30 and 60 %, at the end
    assert steps[-1] == state["global_step"]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_rest_of_its_budget(tmp_path, clock, monkeypatch, caplog):
    saves, real = [], BudgetCallback.on_save

    def stopping(self, *args, **kwargs):
        real(self, *args, **kwargs)
        saves.append(clock.now)
        if len(saves) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(BudgetCallback, "on_save", stopping)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        pretrain(tmp_path / "run")
    stopped, clock.now = clock.now, 1000.0  # the machine is off for a while
    assert stopped < 30
    pretrain(tmp_path / "run")
    assert 0.93 * 40 <= stopped + clock.now - 1000 <= 1.05 * 40
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    rates = [row["learning_rate"] for row in state["log_history"] if "learning_rate" in row]
    peak = int(np.argmax(rates))
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and peak < 0.2 * len(rates)
    assert "rises" not in caplog.text


def test_a_resumed_run_remembers_how_long_an_evaluation_takes():
    """Else it would keep too little time for the last one, which a run may reach without another."""
    first, weight = BudgetCallback(1000, time.monotonic()), torch.nn.Parameter(torch.zeros(1))
    first.first_step, first.evaluation, first.saving = 5.0, 40.0, 1.0
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    state = SimpleNamespace(global_step=3, stateful_callbacks={"BudgetCallback": json.loads(json.dumps(first.state()))})
    second = BudgetCallback(1000, time.monotonic())
    second.on_train_begin(SimpleNamespace(), state, None, lr_scheduler=scheduler, optimizer=optimizer)
    second._marked = time.monotonic()
    second.on_save(SimpleNamespace(), state, None)
    assert 2 * 40 < second.ending < 2 * 40 + 20


@pytest.mark.parametrize(("start", "seconds", "kept"), [(10, 600, 3), (400, 100, 6), (90, 600, 15), (90, 36000, 15)])
def test_pictures_and_exit_are_kept_for_but_never_long(start, seconds, kept):
    """A slow start, such as that of a busy machine that renders images, says little about how long pictures take."""
    callback = BudgetCallback(seconds, time.monotonic())
    callback.first_step, callback.evaluation, callback.saving = float(start), 0.0, 1.0
    callback._marked = time.monotonic()
    callback.on_save(SimpleNamespace(), SimpleNamespace(global_step=3), None)
    assert callback.ending - 0.01 * seconds == pytest.approx(kept, abs=0.2)


def test_eta_follows_the_decay_of_the_clock_but_not_its_warm_up(tmp_path):
    args = PretrainingArguments(output_dir=str(tmp_path), budget="100s", use_cpu=True)
    kept, state = BudgetCallback(100, 0.0), SimpleNamespace(global_step=0, max_steps=10**9)
    kept.first_step = 0.0
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "initial_lr": 1.0}])
    rates = []
    for seconds in (1, 3, 4, 30, 60):
        kept._now, state.global_step = float(seconds), state.global_step + 1
        optimizer.param_groups[0]["lr"] = schedule(kept.progress())
        kept.on_step_begin(args, state, None)
        rates.append(DecorrelationCallback(DecorrelationArguments()).decay(args, state, optimizer))
    assert rates[:3] == [1.0] * 3 and rates[3:] == pytest.approx([schedule(30 / 95), schedule(60 / 95)])


def test_a_budget_too_short_for_the_start_is_refused():
    callback = BudgetCallback(10.0, began=-20.0)
    scheduler = budget.LambdaLR.__new__(budget.LambdaLR)
    scheduler.base_lrs = [1.0]
    groups = SimpleNamespace(param_groups=[{"lr": 1.0, "initial_lr": 1.0}])
    with pytest.raises(ValueError, match="is used up before the first step"):
        callback.on_train_begin(None, SimpleNamespace(global_step=0), None, lr_scheduler=scheduler, optimizer=groups)


def test_another_schedule_is_refused(tmp_path, clock, capsys):
    callback = BudgetCallback(10.0, began=0.0)
    with pytest.raises(ValueError, match="has its own schedule: leave out --lr_scheduler_type reduce"):
        callback.on_train_begin(SimpleNamespace(lr_scheduler_type="reduce"), None, None, lr_scheduler=object())
    assert math.isfinite(callback.elapsed())
