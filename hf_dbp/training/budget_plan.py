"""What `hf-dbp pretrain IMAGES --budget 2h` chooses, and why: a recipe written before training starts.

`budget.yaml` in the output folder holds every choice with its reason. If the file exists, the command uses it, so you
can edit it; ``hf-dbp pretrain --config budget.yaml`` uses it for another run.

The model is chosen from a ladder of increasing cost, from a mini ViT on views of 64 pixels to ViT-Base on 224. Three
steps of the first are timed on this machine; the cost of the others is proportional to their multiplications. The
highest rung for which the budget allows `VIEWS` views and `PASSES` passes over the images is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_dbp.configuration_dbp_vit_mae import SIZES, DBPViTMAEConfig
from hf_dbp.data.decoding import UnreadableImageError
from hf_dbp.data.images import BUILT_IN, ImageList
from hf_dbp.errors import UserError
from hf_dbp.modeling_dbp_vit_mae import DBPViTMAEForPreTraining
from hf_dbp.recipes import flag_names, parse_arguments, read_yaml
from hf_dbp.training.duration import parse_duration

__all__ = [
    "Choice",
    "Timed",
    "choose",
    "images_first",
    "measured_rate",
    "unattended",
    "with_plan",
    "write_plan",
]

logger = logging.getLogger(__name__)

VIEWS, PASSES = 60_000, 10
SURVEYED = 32  # images, at even steps
BATCH = 32
TRAINED = 0.85  # share of the budget, for the forecast; the rest is start-up, evaluation and ending


#: flags that a budget takes the place of
DECIDED = {"eval_strategy", "eval_steps", "save_strategy", "save_steps", "warmup_steps", "num_train_epochs",
           "load_best_model_at_end"}  # fmt: skip


class Rung(NamedTuple):
    """A named size, with the sides of its square views and patches in pixels."""

    size: str
    view: int
    patch: int


LADDER = (Rung("mini", 64, 8), Rung("mini", 96, 8), Rung("tiny", 128, 8), Rung("small", 224, 16), Rung("base", 224, 16))


@dataclass(frozen=True)
class Choice:
    """A flag, its value and the reason."""

    flag: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Timed:
    """Seconds that a training step takes per image, and a forward pass, on squares of ``side`` pixels."""

    side: int
    step: float
    forward: float

    @classmethod
    def of(cls, side: int, images: int, step: Callable[[], Any], forward: Callable[[], Any]) -> Timed:
        """Time a training step and a forward pass on so many images."""
        trained = seconds_of(step)
        with torch.no_grad():
            return cls(side, trained / images, seconds_of(forward) / images)

    def scaled(self, seconds: float, side: int) -> float:
        """Seconds on squares of another side."""
        return seconds * (side / self.side) ** 2


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds that some work takes the second time, on a GPU until it has finished; the first time only warms up."""
    began = 0.0
    for _ in range(2):
        began = time.monotonic()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.monotonic() - began


def unattended() -> list[Choice]:
    """What every budget of fine-tuning chooses."""
    return [
        Choice("dataloader_num_workers", 1 if (os.cpu_count() or 1) > 1 else 0, f"{os.cpu_count()} cores"),
        Choice("save_total_limit", 1, "a resume needs only the last checkpoint, which the run ends with"),
        Choice("logging_steps", 20, "an occasional line"),
        Choice("disable_tqdm", True, "the number of steps is not known in advance"),
        Choice("report_to", "none", "eval.json records everything"),
    ]


def images_first(arguments: Sequence[str], second: str | None = None) -> list[str]:
    """Turn ``IMAGES --flag ...`` into ``--train_dir IMAGES --flag ...``; wire_bonding and Hub ids are data sets.

    Args:
        arguments: the command line's arguments.
        second: flag for a second positional argument after the images, such as ``--train_mask_dir``.
    """
    given = list(arguments)
    if not given or given[0].startswith("-"):
        return given
    first = given.pop(0)
    if Path(first).suffix.lower() in (".json", ".xml") and Path(first).is_file():
        raise UserError(f"{first} is a file of labels; the folder of images comes first, then the labels")
    named = first == BUILT_IN or (not Path(first).exists() and first.count("/") == 1 and first[0] not in "./~")
    if second is not None and given and not given[0].startswith("-"):
        given = [second, *given]
    return ["--dataset_name" if named else "--train_dir", first, *given]


