"""What a step costs on a GPU in each setting, in one call of at most ten minutes.

    python benchmarks/gpu.py                              # ViT-B, batches 512 and 1024, bf16, eager and compiled
    python benchmarks/gpu.py --sizes small base --optimizers adamw muon --no-compile
    python benchmarks/gpu.py --device cpu --sizes mini --image_size 32 --patch_size 8 --batches 4 --methods bp dbp_full

Finally it prints one table with the rows of `step_time.py`: ratio to plain backprop, FLOPs, seconds, images/s, the
share of the machine's own matrix rate, seconds of each part (forward, backward, optimizer, update of R), peak memory.
Methods take turns. A batch that does not fit, and whatever remains when `--seconds` are used up, is named and left out.
With `--images FOLDER` it first reports how fast one core reads from that folder.

Run on an H200: docs/performance.md holds the table.
"""

import argparse
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import step_time
import torch

from hf_dbp import SIZES
from hf_dbp.data.images import ImageSource, load_images

METHODS = ("stock", "bp", "dbp", "dbp_interval", "dbp_fast", "dbp_full")
READS = 512


def settings(args: argparse.Namespace, optimizer: str, compiled: bool) -> argparse.Namespace:
    """The arguments of `step_time.measure`, for methods that run eagerly or that are compiled, each beside bp."""
    return argparse.Namespace(
        methods=[name for name in args.methods if not compiled or name in (*args.compiled, "bp")],
        compile=compiled,
        optimizer=optimizer,
        image_size=args.image_size,
        patch_size=args.patch_size,
        device=args.device,
        dtype=args.dtype,
        repeats=args.repeats,
        threads=torch.get_num_threads(),
        clock="wall",
        fields={},
    )


def measured(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all sizes, batches and optimizers, eager before compiled, and what was left out."""
    begin, rows, left_out = time.monotonic(), [], []
    forms = (False, True)[: 1 + args.compile]
    for compiled, size, optimizer, batch in itertools.product(forms, args.sizes, args.optimizers, args.batches):
        what = f"{size}, {optimizer}, batch {batch}{', compiled' if compiled else ''}"
        if time.monotonic() - begin > args.seconds:
            left_out.append(f"{what}: {args.seconds:g} seconds are used up")
            continue
        chosen = settings(args, optimizer, compiled)
        try:
            found = step_time.measure(chosen, size, batch)
        except torch.OutOfMemoryError:
            left_out.append(f"{what}: out of memory")
            continue
        found = [row for row in found if ("+" in row["method"]) == compiled]
        if args.device == "cpu":
            step_time.with_memory(chosen, found)
        rows += found
        print(f"{what}: {time.monotonic() - begin:.0f} s", step_time.table(found), sep="\n", flush=True)
    return rows, left_out


def input_rate(folder: str) -> float:
    """Images per second that one core reads and decodes from a folder."""
    images, _ = load_images(ImageSource(train_dir=folder))
    count = min(len(images), READS)
    start = time.perf_counter()
    for index in range(count):
        images[index]
    return count / (time.perf_counter() - start)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["base"])
    parser.add_argument("--optimizers", nargs="+", choices=["adamw", "muon"], default=["adamw"])
    parser.add_argument("--batches", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--methods", nargs="+", choices=step_time.METHODS, default=METHODS)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compiled", nargs="+", choices=step_time.METHODS, default=METHODS, help="these if compiled")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=420.0, help="start nothing new after this many seconds")
    parser.add_argument("--images", help="folder of images, to say how fast one core reads them")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu measures a small model here")
    if "bp" not in args.methods:
        parser.error("--methods must include bp, which the others are compared with")
    return args


def main() -> None:
    args = parse_arguments()
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    rows, left_out = measured(args)
    record: dict[str, Any] = {"device_name": device, "torch": torch.__version__, "rows": rows, "left_out": left_out}
    if args.images:
        record["images_per_second_and_core"] = input_rate(args.images)
        print(f"one core reads and decodes {record['images_per_second_and_core']:.0f} images/s of {args.images}")
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for line in left_out:
        print(f"left out: {line}")
    print(
        f"\n{device}, torch {torch.__version__}, {args.dtype}, ViT-MAE {', '.join(args.sizes)}; written: {args.output}"
    )
    print(step_time.table(rows))


if __name__ == "__main__":
    main()
