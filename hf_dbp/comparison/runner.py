"""Compare training methods: run what is missing from a plan, then report.

The main of `training_scripts/run_comparison.py`.

Every run is a separate process. A finished run is not repeated, an interrupted one resumes from its last checkpoint,
and a failed one is reported while the others continue. The order is: every variant at every searched setting with the
first seed; the other seeds of each variant at its best setting; then, if asked for, the baselines' schedules of other
lengths, and the probe and the heads on each of these encoders. On SIGTERM and SIGINT the pre-training runs are told to
save and end, and the runner waits for them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_dbp.comparison.heads import EVALUATION, HEADS
from hf_dbp.comparison.plans import Finetuning, Plan, Probe, plan_of, read_plan
from hf_dbp.comparison.report import write_report
from hf_dbp.comparison.runs import PROBE_FILE, PlannedRun, Run, best_settings, collect_runs, read_run
from hf_dbp.errors import UserError, command
from hf_dbp.fusing import check_views, fuse_run
from hf_dbp.recipes import plan_names
from hf_dbp.records import RECORD, RunRecord, without_secrets, write_json
from hf_dbp.training.stopping import handling, leave

__all__ = ["Runner", "main", "run_plan"]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
FLAGS_FILE = "flags.json"  # the flags a run was started with
FINETUNE = "from MODULE import main; main()"
PROBE = "from hf_dbp.downstream.probe import main; main()"


class Runner:
    """Runs planned runs as processes, several at a time, with one progress bar for all of them.

    Args:
        folder: folder of the comparison; runs are in ``folder/runs``.
        total: number of runs in the progress bar.
        jobs: runs at a time.
        launcher: command instead of ``python``, such as ``accelerate launch --multi_gpu``.
        script: script to run instead of the package's pre-training.
    """

    def __init__(
        self, folder: Path, total: int, jobs: int = 1, launcher: str | None = None, script: str | None = None
    ) -> None:
        self.program = ["-m", "hf_dbp.pretraining"] if script is None else [script]
        self.folder, self.jobs = folder, jobs
        self.shown = -1.0
        self.launcher = shlex.split(launcher) if launcher else [sys.executable]
        self.bar = tqdm(
            total=total, unit="run", bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total} {postfix}"
        )

    def run(self, planned: Iterable[PlannedRun]) -> list[Run]:
        """The runs in the given order, each finished or with its error.

        Raises:
            UserError: a folder holds a run made with other flags.
        """
        planned = list(planned)
        for one in planned:
            check_flags(self.path(one), one.arguments)
        done: dict[PlannedRun, Run] = {}
        waiting = list(planned)
        running: dict[PlannedRun, subprocess.Popen[bytes]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    one = waiting.pop(0)
                    finished = read_run(one, self.path(one))
                    if finished is None:
                        running[one] = self.start(one)
                    else:
                        done[one] = finished
                for one, process in list(running.items()):
                    if process.poll() is not None:
                        del running[one]
                        done[one] = self.outcome(one, process.returncode)
                self.show(sum(map(self.progress, running)), len(done), list(running))
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            for process in running.values():
                process.terminate()
                process.wait()
        self.bar.n += len(done)
        return [done[one] for one in planned]

    def path(self, planned: PlannedRun) -> Path:
        return self.folder / "runs" / planned.folder

    def start(self, planned: PlannedRun) -> subprocess.Popen[bytes]:
        folder = self.path(planned)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FLAGS_FILE, without_secrets(planned.arguments))
        command = [*self.launcher, *self.program, *planned.arguments, "--output_dir", str(folder)]
        command += ["--disable_tqdm", "true"] if self.program[0] == "-m" else []
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def outcome(self, planned: PlannedRun, status: int) -> Run:
        """The finished run, or one with the error from its log."""
        run = read_run(planned, self.path(planned)) if status == 0 else None
        if run is None:
            run = Run(planned, error=failure(status, self.path(planned) / "log.txt"))
        what = f"best validation loss {run.best_loss}" if run.error is None else run.error
        self.bar.write(f"{planned.name}: {what}")
        return run

    def progress(self, planned: PlannedRun) -> float:
        """The finished share of the run, in [0, 1], judging by its last evaluation."""
        file = self.path(planned) / RECORD
        if not file.is_file():
            return 0.0
        record = RunRecord.read(file)
        if not record.rows:
            return 0.0
        steps, epochs = (record.arguments.get(name) or 0 for name in ("max_steps", "num_train_epochs"))
        last = record.rows[-1]
        if steps <= 0 and not epochs:
            return 0.0  # another script may not record it
        return float(min(last["step"] / steps if steps > 0 else last["epoch"] / epochs, 1.0))

    def show(self, partly: float, done: int, running: list[PlannedRun]) -> None:
        before, now = self.bar.n, "; ".join(run.name for run in running)
        if (self.shown, self.bar.postfix) != (before + done + partly, now):
            self.bar.set_postfix_str(now, refresh=False)
            self.bar.n = self.shown = before + done + partly
            self.bar.refresh()
            self.bar.n = before


def check_flags(folder: Path, arguments: Sequence[str]) -> None:
    """Refuse a folder whose run was made with other flags, because the report must describe what was run.

    A run that left neither a result nor a checkpoint does not count: its flags may be corrected.
    """
    begun = any((folder / name).is_file() for name in (RECORD, EVALUATION, PROBE_FILE)) or any(
        folder.glob("checkpoint-*")
    )
    file = folder / FLAGS_FILE
    if begun and file.is_file() and json.loads(file.read_text(encoding="utf-8")) != without_secrets(arguments):
        raise UserError(f"{folder} holds a run with other flags; choose another --output_dir or delete it")


def failure(status: int, log: Path) -> str:
    """Why a run of the comparison failed: its exit status and the last line of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"exit status {status}: {last.strip()}"


