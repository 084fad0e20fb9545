"""What a step costs on a GPU in each setting, in one call of at most ten minutes without --convergence.

    python benchmarks/gpu.py                              # ViT-B, batches 512 and 1024, bf16, eager and compiled
    python benchmarks/gpu.py --sizes small base --optimizers adamw muon --no-compile
    python benchmarks/gpu.py --device cpu --sizes mini --image_size 32 --patch_size 8 --batches 4 --methods bp dbp_full

Finally it prints one table with the rows of `step_time.py`: ratio to plain backprop, FLOPs, seconds, images/s, the
share of the machine's own matrix rate, seconds of each part (forward, backward, optimizer, update of R), peak memory.
Methods take turns. A batch that does not fit, and whatever is not measured after `--seconds`, is named and left out.
With `--images FOLDER` it also reports how fast one core reads images: decoded, and from the decoded cache.

With `--convergence FOLDER` it then trains the first size at the first batch on those images, plain and with whole-model
DBP (the settings of the recipe whole_model.yaml), under each optimizer: complete schedules that all take
`--run_seconds`, by the step times just measured, at each of `--learning_rates`: optimizers x 2 x rates runs, each with
its start, so choose them to fit the time. The report is that of `hf-dbp compare`. ViT-S under both optimizers:

    python benchmarks/gpu.py --sizes small --optimizers adamw muon --batches 512 --seconds 120 --convergence FOLDER

The table of steps was run on an H200 (docs/performance.md), the convergence and the reading only on a CPU.
"""

import argparse
import itertools
import json
import platform
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import step_time
import torch
import yaml

from hf_dbp import SIZES
from hf_dbp.comparison.runner import main as compare
from hf_dbp.data.images import ImageSource, load_images
from hf_dbp.recipes import read_yaml, recipe_path

METHODS = ("stock", "bp", "dbp", "dbp_interval", "dbp_fast", "dbp_full", "dbp_full_blocks")
READS = 512
SETTINGS = ("method", "decorrelated_layers", "wide_blocks", "update_interval", "eta", "kappa")
RECIPE = read_yaml(recipe_path("whole_model.yaml"))
TRAINED = {"bp": {"method": "bp"}, "dbp_full_blocks": {name: RECIPE[name] for name in SETTINGS}}


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


class OutOfTime(BaseException):
    """The time is used up. No library between takes it for an error of its own, as it might an Exception."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after so many seconds."""

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all sizes, batches and optimizers, eager before compiled, and what was left out."""
    begin, rows, left_out = time.monotonic(), [], []
    forms = (False, True)[: 1 + args.compile]
    for compiled, size, optimizer, batch in itertools.product(forms, args.sizes, args.optimizers, args.batches):
        what = f"{size}, {optimizer}, batch {batch}{', compiled' if compiled else ''}"
        chosen = settings(args, optimizer, compiled)
        try:
            with within(begin + args.seconds - time.monotonic()):
                found = step_time.measure(chosen, size, batch)
        except OutOfTime:
            left_out.append(f"{what}: {args.seconds:g} seconds are used up")
            continue
        except torch.OutOfMemoryError:
            left_out.append(f"{what}: out of memory")
            continue
        found = [row for row in found if ("+" in row["method"]) == compiled]
        if args.device == "cpu":
            step_time.with_memory(chosen, found)
        rows += found
        print(f"{what}: {time.monotonic() - begin:.0f} s", step_time.table(found), sep="\n", flush=True)
    return rows, left_out


def input_rates(folder: str) -> dict[str, float]:
    """Images per second that one core reads from a folder: decoded, and from the decoded cache."""
    rates = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, more in {"decoded": {}, "cached": {"streaming": True, "cache_dir": cache}}.items():
            images, _ = load_images(ImageSource(train_dir=folder, **more))
            count = min(len(images), READS)
            start = time.perf_counter()
            for index in range(count):
                images[index]
            rates[name] = count / (time.perf_counter() - start)
    return rates


def plan_of_equal_time(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A plan whose runs have complete schedules that take as long as one another, by the step times of the rows."""
    size, batch = args.sizes[0], args.batches[0]
    variants = {}
    for row in rows:
        if (row["size"], row["batch"]) == (size, batch) and row["method"] in TRAINED:
            prefix = "" if row["method"] == "bp" else "dbp+"
            flags = {"optimizer": row["optimizer_name"], "max_steps": max(4, round(args.run_seconds / row["seconds"]))}
            variants[prefix + row["optimizer_name"]] = TRAINED[row["method"]] | flags
    flags = {"train_dir": args.convergence, "model_size": size, "image_size": args.image_size} | {
        "patch_size": args.patch_size, "per_device_train_batch_size": batch, "bf16": args.dtype == "bf16",
        "use_cpu": args.device == "cpu", "eval_steps": 0.25, "logging_steps": 0.25, "save_strategy": "no",
        "load_best_model_at_end": False, "dataloader_num_workers": args.workers,
        "dataloader_persistent_workers": args.workers > 0,
    }  # fmt: skip
    title = f"ViT-MAE {size}, batch {batch}: {args.run_seconds:g} s of training each"
    against = {name: [f"dbp+{name}"] for name in variants if f"dbp+{name}" in variants}
    if {"adamw", "dbp+muon"} <= variants.keys():
        against["adamw"] = [name for name in variants if name != "adamw"]
    return {"title": title, "recipe": "small_photographs.yaml", "flags": flags, "axes": {"method": variants}} | {
        "search": {"learning_rate": args.learning_rates}, "seeds": [0], "against": against
    }  # fmt: skip


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
    parser.add_argument("--seconds", type=float, default=500.0, help="of measuring; what takes longer is left out")
    parser.add_argument("--images", help="folder of images, to say how fast one core reads them")
    parser.add_argument("--convergence", help="folder of images to train on, after the table")
    parser.add_argument("--run_seconds", type=float, default=20.0, help="of training, for each run of --convergence")
    parser.add_argument(
        "--learning_rates", nargs="+", type=float, default=[1e-3, 2.5e-3, 5e-3], help="of --convergence"
    )
    parser.add_argument("--workers", type=int, default=8, help="processes that read images, of --convergence")
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
        rates = record["images_per_second_and_core"] = input_rates(args.images)
        print(f"one core reads {rates['decoded']:.0f} images/s of {args.images}, {rates['cached']:.0f} from the cache")
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for line in left_out:
        print(f"left out: {line}")
    print(
        f"\n{device}, torch {torch.__version__}, {args.dtype}, ViT-MAE {', '.join(args.sizes)}; written: {args.output}"
    )
    print(step_time.table(rows))
    if args.convergence:
        folder = args.output.with_suffix(".convergence")
        folder.mkdir(parents=True, exist_ok=True)
        plan = folder / "plan.yaml"
        plan.write_text(yaml.safe_dump(plan_of_equal_time(args, rows), sort_keys=False), encoding="utf-8")
        compare(["--plan", str(plan), "--output_dir", str(folder)])


if __name__ == "__main__":
    main()
