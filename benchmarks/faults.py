"""Kill a run again and again, repeat its command each time, and compare the results bit for bit.

    python benchmarks/faults.py                                   # 60 kills: about ten minutes on one core
    python benchmarks/faults.py --kills 6 --steps 12 --output faults.json

One process trains a very small model and saves every three steps. A signal ends each attempt at a random moment
(seeded): during start-up, between two saves, during a save, or at the end; one in five is SIGTERM, the others SIGKILL.
The same command is then repeated until it finishes; if signals are left, another run begins. Every finished run is
compared bit for bit with an undisturbed one: weights, every R, optimizer state, schedule, random state, validation
losses, and for every step the images with their views and masks.

To save the seconds of importing torch, an attempt is forked from a process that has imported it and calls the main of
`training_scripts/run_dbp_mae.py`; every sixth attempt is that command itself. The files in the folder show where a
signal hit.
"""

import argparse
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import codecarbon  # noqa: F401  imported late by what is forked here
import matplotlib.pyplot  # noqa: F401
import torch
from safetensors.torch import load_file

from hf_dbp.pretraining import main as pretrain
from hf_dbp.training.saving import UNFINISHED, last_checkpoint
from hf_dbp.training.trainer import MAETrainer

SCRIPT = Path(__file__).parents[1] / "training_scripts" / "run_dbp_mae.py"
SIZES = (
    "num_hidden_layers=2,hidden_size=32,num_attention_heads=2,intermediate_size=64,decoder_hidden_size=16,"
    "decoder_num_hidden_layers=1,decoder_num_attention_heads=2,decoder_intermediate_size=32"
)
FLAGS = (
    "--dataset_name wire_bonding --built_in_size 32 --max_train_samples 24 --max_eval_samples 2 --model_size mini "
    f"--config_overrides {SIZES} --image_size 32 --patch_size 8 --per_device_train_batch_size 8 --learning_rate 1e-3 "
    "--update_interval 1 "
    "--eval_strategy steps --eval_steps 3 --save_strategy steps --save_steps 3 --save_total_limit 2 --logging_steps 3 "
    "--report_to none --use_cpu true --do_train --do_eval --disable_tqdm true"
).split()
COMMAND_EVERY, TERM_SHARE, LIMIT_SECONDS = 6, 0.2, 300
AIMS = {"start": 1, "training": 3, "save": 5, "end": 1}  # with these weights


# ---- an attempt ----


def trace_to(file: Path) -> None:
    """Make every step write its number and a digest of its images, views and masks."""
    stock = MAETrainer.training_step

    def training_step(self: MAETrainer, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        digest = hashlib.sha1(b"".join(inputs[name].numpy().tobytes() for name in sorted(inputs))).hexdigest()
        with file.open("a", encoding="ascii") as lines:
            lines.write(f"{self.state.global_step} {digest}\n")
        return stock(self, model, inputs, *args, **kwargs)

    MAETrainer.training_step = training_step


def start(folder: Path, steps: int, *, as_command: bool) -> int:
    """Start or resume the run in ``folder`` as a process; return its id."""
    arguments = [*FLAGS, "--max_steps", str(steps), "--output_dir", str(folder)]
    with Path(f"{folder}.log").open("a") as log:
        if as_command:
            return subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stdout=log, stderr=log).pid
        process = os.fork()
        if process:
            return process
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    status = 1
    try:
        trace_to(Path(f"{folder}.trace"))
        pretrain(arguments)
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(process: int) -> int | None:
    """Exit status of a child, negative for a signal; None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait(process: int, until: Callable[[], bool], seconds: float) -> int | None:
    """Wait until the condition holds, the process ends, or the time is up."""
    end = time.monotonic() + seconds
    while (status := ended(process)) is None and not until() and time.monotonic() < end:
        time.sleep(0.0005)
    return status


def moment(aim: str, folder: Path, rng: random.Random) -> tuple[Callable[[], bool], float]:
    """The condition to wait for, and the seconds from then until the signal."""
    before, saves, seen = {*folder.glob("checkpoint-*")}, rng.randint(1, 3), {*()}

    def saved() -> int:
        seen.update({*folder.glob("checkpoint-*")} - before)
        return len(seen)

    if aim == "start":
        return lambda: True, rng.uniform(0.0, 3.0)
    if aim == "training":
        return lambda: saved() >= saves, rng.uniform(0.0, 0.2)
    if aim == "save":
        return lambda: saved() >= saves - 1 and (folder / UNFINISHED).is_dir(), rng.uniform(0.0, 0.05)
    return (folder / "config.json").exists, rng.uniform(0.0, 1.0)


def traced(folder: Path) -> list[list[str]]:
    """Step and digest of every step that a run started."""
    file = Path(f"{folder}.trace")
    return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []


def where(folder: Path, steps: int, *, since: float, trains: bool) -> str:
    """What a signal hit, judging by what the attempt left in the folder and whether it trained."""
    left = folder / UNFINISHED
    fresh = left.is_dir() and left.stat().st_mtime > since
    if fresh and next(left.glob("deleted-*"), None):
        return "deleting an old checkpoint"
    if fresh and next(left.glob("checkpoint-*"), None):
        return "writing a checkpoint"
    if fresh:
        return "writing the final model"
    if (folder / f"checkpoint-{steps}").is_dir():
        return "finishing"
    return "training or evaluating" if trains else "starting or restoring"


# ---- results ----


def same(one: Any, other: Any) -> bool:
    """Whether two values, including nested dictionaries and lists, are bit-identical."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) if not hasattr(one, "tobytes") else one.tobytes() == other.tobytes()


