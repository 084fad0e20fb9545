"""The order of images, a function of (seed, epoch): each image once per epoch in one process, each block about once."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dbp.data import order
from hf_dbp.data.feeding import adopt_order, make_sampler
from hf_dbp.data.order import EpochSampler, Lanes
from hf_dbp.training.input_meter import InputMeter


def dealt(sampler: EpochSampler, batch: int, processes: int, workers: int) -> list[list[list[int]]]:
    """Indices in the order in which [process][worker] fetches them, as accelerate and the loader deal batches."""
    fetched = []
    for rank in range(processes):
        batches = torch.utils.data.BatchSampler(sampler, batch, drop_last=True)
        mine = list(BatchSamplerShard(batches, processes, rank))
        fetched.append([[i for b in mine[worker::workers] for _, i in b] for worker in range(workers)])
    return fetched


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    batch=st.integers(1, 5),
    processes=st.integers(1, 4),
    workers=st.integers(1, 3),
)
def test_every_image_is_seen_once_by_one_process_however_few_or_odd_the_blocks(counts, batch, processes, workers):
    blocks = np.array(counts), np.ones(len(counts), np.int64)
    total, step = sum(counts), batch * processes
    sampler = EpochSampler(total, 1, step_images=step, blocks=blocks, lanes=Lanes(processes * workers, batch))
    seen = [i for process in dealt(sampler, batch, processes, workers) for worker in process for i in worker]
    assert len(seen) == len(set(seen)) == len(sampler) == total // step * step
    assert set(seen) <= set(range(total))


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (2, 2), (4, 4)])
def test_each_block_is_read_about_once_whatever_reads(monkeypatch, processes, workers):
    monkeypatch.setattr(order, "WINDOW_IMAGES", 40)
    counts, lanes = np.full(200, 10), processes * workers
    sampler = EpochSampler(2000, 0, step_images=4 * processes, blocks=(counts, counts), lanes=Lanes(lanes, 4))
    reads = 0
    for worker in (worker for process in dealt(sampler, 4, processes, workers) for worker in process):
        kept: list[int] = []  # a worker keeps what it read last, as `ShardedImages` does
        for block in (index // 10 for index in worker):
            if block not in kept:
                kept, reads = [*kept[-5:], block], reads + 1
    assert reads <= 200 + lanes


def test_epochs_and_seeds_differ_and_repeat():
    blocks = np.full(30, 7), np.ones(30, np.int64)

    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        sampler = EpochSampler(210, seed, blocks=blocks, lanes=Lanes(2, 5))
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0, 1) == epoch(0, 1)
    orders = [[index for _, index in epoch(*pair)] for pair in ((0, 0), (0, 1), (1, 0))]
    assert all(orders[a] != orders[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    assert {number for number, _ in epoch(0, 4)} == {4}


def test_neighbours_are_torn_apart():
    """Few images that are neighbours in a file are neighbours in the order."""
    sampler = EpochSampler(4000, 0, blocks=(np.full(40, 100), np.ones(40, np.int64)), lanes=Lanes(2, 16))
    indices = np.array([index for _, index in sampler])
    assert (np.abs(np.diff(indices)) == 1).mean() < 0.01
    assert len(np.unique(indices[:512] // 100)) > 8  # a global batch draws from many blocks


def arguments(batch: int, accumulation: int, processes: int, workers: int, drop_last: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        world_size=processes,
        dataloader_num_workers=workers,
        dataloader_drop_last=drop_last,
        seed=0,
        data_seed=None,
    )


class Blocks:
    samples = SimpleNamespace(blocks=lambda: (np.full(30, 7), np.ones(30, np.int64)))

    def __len__(self) -> int:
        return 210


def test_a_run_resumed_on_other_processes_keeps_its_order():
    from hf_dbp.data.feeding import feeding

    first, second = arguments(4, 1, 2, 3), arguments(2, 4, 1, 0)
    samplers = [make_sampler(Blocks(), args) for args in (first, second)]
    records = [{"train_images": 210, "feeding": feeding(*pair)} for pair in zip(samplers, (first, second), strict=True)]
    assert list(samplers[0]) != list(samplers[1])
    adopt_order(samplers[1], *records, drop_last=True)  # type: ignore[misc]
    assert list(samplers[0]) == list(samplers[1])
    assert records[1]["feeding"]["lanes"] == 6  # what a third run would go on with


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": 211}, "trained on 210 images"),
        ({"subset": {"digest": "x"}}, "subset"),
        ({"feeding": {"step_images": 16, "processes": 2, "lanes": 2, "chunk": 4}}, "8 images a step, this run has 16"),
        ({"feeding": {"step_images": 8, "processes": 1, "lanes": 2, "chunk": 4}}, "resumed on the 2 processes"),
    ],
)
def test_a_resume_that_cannot_be_exact_says_so(changed, message):
    before = {"train_images": 210, "feeding": {"step_images": 8, "processes": 2, "lanes": 2, "chunk": 4}}
    with pytest.raises(ValueError, match=message):
        adopt_order(EpochSampler(210, 0), before, before | changed, drop_last=False)


def test_the_input_meter_counts_on_the_training_clock():
    meter = InputMeter()
    meter.preset({"images": 100, "wait_seconds": 1.0}, 10.0)
    for _ in range(4):
        meter.add(16, 0.5)
    assert meter.since_last(14.0) == {"images_per_second": 16.0, "data_wait_share": 0.5}
    assert meter.since_last(14.0) == {}
    assert meter.totals(14.0)["images"] == 164 and meter.totals(15.0)["data_wait_share"] == 0.2