def run_plan(plan: Plan, folder: Path, *, jobs: int = 1, launcher: str | None = None) -> list[Run]:
    """Run what is missing from a plan; return all its runs, failed ones with their error.

    Raises:
        UserError: a flag of the plan is refused, or a folder holds a run made with other flags.
    """
    plan.check()
    for head, finetuning in plan.heads.items():
        for file in sorted((folder / "runs").glob(f"**/{head}/{FLAGS_FILE}")):
            check_flags(file.parent, finetuning.arguments)
    if plan.probe is not None:
        for file in sorted((folder / "runs").glob(f"**/probe/{FLAGS_FILE}")):
            check_flags(file.parent, plan.probe.arguments)
    searched, lengths = plan.search_runs(), sum(map(len, plan.lengths.values()))
    total = len(searched) + len(plan.variants) * (len(plan.seeds) - 1) + lengths * len(plan.seeds)
    runner = Runner(folder, total, jobs, launcher, plan.script)
    runs = runner.run(searched)
    best = best_settings(runs)
    runs += runner.run(plan.seed_runs(best))
    runs += runner.run(plan.length_runs(best))
    runner.bar.close()
    at_best = [run for run in runs if run.planned.searched == best.get(run.planned.variant)]
    if plan.probe is not None:
        probe_all(plan.probe, at_best, folder)
    for head, finetuning in plan.heads.items():
        finetune_all(head, finetuning, plan, at_best, folder)
    return runs


def probe_all(probe: Probe, runs: Sequence[Run], folder: Path) -> None:
    """Probe the fused encoder of each finished run. Failures are logged and noted on the run; the others continue."""
    for run in tqdm([run for run in runs if run.record is not None], desc="probe", unit="run"):
        target = folder / "runs" / run.planned.folder / "probe" / PROBE_FILE
        try:
            own = ["--model_name_or_path", str(fused(target.parents[1])), "--output_file", str(target)]
            run.probe = evaluated(PROBE, probe.arguments, own, target)
        except (UserError, OSError) as error:
            run.notes.append(f"its encoder was not probed: {error}")
            tqdm.write(f"{run.planned.name}: {run.notes[-1]}")


def finetune_all(head: str, finetuning: Finetuning, plan: Plan, runs: Sequence[Run], folder: Path) -> None:
    """Fine-tune a head on the fused encoder of each run, and on random weights if the plan says so.

    Failures are logged and noted on the run, and the others continue.
    """
    finished = [run for run in runs if run.record is not None]
    jobs = [(run, folder / "runs" / run.planned.folder, False) for run in finished]
    if finetuning.random:
        baseline = next(iter(plan.against))
        randoms = [run for run in finished if run.planned.variant == baseline and run.planned.length is None]
        jobs += [(run, folder / "runs" / "random" / f"seed{run.planned.seed}", True) for run in randoms]
    for run, target, is_random in tqdm(jobs, desc=head, unit="run"):
        try:
            vit = fused(folder / "runs" / run.planned.folder)
            own = ["--model_name_or_path", str(vit), "--seed", str(run.planned.seed), "--from_scratch", str(is_random)]
            evaluation = finetune(head, finetuning.arguments, own, target)
        except (UserError, OSError) as error:
            what = "random weights were" if is_random else "its encoder was"
            run.notes.append(f"{what} not evaluated on {head}: {error}")
            tqdm.write(f"{run.planned.name}: {run.notes[-1]}")
        else:
            run.heads |= {} if is_random else {head: evaluation}


