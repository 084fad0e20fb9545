"""What a step of `hf-dbp classify` costs beside the same stock model in a plain stock Trainer, in turns in one process.

    python benchmarks/classification_step.py                            # ViT-Small/16, 224 pixels, batch 16
    python benchmarks/classification_step.py --size mini --image_size 32 --patch_size 4 --batch 32

Both train a `BeitForImageClassification` of the same weights on the same tensors in memory, by fused AdamW; ours adds
mixup or cutmix, soft targets, layer-wise learning rates, the guards and the clock. They take turns of ``--steps``
steps. A step is all from the end of one to the end of the next, fetching included; the first two of a turn do not
count. The clock is the time that this process computed (``--clock wall`` for the wall's), so that other programs
distort less.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTModel

from hf_dbp.configuration_dbp_vit_mae import SIZES
from hf_dbp.downstream.classification.augmentation import Mixing
from hf_dbp.downstream.classification.model import build_classifier
from hf_dbp.downstream.classification.trainer import ClassificationTrainer

CLASSES = 10
DISCARDED = 2  # steps at the begin of each turn


class Images(list[None]):
    """A list of images as the sampler asks for it."""

    samples = ()


class InMemory(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images that cost nothing to fetch; an index may have its epoch before it."""

    def __init__(self, count: int, side: int) -> None:
        self.pixels, self.labels = torch.randn(count, 3, side, side), torch.randint(CLASSES, (count,))
        self.images = Images([None] * count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        number = index[1] if isinstance(index, tuple) else index
        return {"pixel_values": self.pixels[number], "labels": self.labels[number]}


class Timed(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.ends = clock, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(self.clock())

    def seconds(self) -> list[float]:
        """The steps since the last call, without the first ones."""
        ends, self.ends = self.ends[DISCARDED:], []
        return [later - earlier for earlier, later in itertools.pairwise(ends)]


def trainers(args: argparse.Namespace, folder: str) -> dict[str, tuple[Trainer, Timed]]:
    """The stock Trainer and ours, each with a model of the same weights."""
    data = InMemory(2 * args.batch, args.image_size)
    shape = {name: value for name, value in SIZES[args.size].items() if "decoder" not in name}
    config = ViTConfig(**shape, image_size=args.image_size, patch_size=args.patch_size)
    settings = TrainingArguments(
        output_dir=folder, max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=1e-4,
        save_strategy="no", eval_strategy="no", logging_steps=10**6, report_to="none", disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False, max_grad_norm=0.0,
    )  # fmt: skip
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    found = {}
    for name in ("stock", "ours"):
        torch.manual_seed(0)
        model = build_classifier(ViTModel(config, add_pooling_layer=False), [str(k) for k in range(CLASSES)])
        timed, shared = Timed(clock), {"model": model, "args": settings, "train_dataset": data}
        if name == "stock":
            trainer = Trainer(**shared, callbacks=[timed])
        else:
            trainer = ClassificationTrainer(**shared, callbacks=[timed], mixing=Mixing(CLASSES), layer_decay=0.65)
        found[name] = (trainer, timed)
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clock", default="cpu", choices=["cpu", "wall"])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        pairs = trainers(args, folder)
        for _ in range(args.turns):
            for name, (trainer, timed) in pairs.items():
                trainer.train()
                seconds[name].append(statistics.median(timed.seconds()))
    ratios = [ours / stock for ours, stock in zip(seconds["ours"], seconds["stock"], strict=True)]
    record = {
        "size": args.size, "image_size": args.image_size, "batch": args.batch, "clock": args.clock, "seconds": seconds,
        "ratios": ratios, "ratio": statistics.median(ratios),
    }  # fmt: skip
    print(f"stock {statistics.median(seconds['stock']):.4f} s, ours {statistics.median(seconds['ours']):.4f} s a step; "
          f"ratio {record['ratio']:.3f} (turns: {', '.join(f'{ratio:.3f}' for ratio in ratios)})")  # fmt: skip
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


if __name__ == "__main__":
    main()
