"""The cost of a training step with and without decorrelation: all methods take turns, step by step, in one run.

    python benchmarks/step_time.py                                  # ViT-Small/16, 224 pixels, batch 64, this device
    python benchmarks/step_time.py --sizes tiny small --batches 16 64 --compile --memory --output step_time.json

Methods
    stock               transformers' ViTMAEForPreTraining
    bp                  ours with nothing decorrelated: every ratio is to this one in the same repeat
    naive               the published algorithm as its authors wrote it: z = R x for every token, every linear with an
                        R of its own, C = offdiag(z^T z) / M and then C R, layer after layer
    dbp                 W R, and the paper's settings: 10 % of the rows, no floor or cap, a step of R every step
    dbp_interval        the same with a step of R every 5 steps
    dbp_block_inputs    a step of R every step, patch projection, q/k/v and first MLP linear only
    dbp_fast            block inputs every 5 steps
    dbp_full            every linear of encoder and decoder, every 5 steps
    dbp_full_blocks     the same, R of every second MLP linear in four diagonal blocks (wide_blocks)
    <method>+compile    with --compile

A step is forward, backward, optimizer (fused AdamW, or Muon on hidden matrices) and the update of R. Reported are
medians over the repeats: seconds of each part, ratio to bp, images/s, FLOPs (counted from the operators), and the peak
memory of a step: allocated on a GPU; on a CPU, with --memory, beyond an idle process. Utilisation is bp's FLOPs over
the time and the matrix rate measured here.

Clocks: a GPU's own events; on a CPU the time that this process's threads computed (``--clock wall`` for the wall's), so
that other programs distort less. Use one thread for comparisons on a busy machine: waiting threads count as computing.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from hf_dbp import SIZES, DBPViTMAEConfig, DBPViTMAEForPreTraining, initialize_mae_, update_decorrelation
from hf_dbp.training.optimizers import HiddenWithAdamW
from hf_dbp.update import seed_sampling, set_gathering

INTERVAL = 5
PARTS = ("forward", "backward", "optimizer", "update")
#: of our models: decorrelated layers, steps between updates of R, blocks of R of every second MLP linear
FORMS = {
    "bp": ("none", 1, 1),
    "dbp": ("encoder", 1, 1),
    "dbp_interval": ("encoder", INTERVAL, 1),
    "dbp_block_inputs": ("block_inputs", 1, 1),
    "dbp_fast": ("block_inputs", INTERVAL, 1),
    "dbp_full": ("full", INTERVAL, 1),
    "dbp_full_blocks": ("full", INTERVAL, 4),
}
METHODS = ("stock", "bp", "naive", *list(FORMS)[1:])


class NaiveLayer(nn.Module):
    """The authors' layer: z = R x for every token, then W z + b; a tenth of the z is kept."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("R", torch.eye(layer.weight[0].numel(), device=layer.weight.device), persistent=False)
        self.z = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            z = F.linear(x, self.R)
            self.keep(z)
            return self.layer(z)
        weight = self.layer.weight
        z = F.conv2d(x, self.R.view(-1, *weight.shape[1:]), stride=self.layer.stride)
        self.keep(z.permute(0, 2, 3, 1))
        return F.conv2d(z, weight.flatten(1)[..., None, None], self.layer.bias)

    def keep(self, z: Tensor) -> None:
        z_ND = z.detach().flatten(0, -2)
        self.z = z_ND[torch.randperm(len(z_ND), device=z.device)[: max(1, len(z_ND) // 10)]].float()

    @torch.no_grad()
    def update(self, eta: float) -> None:
        C = self.z.T @ self.z / len(self.z)
        C.fill_diagonal_(0.0)
        self.R.sub_(eta * (C @ self.R))


def naive_model(stock: ViTMAEForPreTraining) -> ViTMAEForPreTraining:
    """The stock model with every linear of its encoder in the naive form."""
    for name, child in list(stock.vit.named_modules()):
        if isinstance(child, nn.Linear | nn.Conv2d):
            parent, _, leaf = name.rpartition(".")
            setattr(stock.vit.get_submodule(parent), leaf, NaiveLayer(child))
    return stock


class Method:
    """One way to train: a model, its optimizer, and its step in four parts."""

    count = 0  # updates so far

    def __init__(self, name: str, args: argparse.Namespace, size: str, device: str) -> None:
        self.base, _, compiled = name.partition("+")
        torch.manual_seed(0)
        layers, self.interval, blocks = FORMS.get(self.base, FORMS["bp"])
        fields = SIZES[size] | {"image_size": args.image_size, "patch_size": args.patch_size} | args.fields
        with torch.device(device):
            if self.base in ("stock", "naive"):
                model = ViTMAEForPreTraining(ViTMAEConfig(**fields))
                initialize_mae_(model)
                model = naive_model(model) if self.base == "naive" else model
            else:
                config = DBPViTMAEConfig(**fields, decorrelated_layers=layers, wide_blocks=blocks)
                model = DBPViTMAEForPreTraining(config)
        self.model = model.to(device).train()
        self.forward = torch.compile(self.model) if compiled else self.model
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.05, "fused": True}
        self.optimizer = (
            torch.optim.AdamW(trainable, **options)
            if args.optimizer == "adamw"
            else HiddenWithAdamW(self.model, args.optimizer, **options)
        )
        self.autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=args.dtype == "bf16")

    def step(self, pixels: Tensor, mark: Callable[[], None], due: bool = True) -> None:
        """One training step, with an update of R if ``due``; ``mark`` is called first and after each part."""
        updates = self.base.startswith("dbp") and (due or self.interval == 1)
        if self.base.startswith("dbp"):
            set_gathering(self.model, updates)
            if updates:
                self.count += 1
                seed_sampling(self.model, seed=0, step=self.count)
        mark()
        with self.autocast():
            loss = self.forward(pixels).loss
        mark()
        loss.backward()
        mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark()
        if updates:
            update_decorrelation(self.model, eta=5e-4 * self.interval)
        elif self.base == "naive":
            for module in self.model.modules():
                if isinstance(module, NaiveLayer):
                    module.update(5e-4)
        mark()

    def average(self, due: float, other: float) -> float:
        """The mean over a cycle of steps, from one with an update of R and one without (if there are such)."""
        return (due + (self.interval - 1) * other) / self.interval if self.interval > 1 else (due + other) / 2

    def warm_up(self, pixels: Tensor) -> float:
        """A step of each kind; FLOPs of a step on average."""
        counts = []
        for due in (True, False):
            with FlopCounterMode(display=False) as counter:
                self.step(pixels, lambda: None, due)
            counts.append(counter.get_total_flops())
        return self.average(*counts)


def timed_parts(method: Method, pixels: Tensor, clock: Callable[[], float], due: bool) -> list[float]:
    """Seconds of the four parts of one step."""
    if pixels.is_cuda:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(PARTS) + 1)]
        remaining = iter(events)
        method.step(pixels, lambda: next(remaining).record(), due)
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
    marks: list[float] = []
    method.step(pixels, lambda: marks.append(clock()), due)
    return [b - a for a, b in itertools.pairwise(marks)]


