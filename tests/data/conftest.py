"""Photographs in every form of data set, and runs in separate processes."""

import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import hub_environment
from PIL import Image

ROOT = Path(__file__).parents[2]
NO_HUB = "http://127.0.0.1:9"
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet_samples"
FLAGS = {
    "model_size": "mini",
    "image_size": "32",
    "patch_size": "8",
    "max_eval_samples": "8",
    "per_device_eval_batch_size": "8",
    "seed": "3",
    "report_to": "none",
    "do_train": "true",
    "disable_tqdm": "true",
    "use_cpu": "true",
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": "1",
    "learning_rate": "1e-3",
    "update_interval": "1",
}


def encoded_photographs(count: int) -> list[bytes]:
    """JPEG bytes of real photographs, scaled down; of drawn ones if the data is absent."""
    rng = np.random.default_rng(0)
    files = sorted(PHOTOGRAPHS.glob("train-*.parquet"))
    pictures: list[Image.Image] = []
    for file in files if files else ():
        for value in pq.read_table(file, columns=["image"]).column(0).to_pylist()[: -(-count // len(files))]:
            pictures.append(Image.open(io.BytesIO(value["bytes"])).convert("RGB"))
    while len(pictures) < count:
        pictures.append(Image.fromarray(rng.integers(0, 255, (9, 11, 3), np.uint8)).resize((60, 50)))
    encoded = []
    for picture in pictures[:count]:
        buffer = io.BytesIO()
        picture.resize((picture.width * 48 // min(picture.size), picture.height * 48 // min(picture.size))).save(
            buffer, "JPEG", quality=90
        )
        encoded.append(buffer.getvalue())
    return encoded


@pytest.fixture(scope="session")
def photographs() -> list[bytes]:
    """200 encoded photographs, all different."""
    found = encoded_photographs(200)
    assert len(set(found)) == 200
    return found


def write_parquet(path: Path, encoded: list[bytes], rows_per_group: int = 8) -> Path:
    """A parquet file as `datasets` writes them, with row groups of a few images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pa.array([{"bytes": value, "path": None} for value in encoded], datasets.Image().pa_type)
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    pq.write_table(pa.table([values], schema=schema), path, row_group_size=rows_per_group)
    return path


@pytest.fixture
def write() -> Callable[..., Path]:
    """Write encoded images to a folder as ``parquet``, ``webdataset`` or ``imagefolder``: 180 and 20, in shards."""

    def write_folder(folder: Path, kind: str, encoded: list[bytes], shards: int = 4) -> Path:
        validation = max(len(encoded) // 10, 1)
        for split, images in (("train", encoded[validation:]), ("validation", encoded[:validation])):
            parts = [list(part) for part in np.array_split(np.array(images, object), shards if split == "train" else 1)]
            for number, part in enumerate(parts):
                name = f"{split}-{number:05d}-of-{len(parts):05d}"
                if kind == "parquet":
                    write_parquet(folder / f"{name}.parquet", part)
                elif kind == "webdataset":
                    folder.mkdir(parents=True, exist_ok=True)
                    with tarfile.open(folder / f"{name}.tar", "w") as tar:
                        for index, value in enumerate(part):
                            for suffix, content in (("jpg", value), ("cls", b"7")):
                                member = tarfile.TarInfo(f"{number}-{index:04d}.{suffix}")
                                member.size = len(content)
                                tar.addfile(member, io.BytesIO(content))
                else:
                    for index, value in enumerate(part):
                        file = folder / split / f"{number}" / f"{index:04d}.jpg"
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(value)
        return folder

    return write_folder


@pytest.fixture
def shuffled(photographs: list[bytes]) -> list[bytes]:
    """The photographs with the training ones in another order."""
    training = photographs[20:]
    random.Random(0).shuffle(training)
    return photographs[:20] + training


@dataclass
class Run:
    """What a traced run left: exit status, stderr, trace lines of each rank, run record."""

    status: int
    stderr: str
    traces: list[list[dict[str, Any]]]
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())  # type: ignore[no-any-return]

    def images(self, rank: int = 0) -> list[tuple[int, int]]:
        """(epoch, index) of every image in the order in which the rank saw them."""
        return [tuple(image) for line in self.traces[rank] for image in line["images"]]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Run]:
    """Run `traced_run.py` with these flags, with torchrun for more than one process."""

    def start(
        name: str, data: Path | None, *flags: str, processes: int = 1, endpoint: str = NO_HUB, **environment: str
    ) -> Run:
        folder, trace = tmp_path / name, tmp_path / f"{name}-trace"
        trace.mkdir(exist_ok=True)
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        source = ["--train_dir", str(data)] if data is not None else []
        common = [part for flag, value in FLAGS.items() for part in (f"--{flag}", value)]
        common += ["--output_dir", str(folder)]
        done = subprocess.run(
            [*launcher, str(Path(__file__).with_name("traced_run.py")), *common, *source, *flags],
            env={
                **hub_environment(endpoint, tmp_path / "home"),
                "PYTHONPATH": str(ROOT),
                "CUDA_VISIBLE_DEVICES": "",
                "TRACE": str(trace),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        files = sorted(trace.glob("rank-*.jsonl"))
        traces = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return Run(done.returncode, done.stderr, traces, folder)

    return start
