"""Does a long run grow or slow down? Watches a very small pre-training run from outside.

    python benchmarks/endurance.py                        # 20,000 steps on one core: about six minutes
    python benchmarks/endurance.py --steps 2000 --output endurance.json

The run is the real command in a separate process, with an evaluation and a checkpoint every 200 steps. Memory (resident
set), open files and processor time are read from /proc once a second, and the seconds of a step from the record (the
median between two evaluations, training alone). Other programs on the machine distort processor time per step, with
evaluations and saves, the least. The last quarter of training is compared with the first, without its first tenth, in
which libraries still load.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "training_scripts" / "run_dbp_mae.py"
SIZES = (
    "num_hidden_layers=2,hidden_size=32,num_attention_heads=2,intermediate_size=64,decoder_hidden_size=16,"
    "decoder_num_hidden_layers=1,decoder_num_attention_heads=2,decoder_intermediate_size=32"
)
FLAGS = (
    "--dataset_name wire_bonding --built_in_size 32 --max_train_samples 256 --max_eval_samples 16 --model_size mini "
    f"--config_overrides {SIZES} --image_size 32 --patch_size 8 --per_device_train_batch_size 8 --learning_rate 1e-3 "
    "--update_interval 1 "
    "--eval_strategy steps --eval_steps 200 --save_strategy steps --save_steps 200 --save_total_limit 2 "
    "--logging_steps 100 --report_to none --use_cpu true --do_train --do_eval --disable_tqdm true"
).split()


def sample(pid: int) -> dict[str, float]:
    """Current resident memory in MiB, open files and processor seconds of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    resident = int(status.split("VmRSS:")[1].split()[0])
    ticks = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[11:13]
    processor = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return {"mib": resident / 1024, "files": len(os.listdir(f"/proc/{pid}/fd")), "processor seconds": processor}


def watch(steps: int, folder: Path) -> list[dict[str, float]]:
    """Run ``steps`` steps in ``folder``, and take one sample per second from the first checkpoint to the last."""
    command = [sys.executable, str(SCRIPT), *FLAGS, "--max_steps", str(steps), "--output_dir", str(folder)]
    samples = []
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            step = max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)
            if 0 < step < steps:
                samples.append(sample(process.pid) | {"step": step})
            time.sleep(1)
    if process.returncode:
        raise SystemExit(f"error: the run failed, see {log.name}")
    return samples


def processor_times(samples: list[dict[str, float]]) -> list[float]:
    """Processor milliseconds per step, over twentieths of the run, so a second more or less does not matter."""
    ends = [samples[len(samples) * part // 20] for part in range(20)] + [samples[-1]]
    pairs = [(a, b) for a, b in itertools.pairwise(ends) if b["step"] > a["step"]]
    return [1000 * (b["processor seconds"] - a["processor seconds"]) / (b["step"] - a["step"]) for a, b in pairs]


def quarters(values: list[float]) -> dict[str, float]:
    """Medians over the first quarter, without its first tenth, and over the last quarter, and the largest value."""
    quarter = len(values) // 4
    first, last = values[quarter // 10 : quarter], values[-quarter:]
    return {"first": statistics.median(first), "last": statistics.median(last), "largest": max(values)}


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Memory, open files and step time of a long run.")
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps, at least 2000")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = watch(args.steps, Path(folder))
        rows = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))["rows"]
    figures = {
        "steps": args.steps,
        "resident memory, MiB": quarters([one["mib"] for one in samples]),
        "open files": quarters([one["files"] for one in samples]),
        "median step, ms": quarters([row["step_seconds"] * 1000 for row in rows]),
        "processor per step, ms": quarters(processor_times(samples)),
    }
    print(f"{args.steps} steps             first quarter   last quarter    largest")
    for name, values in figures.items():
        if isinstance(values, dict):
            print(f"{name:<26} {values['first']:>12.2f} {values['last']:>14.2f} {values['largest']:>10.2f}")
    if args.output is not None:
        args.output.write_text(json.dumps(figures | {"samples": samples}, indent=1) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