def outcome(folder: Path, steps: int) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    last = folder / f"checkpoint-{steps}"
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {
        "weights and R": load_file(next(last.glob("*.safetensors"))),
        "optimizer state": torch.load(last / "optimizer.pt", weights_only=True),
        "schedule": torch.load(last / "scheduler.pt", weights_only=True),
        "random state": torch.load(last / "rng_state.pth", weights_only=False),
        "final model": load_file(next(folder.glob("*.safetensors"))),
        "validation losses": [(row["step"], row["eval_loss"]) for row in record["rows"]],
        "files": sorted(path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")),
    }


def differences(run: Path, undisturbed: Path, steps: int) -> list[str]:
    """The differences between two finished runs."""
    ours, theirs = outcome(run, steps), outcome(undisturbed, steps)
    found = [name for name in ours if not same(ours[name], theirs[name])]
    expected = dict(traced(undisturbed))
    if any(expected[step] != digest for step, digest in traced(run)):
        found.append("order of images, views or masks")
    return found


# ---- the trial ----


def disturbed_run(folder: Path, steps: int, kills: list[dict[str, Any]], count: int, rng: random.Random) -> None:
    """Repeat a run's command until it finishes, sending signals, which are added to ``kills``, up to ``count``."""
    while True:
        as_command = len(kills) % COMMAND_EVERY == COMMAND_EVERY - 1
        since, begun, saved = time.time(), len(traced(folder)), last_checkpoint(folder)
        aims = dict(AIMS) if saved and int(Path(saved).name[11:]) * 3 >= steps * 2 else AIMS | {"end": 0}
        aim = rng.choices([*aims], [*aims.values()])[0] if len(kills) < count else None
        number = signal.SIGTERM if rng.random() < TERM_SHARE else signal.SIGKILL
        condition, delay = moment(aim, folder, rng) if aim else (lambda: False, 0.0)
        process = start(folder, steps, as_command=as_command)
        status = wait(process, condition, LIMIT_SECONDS)
        if status is None and aim is not None:
            status = wait(process, lambda: False, delay)
        if status is None:
            hit = where(folder, steps, since=since, trains=True)
            os.kill(process, number if aim else signal.SIGKILL)
            status = wait(process, lambda: False, LIMIT_SECONDS)
            expected = (-number, 0, 128 + number) if aim else ()
            if status not in expected:
                raise SystemExit(f"error: {number.name} ended with status {status}; see {folder}.log")
            if status != 0:
                last = last_checkpoint(folder)
                if number == signal.SIGKILL or status != 128 + number:  # the files it left show what it hit
                    hit = where(folder, steps, since=since, trains=len(traced(folder)) > begun or last != saved)
                kills.append({"signal": number.name, "aim": aim, "where": hit, "status": status})
                kills[-1] |= {
                    "started as": "command" if as_command else "fork",
                    "goes on from": last and Path(last).name,
                }
                print(len(kills), *kills[-1].values(), file=sys.stderr)
        elif status != 0:
            raise SystemExit(f"error: an attempt ended by itself with status {status}; see {folder}.log")
        if status == 0:
            return


def trial(folder: Path, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """All runs of a trial in ``folder``; returns the content of the JSON file."""
    begun, rng = time.monotonic(), random.Random(seed)
    undisturbed = folder / "undisturbed"
    process = start(undisturbed, steps, as_command=False)
    if wait(process, lambda: False, LIMIT_SECONDS) != 0:
        raise SystemExit(f"error: the undisturbed run failed; see {undisturbed}.log")
    tried: list[dict[str, Any]] = []
    runs = []
    while len(tried) < kills:
        run = folder / f"run-{len(runs)}"
        first = len(tried)
        disturbed_run(run, steps, tried, kills, rng)
        found = differences(run, undisturbed, steps)
        runs.append({"kills": len(tried) - first, "differences": found, "steps": steps})
        for kill in tried[first:]:
            kill["survived"] = not found
    return {"seed": seed, "kills": tried, "runs": runs, "seconds": round(time.monotonic() - begun)}


def table(report: dict[str, Any]) -> str:
    """A table of signals by where they hit: tried, survived, lost."""
    tried = Counter((kill["signal"], kill["where"]) for kill in report["kills"])
    survived = Counter((kill["signal"], kill["where"]) for kill in report["kills"] if kill["survived"])
    lines = ["| signal | while | tried | survived | lost |", "| --- | --- | ---: | ---: | ---: |"]
    for key in sorted(tried):
        lines.append(f"| {key[0]} | {key[1]} | {tried[key]} | {survived[key]} | {tried[key] - survived[key]} |")
    total, kept = sum(tried.values()), sum(survived.values())
    lines.append(f"| all | | {total} | {kept} | {total - kept} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a run at random moments and compare the results.")
    parser.add_argument("--kills", type=int, default=60, help="signals in all")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run, a multiple of 3")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--output", type=Path, help="JSON file for the report")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # imported objects are not garbage of the forks
    folder = Path(tempfile.mkdtemp(prefix="faults-"))  # kept, with the logs, if something is lost
    report = trial(folder, args.kills, args.steps, args.seed)
    print(table(report))
    runs = report["runs"]
    equal = sum(not run["differences"] for run in runs)
    print(f"{len(runs)} runs of {args.steps} steps, {equal} equal to the undisturbed one; {report['seconds']} s")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if equal < len(runs):
        raise SystemExit(
            f"error: these differ: {[run['differences'] for run in runs if run['differences']]}; see {folder}"
        )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