def matrix_rate(device: str, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOP/s of a large square product: the ceiling for a step."""
    n = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        start = clock()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return 2 * n**3 / best


def images(args: argparse.Namespace, batch: int, device: str) -> Tensor:
    return torch.randn(batch, 3, args.image_size, args.image_size, device=device)


def resident(key: str) -> int:
    """Bytes of memory of this process, now (VmRSS) or at most so far (VmHWM)."""
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def peak_on_gpu(method: Method, pixels: Tensor, own: int) -> int:
    """Bytes that a step with an update of R takes at most, with the method's own ones but without other methods'."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    method.step(pixels, lambda: None)
    return own + torch.cuda.max_memory_allocated() - before


def matrix_bytes(model: nn.Module) -> int:
    """Bytes of all matrices R."""
    return sum(p.nbytes for name, p in model.named_parameters() if name.split(".")[-1] == "R")


def peak_bytes(name: str, args: argparse.Namespace, size: str, batch: int) -> dict[str, int]:
    """Peak memory of three steps, and what the matrices R take of it; runs in a process of its own."""
    torch.set_num_threads(args.threads)
    pixels = images(args, batch, args.device)
    idle = resident("VmRSS")
    method = Method(name, args, size, args.device)
    for _ in range(3):
        method.step(pixels, lambda: None)
    return {"peak_bytes": resident("VmHWM") - idle, "matrix_bytes": matrix_bytes(method.model)}


def measure(args: argparse.Namespace, size: str, batch: int) -> list[dict[str, Any]]:
    """One row for each method at one size and batch."""
    names = list(args.methods)
    names += [f"{name}+compile" for name in args.methods if args.compile and name != "stock"]
    clock = time.perf_counter if args.device == "cuda" or args.clock == "wall" else time.process_time
    pixels = images(args, batch, args.device)
    methods, flops, own = {}, {}, {}
    rate = matrix_rate(args.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32, clock)
    for name in names:
        before = torch.cuda.memory_allocated() if pixels.is_cuda else 0
        method = methods[name] = Method(name, args, size, args.device)
        if "+" in name:
            flops[name] = flops[name.partition("+")[0]]
            for due in (True, False, True, False):
                method.step(pixels, lambda: None, due)
        else:
            flops[name] = method.warm_up(pixels)
        own[name] = torch.cuda.memory_allocated() - before if pixels.is_cuda else 0
    repeats: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(args.repeats):
        taken: dict[str, list[list[float]]] = {name: [] for name in names}
        for due in (True, False):
            for name, method in methods.items():
                taken[name].append(timed_parts(method, pixels, clock, due))
        for name, method in methods.items():
            repeats[name].append([method.average(*pair) for pair in zip(*taken[name], strict=True)])
    rows = []
    for name in names:
        totals = [sum(parts) for parts in repeats[name]]
        ratios = [total / sum(parts) for total, parts in zip(totals, repeats["bp"], strict=True)]
        seconds = statistics.median(totals)
        row = {
            "size": size,
            "batch": batch,
            "optimizer_name": args.optimizer,
            "method": name,
            "ratio_to_bp": statistics.median(ratios),
        }
        row |= {
            "flops": flops[name],
            "ratios": ratios,
            "seconds": seconds,
            "images_per_second": batch / seconds,
            "matrix_rate": rate,
        }
        row |= {part: statistics.median(r[i] for r in repeats[name]) for i, part in enumerate(PARTS)}
        if pixels.is_cuda:
            row["peak_bytes"] = peak_on_gpu(methods[name], pixels, own[name])
        rows.append(row)
    useful = next(row["flops"] for row in rows if row["method"] == "bp")
    for row in rows:
        row |= {"flops_to_bp": row["flops"] / useful, "utilisation": useful / row["seconds"] / rate}
    return rows


def with_memory(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Add peak memory on a CPU to the rows, each from a fresh process."""
    context = multiprocessing.get_context("spawn")
    for row in rows:
        with context.Pool(1) as pool:
            row.update(pool.apply(peak_bytes, (row["method"], args, row["size"], row["batch"])))


def table(rows: list[dict[str, Any]]) -> str:
    header = f"{'size':6} {'batch':>5} {'optim':6} {'method':24} {'x bp':>6} {'FLOPs':>6} "
    header += f"{'s/step':>8} {'img/s':>8} {'util':>5}  "
    lines = [header + "  ".join(f"{part:>9}" for part in PARTS) + f"  {'peak MiB':>9}"]
    for r in rows:
        line = f"{r['size']:6} {r['batch']:5} {r['optimizer_name']:6} {r['method']:24} "
        line += f"{r['ratio_to_bp']:6.3f} {r['flops_to_bp']:6.3f} "
        line += f"{r['seconds']:8.4f} {r['images_per_second']:8.1f} {r['utilisation']:5.2f}  "
        line += "  ".join(f"{r[part]:9.4f}" for part in PARTS)
        lines.append(line + (f"  {r['peak_bytes'] / 2**20:9.0f}" if "peak_bytes" in r else ""))
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--batches", nargs="+", type=int, default=[64])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="bf16: under autocast")
    parser.add_argument("--compile", action="store_true", help="measure each method compiled as well")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure peak memory on a CPU, a process for each method (on a GPU it is always measured)",
    )
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="on a CPU")
    parser.add_argument("--output", type=Path, default=Path("step_time.json"))
    parser.set_defaults(fields={})  # of the configuration, in place of the size's (step_growth.py)
    args = parser.parse_args()
    if "bp" not in args.methods:
        parser.error("--methods must include bp, which the others are compared with")
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for size, batch in itertools.product(args.sizes, args.batches):
        found = measure(args, size, batch)
        if args.memory and args.device == "cpu":
            with_memory(args, found)
        rows += found
        print(table(found), flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    record = {"device_name": device, "cpus": os.cpu_count(), "load": os.getloadavg(), "torch": torch.__version__}
    args.output.write_text(json.dumps(record | {"arguments": setting, "rows": rows}, indent=1) + "\n")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