def fused(run: Path) -> Path:
    """The folder of a compared run's stock ViT, created if necessary. UserError or OSError if that fails."""
    vit = run / "vit"
    if not (vit / "config.json").is_file():
        fuse_run(run, vit, check_views(run))
    return vit


def finetune(head: str, arguments: Sequence[str], own: Sequence[str], folder: Path) -> dict[str, Any]:
    """The evaluation in ``folder/HEAD``, created if necessary; arguments and errors as for `evaluated`."""
    evaluation = folder / head / EVALUATION
    return evaluated(
        FINETUNE.replace("MODULE", HEADS[head].module),
        arguments,
        [*own, "--output_dir", str(evaluation.parent)],
        evaluation,
    )


def evaluated(code: str, arguments: Sequence[str], own: Sequence[str], file: Path) -> dict[str, Any]:
    """The evaluation in ``file``, created by a separate process if necessary.

    Args:
        code: code that the process runs.
        arguments: the plan's flags.
        own: arguments added for this run.
        file: file that the process writes.

    Raises:
        UserError: the process wrote none; the message quotes its log.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file.parent / FLAGS_FILE, without_secrets(arguments))
        log = file.parents[1] / f"{file.parent.name}.log"
        with log.open("ab") as lines:
            command = [sys.executable, "-c", code, *arguments, *own]
            status = subprocess.run(command, stdout=lines, stderr=subprocess.STDOUT, check=False).returncode
        if not file.is_file():
            raise UserError(failure(status, log))
    return json.loads(file.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def random_evaluations(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Evaluations of each head from random weights, by seed, if the comparison has them."""
    found = {head: sorted((folder / "runs" / "random").glob(f"seed*/{head}/{EVALUATION}")) for head in HEADS}
    return {
        head: [json.loads(file.read_text(encoding="utf-8")) for file in files] for head, files in found.items() if files
    }


def read_step_times(file: Path | None, plan: Plan) -> dict[str, list[float]] | None:
    """Variant -> seconds of its step, one per turn; None without a file.

    Raises:
        UserError: the file is invalid or lacks a variant of the plan.
    """
    if file is None:
        return None
    try:
        found: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        turns = {len(found[variant]) for variant in plan.variants}
        if len(turns) > 1 or 0 in turns:
            raise ValueError(f"turns of each variant: {sorted(turns)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--step_times {file} does not hold step times of every variant, as many of each ({error}): make it with "
            f"benchmarks/plan_times.py from the same plan"
        ) from error
    return found


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Plan, run and report a comparison. Further flags are those of run_dbp_mae.py, for all runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--plan", help=f"YAML file, or one of {', '.join(plan_names())}")
    parser.add_argument("--runs", nargs="+", help="report these finished runs (output folders) instead of a plan")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for runs and report")
    parser.add_argument("--report_dir", type=Path, help="folder for the report (default: OUTPUT_DIR/report)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--launcher", help="command instead of python, e.g. 'accelerate launch --multi_gpu'")
    parser.add_argument("--step_times", type=Path, help="JSON file of benchmarks/plan_times.py, for the yardstick")
    parser.add_argument("--note", default="", help="a sentence for the report, e.g. on what else was running")
    args, extra = parser.parse_known_args(arguments)
    if (args.plan is None) == (args.runs is None):
        raise UserError("give --plan PLAN or --runs FOLDER ... (not both)")
    if args.runs is not None and extra:
        raise UserError(f"unknown flag {extra[0]}; finished runs take no flags")
    if args.jobs < 1:
        raise UserError(f"--jobs is a positive number, got {args.jobs}")
    return args, extra


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and write its report. A user's mistake ends with one line on stderr and exit status 2."""
    args, extra = parse(arguments)
    if args.plan is None:
        runs = collect_runs(args.runs)
        plan = plan_of(runs)
    else:
        plan = read_plan(args.plan, extra)
        with handling(leave):
            runs = run_plan(plan, args.output_dir, jobs=args.jobs, launcher=args.launcher)
    if not any(run.record for run in runs):
        raise UserError(f"no run has finished; the first says: {runs[0].error}")
    own = without_secrets(sys.argv[1:] if arguments is None else arguments)
    here = f"{Path.cwd()}{os.sep}"  # reports are shared, so they name no folder above the working directory
    program = sys.argv[0] if sys.argv[0] == "hf-dbp compare" else "python training_scripts/run_comparison.py"
    command = shlex.join([*program.split(), *(one.replace(here, "") for one in own)])
    report = write_report(
        args.report_dir or args.output_dir / "report",
        plan,
        runs,
        command=command,
        note=args.note,
        jobs=args.jobs,
        random=random_evaluations(args.output_dir),
        step_times=read_step_times(args.step_times, plan),
    )
    print(f"report: {report}")
