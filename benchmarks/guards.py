"""The cost of the numerical guards, as a share of a training step.

    python benchmarks/guards.py                                     # ViT-Small/16, 224 pixels, batch 64, this device
    python benchmarks/guards.py --size mini --image_size 64 --patch_size 8

The guards are the check of loss and gradients (`GuardCallback`) and, in the update of R, the bound on eta and the
check of its sums. After a real step, the update runs with and without them in turn on the same rows, and the check runs
on the step's gradients; medians over the repeats are compared with the step's time. Times are CPU times of this
process, or synchronised wall-clock times on a GPU.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from step_time import Method, images
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from hf_dbp import SIZES, update_decorrelation
from hf_dbp.conversion import decorrelated_layers
from hf_dbp.functional import decorrelation_step_
from hf_dbp.training.guards import GuardCallback


def unguarded_step(*args: Tensor, share: Tensor, **kwargs: float) -> Tensor:
    return decorrelation_step_(*args, **kwargs)


def unguarded_update(update: Callable[[], object]) -> None:
    """The update without an eigenvalue, a check of its sums, or a share."""
    with (
        patch("hf_dbp.functional.largest_eigenvalue", lambda z_MD: z_MD[..., 0, 0]),
        patch("hf_dbp.update.step_share", lambda zzR_DD, largest, count, eta: count),
        patch("hf_dbp.update.decorrelation_step_", unguarded_step),
    ):
        update()


def timed(call: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: under autocast")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.set_defaults(optimizer="adamw", fields={})
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    method, pixels = Method("dbp", args, args.size, args.device), images(args, args.batch, args.device)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=args.device == "cpu", report_to="none")
        guard, state = GuardCallback(), TrainerState()
        guard.on_train_begin(arguments, state, None, model=method.model)

    def check() -> None:
        guard.on_step_begin(arguments, state, None)
        guard.judge(arguments, state, scaled=False)

    method.step(pixels, lambda: None)
    step = min(timed(lambda: method.step(pixels, lambda: None), args.device) for _ in range(2))
    with method.autocast():
        loss = method.forward(pixels).loss
    loss.backward()
    layers = [layer.decorrelation for _, layer in decorrelated_layers(method.model)]
    rows = [layer.rows for layer in layers]
    update = functools.partial(update_decorrelation, method.model)
    seconds: dict[str, list[float]] = {"check": [], "update": [], "unguarded update": []}
    for _ in range(args.repeats):
        for name, call in (
            ("check", check),
            ("update", update),
            ("unguarded update", functools.partial(unguarded_update, update)),
        ):
            for layer, kept in zip(layers, rows, strict=True):
                layer.rows = kept
            seconds[name].append(timed(call, args.device))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bound = statistics.median(a - b for a, b in zip(seconds["update"], seconds["unguarded update"], strict=True))
    print(f"step {step:.4f} s, " + ", ".join(f"{name} {value:.4f} s" for name, value in medians.items()))
    print(f"of a step: check {100 * medians['check'] / step:.2f} %, in the update {100 * bound / step:.2f} %")


if __name__ == "__main__":
    main()
