"""What a step of each task costs beside the same stock model in a plain stock Trainer, in turns in one process.

    python benchmarks/head_step.py                                       # all tasks, ViT-Tiny/16, 224 pixels
    python benchmarks/head_step.py --tasks detection --size mini --image_size 64 --patch_size 8 --batch 4

Both sides train a stock model of the same first weights (UperNet, Beit for classification, RF-DETR for boxes and for
masks) on the same tensors in memory, through the loader of their own Trainer, by fused AdamW with one learning rate.
The stock side is `transformers.Trainer` as a user has it, no evaluation, no saving, no clipping; ours has the guards,
the clock, layer-wise learning rates and the task's own loss besides (mixup and soft targets for classification). Views
and files are not measured: both sides read the same tensors.

They take turns of ``--steps`` steps, and the side that begins changes from turn to turn. A step lasts from the end of
one to the end of the next, fetching included; the first two of a turn do not count. The ratio is the median over turns
of (median step of ours / median step of stock), by processor time and by the wall's clock; a busy machine distorts
the latter.

Peak memory is the peak resident set of one child process for each side, which trains for as many steps; the libraries
are part of it, as for a user.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from hf_dbp.configuration_dbp_vit_mae import SIZES
from hf_dbp.downstream.classification.augmentation import Mixing
from hf_dbp.downstream.classification.model import build_classifier
from hf_dbp.downstream.classification.trainer import ClassificationTrainer
from hf_dbp.downstream.detection.model import build_detector
from hf_dbp.downstream.detection.trainer import DetectionTrainer
from hf_dbp.downstream.detection.views import collate
from hf_dbp.downstream.segmentation.trainer import SegmentationTrainer
from hf_dbp.downstream.segmentation.upernet import build_upernet

TASKS = ("segmentation", "classification", "detection", "instances")
SIDES = ("stock", "ours")
CLASSES = 10
OBJECTS = 4  # per image
DISCARDED = 2  # steps at the beginning of each turn
SMALL_DECODER = {"query_groups": 3, "decoder_layers": 2, "decoder_width": 128, "num_queries": 50}
Item = dict[str, Any]


class Images(list[None]):
    """A list of images as the sampler asks for it."""

    samples = ()


class InMemory(torch.utils.data.Dataset[Item]):
    """Images that cost nothing to fetch; an index may have its epoch before it."""

    def __init__(self, items: list[Item]) -> None:
        self.items, self.images = items, Images([None] * len(items))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | tuple[int, int]) -> Item:
        return self.items[index[1] if isinstance(index, tuple) else index]


def labels_of(task: str, side: int) -> Any:
    """Made-up labels of an image."""
    if task == "classification":
        return torch.randint(CLASSES, ())
    if task == "segmentation":
        return torch.randint(CLASSES, (side, side))
    boxes = torch.cat([torch.rand(OBJECTS, 2) * 0.5 + 0.25, torch.rand(OBJECTS, 2) * 0.3 + 0.1], dim=1)
    found: dict[str, Tensor] = {"class_labels": torch.randint(CLASSES, (OBJECTS,)), "boxes": boxes}
    if task == "instances":
        found["masks"] = (torch.rand(OBJECTS, side, side) > 0.5).to(torch.uint8)
    return found


def data_of(task: str, args: argparse.Namespace) -> InMemory:
    """Two batches of images and labels."""
    torch.manual_seed(1)
    side = args.image_size
    return InMemory(
        [{"pixel_values": torch.randn(3, side, side), "labels": labels_of(task, side)} for _ in range(2 * args.batch)]
    )


def model_of(task: str, args: argparse.Namespace) -> PreTrainedModel:
    """The stock model of a task, of the same weights each time."""
    torch.manual_seed(0)
    shape = {name: value for name, value in SIZES[args.size].items() if "decoder" not in name}
    config = ViTConfig(**shape, image_size=args.image_size, patch_size=args.patch_size)
    vit, names = ViTModel(config, add_pooling_layer=False), [f"class {k}" for k in range(CLASSES)]
    if task == "segmentation":
        return build_upernet(vit, dict(enumerate(names)), hidden_size=64, auxiliary_channels=32)
    if task == "classification":
        return build_classifier(vit, names)
    side = args.image_size
    return build_detector(vit, names, image_size=(side, side), instances=task == "instances", **SMALL_DECODER)


class Timed(TrainerCallback):
    """Notes when each step ends, by both clocks."""

    def __init__(self) -> None:
        self.ends = list[tuple[float, float]]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append((time.process_time(), time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """The median step since the last call, without the first ones, by clock."""
        ends, self.ends = self.ends[DISCARDED:], []
        steps = [[later - earlier for earlier, later in itertools.pairwise(times)] for times in zip(*ends, strict=True)]
        return dict(zip(("processor", "wall"), map(statistics.median, steps), strict=True))


def trainer_of(task: str, side: str, args: argparse.Namespace, folder: str) -> tuple[Trainer, Timed]:
    """The Trainer of one side."""
    settings = TrainingArguments(
        output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=1e-4,
        save_strategy="no", eval_strategy="no", logging_steps=10**6, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False, max_grad_norm=0.0, use_cpu=args.use_cpu,
    )  # fmt: skip
    timed = Timed()
    given: dict[str, Any] = {"model": model_of(task, args), "args": settings, "train_dataset": data_of(task, args)}
    given["callbacks"] = [timed]
    if side == "stock":
        boxes = {"data_collator": collate} if task in ("detection", "instances") else {}
        return Trainer(**given, **boxes), timed
    if task == "segmentation":
        return SegmentationTrainer(**given, crop_size=args.image_size, layer_decay=0.75), timed
    if task == "classification":
        return ClassificationTrainer(**given, mixing=Mixing(CLASSES), layer_decay=0.65), timed
    return DetectionTrainer(**given, layer_decay=0.8), timed


def times_of(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """The seconds of a step of both sides in each turn, and the ratios."""
    seconds: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        pairs = {side: trainer_of(task, side, args, folder) for side in SIDES}
        for trainer, _ in pairs.values():
            trainer.remove_callback(PrinterCallback)
        for turn in range(args.turns):
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                trainer, timed = pairs[side]
                trainer.train()
                seconds[side].append(timed.seconds())
    ratios = {
        clock: [ours[clock] / stock[clock] for ours, stock in zip(seconds["ours"], seconds["stock"], strict=True)]
        for clock in ("processor", "wall")
    }
    medians = {clock: statistics.median(values) for clock, values in ratios.items()}
    return {"seconds": seconds, "ratios": ratios, "ratio": medians}


def own_memory(task: str, side: str, args: argparse.Namespace) -> int:
    """The peak of this process in bytes, which is to do nothing but train."""
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(task, side, args, folder)[0].train()
    return peak()


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_of(task: str, args: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """The memory of both sides, each in a process of its own, and the ratio."""
    megabytes: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.memory_runs):
        for side in SIDES:
            command = [sys.executable, __file__, *given, "--tasks", task, "--child", side]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            megabytes[side].append(json.loads(output.splitlines()[-1])["bytes"] / 1e6)
    ratios = [ours / stock for ours, stock in zip(megabytes["ours"], megabytes["stock"], strict=True)]
    return {"megabytes": megabytes, "ratios": ratios, "ratio": statistics.median(ratios)}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--memory_runs", type=int, default=3, help="processes per side; 0: do not measure memory")
    parser.add_argument("--use_cpu", action="store_true", help="even if there is a GPU")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.steps < DISCARDED + 2:
        parser.error(f"--steps is at least {DISCARDED + 2}, of which the first {DISCARDED} do not count")
    return args


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parsed(given)
    if args.child is not None:
        found = {"bytes": own_memory(args.tasks[0], args.child, args)}
        print(json.dumps(found))
        return found
    record: dict[str, Any] = {
        "size": args.size, "image_size": args.image_size, "patch_size": args.patch_size, "batch": args.batch,
        "threads": torch.get_num_threads(), "tasks": {},
    }  # fmt: skip
    for task in args.tasks:
        row = times_of(task, args)
        print(
            f"{task:<15} {statistics.median(turn['processor'] for turn in row['seconds']['stock']):.4f} s stock; "
            f"processor {row['ratio']['processor']:.3f} "
            f"({', '.join(f'{ratio:.3f}' for ratio in row['ratios']['processor'])}); wall {row['ratio']['wall']:.3f}",
            flush=True,
        )
        if args.memory_runs:
            row["memory"] = memory_of(task, args, given)
            sizes = {side: statistics.median(found) for side, found in row["memory"]["megabytes"].items()}
            print(f"{'':<15} {sizes['stock']:.0f} MB stock; memory {row['memory']['ratio']:.3f}", flush=True)
        record["tasks"][task] = row
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
