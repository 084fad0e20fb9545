"""The clocks count training alone, continue after a resume, and cost next to nothing."""

import shutil
import time

import pytest
import torch
from test_pretraining import flags

from hf_dbp.pretraining import main
from hf_dbp.training import clocked, measurement, resuming
from hf_dbp.training.arguments import PretrainingArguments
from hf_dbp.training.measurement import EnergyMeter, StepTimer, TrainingClock, check_country
from hf_dbp.training.trainer import MAETrainer


class Time:
    """Time that passes when told to, in place of the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Watts:
    """A meter of a machine that takes 3.6 MW, so that a second is a kWh."""

    def __init__(self, fake):
        self.fake, self.segments = fake, 0
        keys = ("country", "cpu", "cpu_model", "ram", "gpu", "scope", "codecarbon")
        self.description = dict.fromkeys(keys, "made up") | {"carbon_intensity_g_per_kwh": 500.0}

    def start(self):
        self.segments += 1
        self.since = self.fake.now

    def stop(self):
        return self.fake.now - self.since


@pytest.fixture
def fake(monkeypatch):
    fake = Time()
    monkeypatch.setattr(measurement, "time", fake)
    return fake


def test_pauses_count_neither_seconds_nor_energy(fake):
    clock = TrainingClock(Watts(fake))
    with clock.paused():  # before the start
        fake.sleep(100)
    clock.start()
    for _ in range(2):
        fake.sleep(1)
        with clock.paused():
            fake.sleep(100)
            with clock.paused():
                fake.sleep(100)
            assert clock.seconds == clock.kwh
    clock.stop()
    fake.sleep(100)
    assert (clock.seconds, clock.kwh) == (2.0, 2.0)


def test_a_clock_goes_on_from_a_resumed_run(fake):
    clock = TrainingClock(Watts(fake))
    clock.preset(100.0, 50.0)
    assert (clock.seconds, clock.kwh) == (100.0, 50.0)
    clock.start()
    fake.sleep(1)
    clock.start()  # it runs already
    clock.stop()
    clock.stop()
    assert (clock.seconds, clock.kwh) == (101.0, 51.0)


def test_long_segments_are_cut(fake):
    """Counters of processors wrap around: a segment may not last longer than they do."""
    clock = TrainingClock(Watts(fake))
    clock.tick()
    clock.start()
    for _ in range(30):
        fake.sleep(10)
        clock.tick()
    clock.stop()
    assert clock.meter.segments == 6  # type: ignore[attr-defined]
    assert (clock.seconds, clock.kwh) == (300.0, 300.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU its own events are the clock")
def test_step_times_are_medians_of_steps(fake):
    timer = StepTimer()
    assert timer.median() is None
    for seconds in (1, 2, 20):
        timer.begin()
        fake.sleep(seconds)
        timer.end()
        fake.sleep(100)
    assert timer.median() == 2
    assert timer.median() is None


def test_codecarbon_is_a_meter():
    meter, world = EnergyMeter("NLD"), EnergyMeter()
    assert 200 < meter.carbon_intensity < 400
    assert world.carbon_intensity == 475.0
    assert (meter.description["country"], world.description["country"]) == ("NLD", "world average")
    assert meter.description["gpu"] == "none in use"  # of those of the machine, if there are any
    clock = TrainingClock(meter)
    clock.start()
    time.sleep(0.3)
    with clock.paused():
        first = clock.kwh
        time.sleep(1.0)
    assert first > 0
    clock.stop()
    assert first < clock.kwh < 2 * first  # the pause is not in it


def test_an_unknown_country_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="no carbon intensity for 'Holland'; give a three-letter ISO code"):
        check_country("Holland")
    with pytest.raises(ValueError, match="no carbon intensity"):
        PretrainingArguments(output_dir=str(tmp_path), country="XYZ", use_cpu=True)


@pytest.fixture
def timed_training(fake, monkeypatch):
    """A step of training takes a second, everything else that a run does takes a thousand."""

    def lasting(owner, name, seconds):
        stock = getattr(owner, name)

        def slow(*args, **kwargs):
            fake.sleep(seconds)
            return stock(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    lasting(MAETrainer, "training_step", 1)
    for name in ("evaluation_loop", "_save", "create_optimizer"):
        lasting(MAETrainer, name, 1000)
    lasting(resuming, "restore_weights", 1000)
    monkeypatch.setattr(clocked, "EnergyMeter", lambda *_: Watts(fake))


def test_slow_validation_checkpoints_and_start_do_not_move_the_clocks(tmp_path, timed_training, fake):
    record = main(flags(tmp_path))
    assert fake.now > 10_000
    for key in ("train_seconds", "kwh"):
        assert [row[key] for row in record.rows] == [3, 6, 9, 12]
        assert record.results[key] == 12
    assert record.results["co2e_kg"] == 12 * 500 / 1000
    assert {row["step_seconds"] for row in record.rows} == {1}


def test_resumed_runs_add_up(tmp_path, timed_training):
    main(flags(tmp_path))
    shutil.rmtree(tmp_path / "checkpoint-12")  # as if it had been killed in its last epoch
    record = main(flags(tmp_path))
    for key in ("train_seconds", "kwh"):
        assert [row[key] for row in record.rows] == [3, 6, 9, 12]
        assert record.results[key] == 12


@pytest.mark.slow
def test_measuring_costs_less_than_a_hundredth():
    """Processor time of codecarbon, including its thread, during training that itself takes none."""
    clock = TrainingClock(EnergyMeter())
    before = time.process_time()
    clock.start()
    for _ in range(3):  # evaluations a second apart
        time.sleep(1)
        clock.tick()
        with clock.paused():
            pass
    clock.stop()
    assert time.process_time() - before < 0.01 * clock.seconds
