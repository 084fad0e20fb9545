"""`run.json`: everything known about a run, written by the run itself; tables, figures and cards are made from it.

Schema (version 1):

    schema            1
    task              "pretraining" | "segmentation" | "probe"
    method            "stock" | "bp" | "dbp"          pre-training: how the encoder was trained
    optimizer, seed   as given
    arguments         every flag, by name (no tokens)
    versions          python, torch, transformers, ... and hf_dbp
    commit            git commit of the working directory, if it is one
    hardware          processor or GPU name, number of processes
    data              source, counts, image size, channel statistics
    energy            how kWh were measured or estimated, country, carbon_intensity_g_per_kwh
    rows              one per evaluation: step, epoch, eval_loss, train_loss (mean since the last row), train_seconds,
                      kwh, co2e_kg (all three since the start of training), step_seconds (median since the last row),
                      load_average (of the machine, over a minute), and, for the inputs of the encoder's layers on a
                      fixed validation batch, decorrelation_loss, mean_squared_correlation and, per layer,
                      decorrelation {layer: {decorrelation_loss, mean_squared_correlation}}
    best              the row with the lowest eval_loss, whether its weights were kept or not
    results           figures of the whole run by name; "model": {step, eval_loss} of the weights in the folder, no
                      loss if they were not evaluated; "finished": true once the run is complete; "guards": skipped
                      steps (step, cause, layer), layers whose eta was reduced or whose R was left unchanged;
                      "stopped": why the guards ended it; "resumed_with": {step: {argument: [old, new]}} if the run
                      resumed from that step with other settings
    asked_used        {name: {asked, used, why}} for each setting or count that differs from what was asked for: a batch
                      that did not fit, images left out, steps skipped, the step of the model

Times, kWh and CO2e count training alone. A figure that was not measured is absent.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_dbp.errors import UserError

__all__ = [
    "RECORD",
    "RunRecord",
    "arguments_record",
    "finite",
    "hardware",
    "read_arguments",
    "source_commit",
    "versions",
    "without_secrets",
    "write_json",
]

RECORD = "run.json"  # the record of a pre-training run, in its folder
SCHEMA = 1
PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "evaluate",
    "huggingface-hub",
    "safetensors",
    "numpy",
    "codecarbon",
)
REQUIRED = {"task", "method", "optimizer", "seed"}
KINDS = (
    dict.fromkeys(("task", "method", "optimizer", "commit"), str)
    | dict.fromkeys(("arguments", "data", "versions", "hardware", "energy", "results", "asked_used"), dict)
    | {"seed": int, "rows": list}
)


@dataclasses.dataclass
class RunRecord:
    """The content of a `run.json`; fields as in the schema above."""

    task: str
    method: str
    optimizer: str
    seed: int
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    commit: str | None = None
    hardware: dict[str, Any] = dataclasses.field(default_factory=dict)
    energy: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    asked_used: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.versions = self.versions or versions()
        self.commit = self.commit or source_commit()
        self.hardware = self.hardware or hardware()

    @property
    def best(self) -> dict[str, Any] | None:
        """The row with the lowest finite eval_loss."""
        rows = [row for row in self.rows if math.isfinite(row["eval_loss"])]
        return min(rows, key=lambda row: row["eval_loss"]) if rows else None

    def add_row(self, row: dict[str, Any]) -> None:
        """Add an evaluation, replacing an earlier one at the same step (a resumed run repeats its last)."""
        self.rows = [*(old for old in self.rows if old["step"] < row["step"]), row]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON; a reader sees the old file or the new one, never a partial one."""
        content = (
            {"schema": SCHEMA}
            | dataclasses.asdict(self)
            | {"best": self.best and {key: value for key, value in self.best.items() if key != "decorrelation"}}
        )
        write_json(path, {key: value for key, value in content.items() if value is not None})

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RunRecord:
        """Read a record back.

        Raises:
            UserError: the file is not a run record, or has another schema.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise UserError(f"{path} is not a run record of schema {SCHEMA}; another program wrote it")
        missing = sorted(REQUIRED - content.keys())
        if missing:
            raise UserError(f"{path} is not a complete run record: it lacks {', '.join(missing)}")
        for name, kind in KINDS.items():
            if name in content and type(content[name]) is not kind:
                raise UserError(f"{path}: {name} is {content[name]!r:.80}; expected {kind.__name__}")
        content["rows"] = [with_nan(row) for row in content.get("rows", [])]
        for row in content["rows"]:
            if not is_row(row):
                raise UserError(
                    f"{path}: rows hold {row!r:.200}; expected numbers by name, with step and eval_loss in every row"
                )
        return cls(**{name: content[name] for name in KINDS if name in content})


def with_nan(row: Any) -> Any:
    """A row as it was before writing: JSON has null for numbers that are not finite."""
    return {key: math.nan if value is None else value for key, value in row.items()} if isinstance(row, dict) else row


def is_row(row: Any) -> bool:
    """Whether ``row`` is an evaluation: numbers by name, among them step and eval_loss."""
    if not isinstance(row, dict) or not {"step", "eval_loss"} <= row.keys() or type(row["step"]) is not int:
        return False
    numbers = [value for name, value in row.items() if name != "decorrelation"]
    finite = [value for value in numbers if type(value) is int]
    return all(type(value) in (int, float) for value in numbers) and all(abs(value) < 2**63 for value in finite)


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON lacks (NaN, infinities), and with text as keys."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Write JSON, NaN as null, through a temporary file beside it, so that an interruption leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(finite(content), file, indent=indent, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # if the disk is full


def arguments_record(*arguments: Any) -> dict[str, Any]:
    """The fields of argument dataclasses as one JSON-able mapping, without tokens."""
    record: dict[str, Any] = {}
    for group in arguments:
        fields = group.to_dict() if hasattr(group, "to_dict") else dataclasses.asdict(group)
        record |= {key: value for key, value in fields.items() if not is_secret(key)}
    return json.loads(json.dumps(record, default=str))  # type: ignore[no-any-return]


def read_arguments(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, float]]:
    """`arguments`, `resumed_with`, `resumed_without` and `costs` from a JSON file. UserError if it does not hold them.

    A file of 0.1.0 lacks the third.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        with_, without = content["resumed_with"], content.get("resumed_without", {})
        parts = content["arguments"], with_, without, content.get("costs", {})
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold the arguments of a run: {error!r}") from error
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path} does not hold the arguments of a run: expected mappings")
    if not all(isinstance(value, float) for value in parts[3].values()):
        raise UserError(f"{path} does not hold the costs of a run: {parts[3]!r:.80}")
    return parts


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with ``...`` in place of tokens."""
    shown: list[str] = []
    hidden = False
    for part in arguments:
        name, sign, _ = part.partition("=")
        secret = name.startswith("--") and is_secret(name)
        shown.append("..." if hidden else f"{name}=..." if secret and sign else part)
        hidden = secret and not sign
    return shown


def is_secret(name: str) -> bool:
    """Whether a flag of that name holds a token, in either spelling: --hub_token, --hub-token."""
    return re.split("[-_]", name)[-1] == "token"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("hf-dbp", *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # running from a checkout that is not installed
            continue
    return found


def source_commit() -> str | None:
    """Commit of the checkout this package runs from, with ``+`` if it has changes; None outside git."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def hardware() -> dict[str, Any]:
    """Names and numbers of processors and GPUs."""
    found: dict[str, Any] = {"processor": processor_name(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    return found


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