def cost(rung: Rung, mask_ratio: float) -> float:
    """A number proportional to the multiplications of one view: tokens times weights; the encoder sees only visible
    ones."""
    size, tokens = SIZES[rung.size], (rung.view // rung.patch) ** 2
    encoder = 12 * size["num_hidden_layers"] * size["hidden_size"] ** 2
    decoder = 12 * size["decoder_num_hidden_layers"] * size["decoder_hidden_size"] ** 2
    return tokens * ((1 - mask_ratio) * encoder + decoder)


def measured_rate(channels: int, mask_ratio: float) -> float:
    """Training speed of the lowest rung on this machine, in views per second: the median of three steps."""
    rung = LADDER[0]
    config = DBPViTMAEConfig(
        **SIZES[rung.size], image_size=rung.view, patch_size=rung.patch, num_channels=channels, mask_ratio=mask_ratio
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = DBPViTMAEForPreTraining(config).to(device)
    pixels = torch.rand(BATCH, channels, rung.view, rung.view, device=device)
    seconds = []
    for _ in range(4):
        began = time.monotonic()
        model(pixels).loss.backward()
        seconds.append(time.monotonic() - began)
    return BATCH / float(np.median(seconds[1:]))


def survey(images: ImageList) -> tuple[int, int, str]:
    """What --budget looks at: median short side in pixels, channels and type of readable images, at even steps."""
    kinds = []
    for index in np.linspace(0, len(images) - 1, min(SURVEYED, len(images))).astype(int):
        try:
            image = images[int(index)]
        except UnreadableImageError:
            continue
        kinds.append((min(image.shape[:2]), image.shape[2], image.dtype.name))
    if not kinds:
        raise UserError(f"none of {min(SURVEYED, len(images))} sampled images can be read; run hf-dbp inspect")
    return int(np.median([kind[0] for kind in kinds])), kinds[0][1], kinds[0][2]


def choose(images: ImageList, seconds: float, rate: float | None = None) -> list[Choice]:
    """Every flag that the budget decides, with its reason.

    Args:
        images: the training images.
        seconds: the budget in seconds.
        rate: views per second of the lowest rung; measured if None.
    """
    short, channels, dtype = survey(images)
    photographs = channels == 3 and dtype == "uint8"
    mask_ratio = 0.75 if photographs else 0.4
    rate = measured_rate(channels, mask_ratio) if rate is None else rate
    wanted, rungs = (
        max(VIEWS, PASSES * len(images)),
        [rung for rung in LADDER if rung.view <= max(short, LADDER[0].view)],
    )
    views = {rung: TRAINED * seconds * rate * cost(LADDER[0], mask_ratio) / cost(rung, mask_ratio) for rung in rungs}
    rung = max([r for r in rungs if views[r] >= wanted] or rungs[:1], key=rungs.index)
    batch = max(1, min(BATCH, len(images)))
    width = SIZES[rung.size]["hidden_size"]
    native = not photographs and short >= 2 * rung.view
    enough = "the largest that gets enough views" if views[rung] >= wanted else "the smallest; it gets too few views"
    forecast = (
        f"{enough}: about {views[rung]:.0f} fit, {wanted} are wanted; the smallest processes {rate:.0f} a second on "
        f"this machine; images of {short} pixels suit {len(rungs)} of {len(LADDER)} sizes"
    )
    return [
        Choice("num_channels", channels, f"found: {channels} channels of {dtype}, median short side {short} pixels"),
        Choice("model_size", rung.size, forecast),
        Choice("image_size", rung.view, "the views of that model"),
        Choice("patch_size", rung.patch, "the patches of that model"),
        Choice(
            "native_tiles", native, "tiles at native resolution keep fine detail" if native else "whole scenes count"
        ),
        Choice(
            "mask_ratio", mask_ratio, "He et al. 2022" if photographs else "the paper's value for inspection images"
        ),
        *fixed(width, batch),
    ]


def fixed(width: int, batch: int) -> list[Choice]:
    """The choices of --budget that depend only on the width of the model and the batch."""
    workers = 1 if (os.cpu_count() or 1) > 1 else 0
    rate = float(f"{4e-3 * (128 / width) ** 0.5:.3g}")
    clock = "the budget's warm-up and cosine follow the clock instead"
    return [
        Choice("method", "dbp", "decorrelated backpropagation"),
        Choice(
            "decorrelated_layers",
            "encoder",
            "the whole model lowers the loss more, but its encoder is not always better: docs/budget.md",
        ),
        Choice(
            "update_interval", 5, "learns as well as every step, at a fifth of the cost: docs/results/fast_settings"
        ),
        Choice(
            "eta", 2e-3, "of the values tried, one that serves narrow and deep models alike: docs/results/yardstick"
        ),
        Choice("kappa", 0.1, "without it a deep model loses the gain in loss: docs/budget.md"),
        Choice("optimizer", "muon", "saves about half of AdamW's time: docs/results/methods"),
        Choice(
            "learning_rate",
            rate,
            f"4e-3 x sqrt(128 / width {width}): the demo's at 128; the square root is a rule of thumb",
        ),
        Choice("weight_decay", 0.05, "He et al. 2022"),
        Choice("lr_scheduler_type", "constant", clock),
        Choice("warmup_steps", 0, clock),
        Choice("max_steps", 10**9, "the budget ends the run, not a number of steps"),
        Choice("per_device_train_batch_size", batch, "in a short time, many steps are worth more than large ones"),
        Choice("per_device_eval_batch_size", 64, "memory"),
        Choice("max_eval_samples", 256, "evaluations stay short"),
        Choice("eval_strategy", "no", "the budget decides: early, at 30 and 60 %, and at the end"),
        Choice("save_strategy", "no", "the budget decides: ten times"),
        Choice("save_total_limit", 1, "a resume needs only the last checkpoint"),
        Choice("logging_steps", 50, "an occasional line"),
        Choice("disable_tqdm", True, "the number of steps is not known in advance"),
        Choice("dataloader_num_workers", workers, f"{os.cpu_count()} cores"),
        Choice("dataloader_persistent_workers", workers > 0, "keeps workers between epochs"),
        Choice("do_train", True, "the command"),
        Choice("do_eval", True, "the loss on held-out images is the figure to compare"),
        Choice("report_to", "none", "run.json records everything"),
    ]


def with_plan(
    given: Sequence[str],
    groups: Sequence[type],
    choose: Callable[[Sequence[Any], float, Collection[str]], list[Choice]],
) -> list[str]:
    """The command line with the plan of its --budget, `budget.yaml` in the output folder, as its --config.

    Without --budget, or with a --config of the user's, the command line is returned unchanged.

    Args:
        given: the arguments of the command line.
        groups: the classes of its flags; the last has ``output_dir`` and ``budget``.
        choose: makes the choices from the parsed arguments, the seconds, and the names of the flags that were given.

    Raises:
        UserError: as from ``choose``, or the folder holds the plan of another run.
    """
    flags = flag_names(given)
    if "budget" not in flags:
        return list(given)
    if unused := sorted(flags & DECIDED):
        logger.warning("the budget decides when to evaluate, save and end; not used: --%s", ", --".join(unused))
    if "config" in flags:
        return list(given)
    parsed = parse_arguments(groups, given)
    *inputs, args = parsed
    path = Path(args.output_dir) / "budget.yaml"
    values = {name: value for group in inputs for name, value in dataclasses.asdict(group).items() if name != "token"}
    choices = [] if path.is_file() else choose(parsed, parse_duration(args.budget), flags)
    write_plan(path, args.budget, {name: value for name, value in values.items() if name in flags}, choices, flags)
    print(f"the plan: {path}")
    return ["--config", str(path), *given]


def write_plan(
    path: Path, budget: str, data: dict[str, Any], choices: Sequence[Choice], given: Collection[str]
) -> None:
    """Write the recipe, unless there is already one for that budget and data, which is then used unchanged.

    Args:
        path: `budget.yaml`.
        budget: the budget as the user wrote it.
        data: the flags that name the images.
        choices: from `choose`.
        given: flags that the user gave; they override the plan, so they are left out of it.

    Raises:
        UserError: there is a plan for another budget or other images.
    """
    head = {"budget": budget, **{name: value for name, value in data.items() if value not in (None, [], "")}}
    if path.is_file():
        known = read_yaml(path)
        same = parse_duration(str(known.get("budget"))) == parse_duration(budget)
        if not same or any(
            str(known.get(name)) != str(head[name]) for name in ("train_dir", "dataset_name") if name in head
        ):
            raise UserError(
                f"{path} is the plan of another run (budget {known.get('budget')}, images "
                f"{known.get('train_dir') or known.get('dataset_name')}): repeat its command, or give another folder"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["# What the budget chose, and why. Edit it and repeat the command, or use it elsewhere with --config."]
    lines += [f"{name}: {json.dumps(value, allow_nan=False)}" for name, value in head.items()]
    for choice in choices:
        if choice.flag not in given:
            lines.append(f"{choice.flag}: {json.dumps(choice.value, allow_nan=False)}  # {choice.reason}")
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with contextlib.suppress(FileExistsError):  # another process of this run was faster: all use its plan
        os.link(part, path)
    part.unlink()
