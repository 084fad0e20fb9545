"""Runs in separate processes: several ranks, kills and resumes, a Hub that fails during training."""

import numpy as np
import pytest
from hub_server import HubServer
from safetensors.numpy import load_file

from hf_dbp.data.images import ImageSource, load_images
from hf_dbp.data.order import EpochSampler, Lanes


def means(run) -> list[float]:
    return np.mean([[line["loss"] for line in trace] for trace in run.traces], axis=0).tolist()


@pytest.mark.slow
def test_two_processes_are_one(train, write, photographs, tmp_path):
    """Steps with the same images have the same losses; both hold the same R to the bit; one of them sees each image,
    once."""
    folder = write(tmp_path / "data", "parquet", photographs)
    flags = (
        "--sample_fraction",
        "1",
        "--num_train_epochs",
        "2",
        "--eval_strategy",
        "epoch",
        "--save_strategy",
        "epoch",
    )
    one = train("one", folder, "--per_device_train_batch_size", "16", *flags)
    two = train("two", folder, "--per_device_train_batch_size", "8", *flags, processes=2)
    assert one.status == two.status == 0, two.stderr[-2000:]
    first, second = two.traces
    assert len(first) == 22 and [line["R"] for line in first] == [line["R"] for line in second]
    assert len({line["R"] for line in first}) == 22, "R moves at every step"
    assert np.abs(np.subtract(means(one), means(two)))[:20].max() < 1e-5
    seen = two.images(0) + two.images(1)
    assert len(set(seen)) == len(seen) == 2 * 176 and set(seen) == set(one.images())
    losses = [[row["eval_loss"] for row in run.record["rows"]] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert two.record["results"]["input"]["images"] == 352


EPOCHS = ("--per_device_train_batch_size", "8", "--num_train_epochs", "2", "--streaming")
SAVED = (*EPOCHS, "--dataloader_num_workers", "2", "--save_strategy", "steps", "--save_steps", "5")


def as_if_undisturbed(undisturbed, resumed) -> None:
    """Every step, repeated ones included, has the same images in the same order, and the same losses and R to the
    bit."""
    last = {line["step"]: line for line in resumed.traces[0]}
    assert [last[line["step"]] for line in undisturbed.traces[0]] == undisturbed.traces[0]
    assert all(line == last[line["step"]] for line in resumed.traces[0])
    ours, theirs = (load_file(next(run.folder.glob("model*.safetensors"))) for run in (undisturbed, resumed))
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.slow
def test_a_killed_streamed_run_goes_on_as_if_nothing_had_happened(train, write, photographs, tmp_path):
    """SIGKILL in the first and in the second epoch, with workers; then the same from a Hub that fails at times."""
    folder = write(tmp_path / "data", "parquet", photographs)
    undisturbed = train("undisturbed", folder, *SAVED)
    assert undisturbed.status == 0, undisturbed.stderr[-2000:]
    for kill in ("13", "37"):  # 22 steps an epoch; the last checkpoints are those of steps 10 and 35
        assert train("killed", folder, *SAVED, KILL_AT=kill).status == -9
    resumed = train("killed", folder, *SAVED)
    assert resumed.status == 0, resumed.stderr[-2000:]
    assert len(resumed.traces[0]) == 44 + 3 + 2
    as_if_undisturbed(undisturbed, resumed)
    with HubServer() as hub:
        hub.add("me/open", {f"data/{file.name}": file for file in folder.iterdir()})
        environment = {"endpoint": hub.url, "SLEEP": "0"}
        hub.fail(r"resolve/.*\.parquet", status=429, times=1)
        hub.fail(r"resolve/.*\.parquet", times=1)  # cut
        flags = ("--dataset_name", "me/open", *SAVED)
        assert train("hub", None, *flags, **environment, KILL_AT="7").status == -9
        listed = [path for _, path in hub.requests if path.endswith(".parquet")]
        assert len(listed) < 80, "each of 24 pieces is read about once an epoch"
        hub.fail(r"resolve/.*train.*\.parquet", status=500)
        failed = train("hub", None, *flags, **environment)
        assert failed.status == 2
        assert failed.stderr.strip().splitlines()[-1].startswith("error: the Hub fails for me/open (500)")
        hub.faults.clear()
        resumed = train("hub", None, *flags, **environment)
    assert resumed.status == 0, resumed.stderr[-2000:]
    as_if_undisturbed(undisturbed, resumed)


@pytest.mark.slow
def test_a_streamed_run_goes_on_with_other_processes(train, write, photographs, tmp_path):
    """Two processes with a worker start, one without resumes: each image once per epoch, in the order of the first."""
    folder = write(tmp_path / "data", "webdataset", photographs)
    saved = ("--num_train_epochs", "1", "--streaming", "--save_strategy", "steps", "--save_steps", "4")
    saved += ("--per_device_train_batch_size", "4")
    begun = train("run", folder, *saved, "--dataloader_num_workers", "1", "--max_steps", "4", processes=2)
    assert begun.status == 0, begun.stderr[-2000:]
    resumed = train("run", folder, *saved, "--gradient_accumulation_steps", "2")
    assert resumed.status == 0, resumed.stderr[-2000:]
    images, _ = load_images(ImageSource(train_dir=str(folder), streaming=True, cache_dir=None))
    order = [*EpochSampler(180, 3, step_images=8, blocks=images.samples.blocks(), lanes=Lanes(2, 4))]
    first, second = resumed.traces
    steps = [*zip(first[:4], second, strict=True), *zip(first[4::2], first[5::2], strict=True)]
    seen = [tuple(image) for pair in steps for line in pair for image in line["images"]]
    assert len(steps) == 22 and seen == order


@pytest.mark.slow
def test_unreadable_images_are_counted_over_workers(train, write, photographs, tmp_path):
    broken = list(photographs)
    for index in (3, 50, 120):
        broken[index] = b"text"  # the first is one of the images for validation
    folder = write(tmp_path / "data", "imagefolder", broken)
    flags = (
        *EPOCHS,
        "--dataloader_num_workers",
        "2",
        "--eval_strategy",
        "epoch",
        "--save_strategy",
        "epoch",
        "--max_eval_samples",
        "20",
    )
    run = train("run", folder, *flags)
    assert run.status == 0, run.stderr[-2000:]
    unreadable = run.record["results"]["unreadable"]
    assert unreadable["count"] == len(unreadable["images"]) == 3
    assert all(path.endswith(".jpg") for path in unreadable["images"])
    assert all(len(line["images"]) == 8 for line in run.traces[0])
    assert {"images_per_second", "data_wait_share"} <= run.record["results"]["input"].keys()
