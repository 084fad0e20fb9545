"""How long a step of each variant of a plan takes, measured in turn in one process, for the plan's yardstick.

    OMP_NUM_THREADS=1 python benchmarks/plan_times.py PLAN [--flag VALUE ...] --output step_times.json
    python training_scripts/run_comparison.py --plan PLAN ... --step_times step_times.json

Other programs on the machine disturb the runs' own clocks, and differently for each run. Here all variants take their
steps in turn: forward and backward on random images of the plan's size and batch, the optimizer, and the update of R at
its interval, averaged over a whole cycle of them. Weights, optimizer and settings are the plan's, at the first searched
setting. On a CPU the clock counts the processor time of this process.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
from step_time import Method, timed_parts

from hf_dbp.comparison.plans import read_plan
from hf_dbp.comparison.runs import PlannedRun
from hf_dbp.pretraining import build_model
from hf_dbp.recipes import parse_arguments
from hf_dbp.training.arguments import GROUPS
from hf_dbp.training.optimizers import HiddenWithAdamW, decay_groups

CHANNELS = 3


class PlannedMethod(Method):
    """A variant as its flags describe it, with the step of `step_time.Method`."""

    def __init__(self, planned: PlannedRun, device: str) -> None:
        flags = [*planned.arguments, "--output_dir", "unused"]
        model_args, data_args, decorrelation_args, args = parse_arguments(GROUPS, flags)
        model = build_model(model_args, data_args.num_channels or CHANNELS, args.seed)
        self.base = model_args.method
        self.model = model.to(device).train()
        self.forward = self.model
        options: dict[str, Any] = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2)}
        if model_args.optimizer == "adamw":
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(decay_groups(named, args.weight_decay), fused=True, **options)
        else:
            self.optimizer = HiddenWithAdamW(  # type: ignore[assignment]
                self.model, model_args.optimizer, weight_decay=args.weight_decay, **options
            )
        self.autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=args.bf16)
        self.interval = decorrelation_args.update_interval if self.base == "dbp" else 1
        size, channels = self.model.config.image_size, self.model.config.num_channels
        sides = (size, size) if isinstance(size, int) else size
        self.pixels = torch.randn(args.per_device_train_batch_size, channels, *sides, device=device)

    def cycle(self, clock: Any) -> float:
        """Seconds of a step, averaged over a step with and one without an update of R."""
        pairs = [sum(timed_parts(self, self.pixels, clock, due)) for due in (True, False)]
        return self.average(*pairs)


def measure(plan_name: str, extra: list[str], repeats: int, device: str) -> dict[str, list[float]]:
    """Variant -> seconds of its step, one for each turn."""
    plan = read_plan(plan_name, extra)
    clock = time.perf_counter if device == "cuda" else time.process_time
    first = {run.variant: run for run in reversed(plan.search_runs())}
    methods = {variant: PlannedMethod(first[variant], device) for variant in plan.variants}
    seconds: dict[str, list[float]] = {variant: [] for variant in methods}
    for turn in range(repeats + 1):
        for variant, method in methods.items():
            taken = method.cycle(clock)
            if turn:  # the first warms up
                seconds[variant].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="YAML file or name of a plan; further flags are the comparison's")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("step_times.json"))
    args, extra = parser.parse_known_args()
    seconds = measure(args.plan, extra, args.repeats, args.device)
    record = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": args.device}
    args.output.write_text(json.dumps(record | {"seconds": seconds}, indent=1) + "\n", encoding="utf-8")
    for variant, taken in seconds.items():
        print(f"{variant:24} {sorted(taken)[len(taken) // 2]:.4f} s")
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
