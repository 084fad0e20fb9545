"""Short fine-tuning runs on CamVid and wire_bonding, as a pool of independent jobs: what the proofs made of them share.

A job is one command that trains the same small UperNet from the same pre-trained encoder, writes its figures as one
JSON file, whole, and ends at once if that file exists. `rare_classes.py` and `selection.py` print such jobs and
assemble what they wrote.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_dbp.comparison.statistics import Mean
from hf_dbp.data.wire_bonding import CLASS_NAMES
from hf_dbp.downstream.segmentation import finetuning

NAMES = {
    "camvid": [
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ],
    "wire_bonding": list(CLASS_NAMES),
}
ENCODERS = {"camvid": "camvid-fused", "wire_bonding": "wire-fused"}
LABELS = {"camvid": ["--ignore_index", "11"], "wire_bonding": ["--num_channels", "2"]}
CROPS = {"camvid": 128, "wire_bonding": 64}
FLAGS = (
    "--long_edge 0 --head_size 64 --auxiliary_head_size 32 --per_device_train_batch_size 16 "
    "--per_device_eval_batch_size 32 --learning_rate 2e-3 --layer_decay 0.75 --warmup_steps 0.05 "
    "--lr_scheduler_type cosine --eval_strategy no --save_strategy no --do_train --report_to none --disable_tqdm 1 "
    "--logging_steps 50"
)


def data_flags(data: str, data_dir: str, encoders: str, train_dir: Path | None = None) -> list[str]:
    """Flags for the encoder, the labelled images (of ``train_dir`` instead of DATA_DIR) and their classes."""
    folder = Path(data_dir)
    paths = {
        "--model_name_or_path": Path(encoders) / ENCODERS[data],
        "--train_dir": train_dir or folder / data,
        "--id2label": folder / f"{data}.json",
    }
    return [*(str(word) for pair in paths.items() for word in pair), *LABELS[data]]


def fine_tuned(data: str, flags: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate the small UperNet; the content of its `eval.json`."""
    with tempfile.TemporaryDirectory() as output_dir:
        own = [*FLAGS.split(), "--crop_size", str(CROPS[data]), "--output_dir", output_dir]
        record: dict[str, Any] = finetuning.main([*own, *flags])
    del record["arguments"]["output_dir"]  # it is gone
    return record


def write_whole(file: Path, record: dict[str, Any]) -> None:
    """Write a job's figures under their name at the end only."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def add_job_flags(command: Any, script: str) -> None:
    """The flags of the command that prints the jobs."""
    command.add_argument("--data_dir", required=True)
    command.add_argument("--encoders", required=True)
    command.add_argument("--results", required=True)
    command.add_argument("--seeds", type=int, default=5)
    command.add_argument("--python", default="python")
    command.add_argument("--script", default=script)
    command.add_argument("--more", default="", help="further flags of the command that each job runs")


def job(args: Any, words: Sequence[str]) -> str:
    """A command line of the pool."""
    own = [args.script, "run", *words, "--data_dir", args.data_dir, "--encoders", args.encoders]
    return f"{args.python} {shlex.join(own)}{' ' * bool(args.more)}{args.more}"


def shown(mean: Mean, sign: str = "") -> str:
    """A mean with its 95 % interval."""
    interval = "" if mean.low is None else f" [{mean.low:{sign}.3f}, {mean.high:{sign}.3f}]"
    return f"{mean.mean:{sign}.3f}{interval}"


def machine(record: dict[str, Any]) -> str:
    """What a run was measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    hardware = record["hardware"]
    names = ", ".join(dict.fromkeys(str(hardware[key]) for key in ("gpu", "processor") if hardware.get(key)))
    return f"Machine: {names}; {versions}."
