"""Flags of pre-training: which images, which model, how it sees them, and how it is trained (shared by fine-tuning)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_dbp.callbacks import DecorrelationArguments, refuse_sharding
from hf_dbp.configuration_dbp_vit_mae import SIZES
from hf_dbp.data.arguments import StreamingFlags
from hf_dbp.errors import UserError
from hf_dbp.hub.arguments import HubFlags
from hf_dbp.natures import Nature
from hf_dbp.precision import fast_in_16_bits
from hf_dbp.training.duration import parse_duration
from hf_dbp.training.measurement import check_country
from hf_dbp.training.optimizers import check_optimizer
from hf_dbp.training.processes import check_processes, use_one_gpu, use_timeout

__all__ = ["FINETUNED", "GROUPS", "DataArguments", "ModelArguments", "PretrainingArguments", "RunArguments"]

logger = logging.getLogger(__name__)

COMMON = Nature(common=True)

UNLISTED = ("azure_ml", "flyte")  # loggers of which transformers does not say whether they are there


@dataclass
class DataArguments(StreamingFlags):
    """Which images; flags as in transformers' run_mae.py, and what goes beyond it."""

    subset_seed: int = field(default=0, metadata={"help": "Seed of the choice that --train_fraction makes."})


@dataclass
class ModelArguments(HubFlags):
    """Which model; flags as in transformers' run_mae.py, and what goes beyond it."""

    method: Annotated[str, Nature("method", "refused")] = field(
        default="dbp",
        metadata={
            "help": "dbp: decorrelated backprop. bp: the same model with nothing decorrelated. stock: transformers' "
            "class.",
            "choices": ["dbp", "bp", "stock"],
        },
    )
    optimizer: Annotated[str, Nature("method", "refused", card="optimizer")] = field(
        default="adamw",
        metadata={
            "help": "adamw; or, on hidden matrices with AdamW on the rest: muon, soap, or another optimizer of the "
            "package pytorch-optimizer."
        },
    )
    model_size: Annotated[str, Nature("model")] = field(
        default="base", metadata={"help": "Named size of a new model.", "choices": list(SIZES)}
    )
    model_name_or_path: Annotated[str | None, Nature("model", "refused")] = field(
        default=None,
        metadata={"help": "Checkpoint to start from: any ViT-MAE, as folder or Hub id; default: from scratch."},
    )
    config_name: Annotated[str | None, Nature("model")] = field(
        default=None, metadata={"help": "Configuration of a new model, as folder or Hub id."}
    )
    config_overrides: Annotated[str | None, Nature("model")] = field(
        default=None, metadata={"help": "Settings of a new model, e.g. hidden_size=192,decoder_num_hidden_layers=4."}
    )
    image_size: Annotated[list[int] | None, Nature("model")] = field(
        default=None, metadata={"help": "Input size in pixels, one number or height and width (default: 224)."}
    )
    patch_size: Annotated[int | None, Nature("model")] = field(
        default=None, metadata={"help": "Side of a patch in pixels (default: 16)."}
    )
    mask_ratio: Annotated[float | None, Nature("training", "told", card="share of the patches that is masked")] = field(
        default=None, metadata={"help": "Share of the patches to mask (default: the checkpoint's, else 0.75)."}
    )
    norm_pix_loss: Annotated[bool | None, Nature("training", "told", card="target patches normalised")] = field(
        default=None, metadata={"help": "Normalise each target patch (default: as in the checkpoint, else off)."}
    )
    decorrelated_layers: Annotated[str, Nature("model", "refused", card="decorrelated layers", dbp=True)] = field(
        default="encoder",
        metadata={"help": "Layers that dbp decorrelates.", "choices": ["encoder", "block_inputs", "full", "none"]},
    )
    wide_blocks: Annotated[int, Nature("model", "refused", card="blocks of R, second MLP linear", dbp=True)] = field(
        default=1,
        metadata={
            "help": "Diagonal blocks of R of every second MLP linear, whose input is the widest; 4 take a quarter of "
            "its memory. 1: a full R."
        },
    )
    naive_decorrelation: Annotated[bool, Nature("model")] = field(
        default=False, metadata={"help": "Decorrelate every token instead of the weights; slower, for checks."}
    )
    image_processor_name: Annotated[str | None, Nature("training", "told")] = field(
        default=None, metadata={"help": "Image processor to take mean and std from."}
    )
    image_statistics: Annotated[str, Nature("training", "told")] = field(
        default="auto",
        metadata={
            "help": "Mean and std per channel: imagenet's, measured once on the training images, or auto: those of "
            "--model_name_or_path if it has them for this number of channels, else imagenet's for 8-bit RGB, else "
            "measured.",
            "choices": ["auto", "imagenet", "measured"],
        },
    )
    native_tiles: Annotated[bool, Nature("training", "told")] = field(
        default=False,
        metadata={
            "help": "See random tiles of --image_size pixels at native resolution, for large images with fine detail. "
            "Default: random crops of a fifth to all of an image, resized to --image_size."
        },
    )
    flip: Annotated[float, Nature("training", "told")] = field(
        default=0.5,
        metadata={
            "help": "Probability of flipping a training view left to right; use 0 if left and right differ, as in "
            "spectrograms."
        },
    )
    augment_on_device: Annotated[bool | None, Nature("nothing")] = field(
        default=None,
        metadata={
            "help": "Let workers read crops of 8-bit images as bytes, and flip, resize and normalise them on the "
            "device. Default: on a GPU."
        },
    )
    trust_remote_code: Annotated[bool, Nature("nothing")] = field(
        default=False, metadata={"help": "Refused: code from a model or a data set is never run."}
    )

    def __post_init__(self) -> None:
        if self.trust_remote_code:
            raise UserError("--trust_remote_code: code from a model or a data set is never run; leave the flag out")
        check_optimizer(self.optimizer)
        if self.method == "dbp" and self.decorrelated_layers == "none":
            raise UserError("--method dbp with --decorrelated_layers none is plain backprop: use --method bp")
        if self.method == "dbp" and self.decorrelated_layers == "block_inputs" and self.wide_blocks != 1:
            raise UserError(
                f"--wide_blocks {self.wide_blocks}: --decorrelated_layers block_inputs gives the second MLP linear "
                "no R; give --wide_blocks 1"
            )
        if self.mask_ratio is not None and not 0.0 < self.mask_ratio < 1.0:
            raise UserError(f"--mask_ratio is a share between 0 and 1, got {self.mask_ratio}")
        if not 0.0 <= self.flip <= 1.0:
            raise UserError(f"--flip is a probability in [0, 1], got {self.flip}")
        if self.image_size is not None and len(self.image_size) > 2:
            raise UserError(f"--image_size takes one number or height and width, got {self.image_size}")


def feed_fast(args: TrainingArguments) -> None:
    """Set loader and process options that cost nothing; call it before `TrainingArguments.__post_init__`.

    Pin batches in memory and copy them while the device computes (with a GPU), keep workers between epochs, and do not
    search for parameters without a gradient, because our models have none.
    """
    args.dataloader_pin_memory &= torch.cuda.is_available()
    args.dataloader_persistent_workers &= args.dataloader_num_workers > 0
    if args.dataloader_pin_memory and args.accelerator_config is None:
        args.accelerator_config = {"non_blocking": True}
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


def check_reporters(names: Sequence[str]) -> None:
    """Refuse a logger that is unknown, or whose package is not installed, before any data is read.

    Raises:
        UserError: names the logger, and what to install.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to {name}: choose from {', '.join(INTEGRATION_TO_CALLBACK)}, all or none")
        if name not in (*get_available_reporting_integrations(), *UNLISTED):
            raise UserError(f"--report_to {name} needs a package that is not installed: pip install {name}")


@dataclass
class RunArguments(TrainingArguments):  # type: ignore[misc]
    """TrainingArguments with the defaults that pre-training and fine-tuning share.

    Attributes:
        STOCK: the natures of the fields of TrainingArguments, ours to say but not to declare; those that are not listed
            shape nothing. ``--help`` shows the common ones in this order.
    """

    STOCK: ClassVar[dict[str, Nature]] = {
        "do_train": COMMON,
        "do_eval": COMMON,
        "num_train_epochs": Nature("training", "told", card="epochs", common=True),
        "max_steps": Nature("training", "told", common=True),
        "per_device_train_batch_size": Nature("training", common=True),
        "per_device_eval_batch_size": COMMON,
        "gradient_accumulation_steps": Nature("training", common=True),
        "dataloader_drop_last": Nature("training"),
        "learning_rate": Nature("training", "told", card="peak learning rate", common=True),
        "lr_scheduler_type": Nature("training", "told", card="schedule"),
        "lr_scheduler_kwargs": Nature("training", "told"),
        "warmup_steps": Nature("training", "told", card="warm-up (steps, or a share of them below 1)", common=True),
        "weight_decay": Nature("training", "told", card="weight decay"),
        "optim": Nature("training", "told"),
        "adam_beta1": Nature("training", "told", card="beta1"),
        "adam_beta2": Nature("training", "told", card="beta2"),
        "adam_epsilon": Nature("training", "told"),
        "max_grad_norm": Nature("training", "told"),
        "eval_strategy": COMMON,
        "eval_steps": COMMON,
        "logging_steps": COMMON,
        "save_total_limit": COMMON,
        "dataloader_num_workers": COMMON,
        "seed": Nature("chance", "refused", common=True),
        "data_seed": Nature("chance", "told"),
        "bf16": Nature("training", "told", card="bfloat16 autocast", common=True),
        "fp16": Nature("training", "told", card="float16 autocast", common=True),
        "use_cpu": COMMON,
        "gradient_checkpointing": COMMON,
        "torch_compile": COMMON,
        "resume_from_checkpoint": COMMON,
        "report_to": COMMON,
        "push_to_hub": COMMON,
        "hub_model_id": COMMON,
        "log_level": COMMON,
    }

    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay, except on biases and norms."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last incomplete batch of an epoch."})
    dataloader_persistent_workers: bool = field(default=True, metadata={"help": "Keep loader workers between epochs."})
    save_strategy: str | None = field(
        default=None, metadata={"help": "When to save (default: as --eval_strategy; if that is no, steps)."}
    )
    save_steps: float | None = field(
        default=None,
        metadata={"help": "Steps between checkpoints (default: --eval_steps if the best one is kept, else 500)."},
    )
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint."})
    max_skipped_steps: Annotated[int, Nature("nothing")] = field(
        default=5,
        metadata={
            "help": "Stop after so many steps (updates, for R) in a row with a loss, gradient or R that is not finite."
        },
    )
    budget: Annotated[str | None, Nature("nothing")] = field(
        default=None,
        metadata={
            "help": "Time that the whole command may take, e.g. 2h or 30m, instead of epochs: the schedule follows "
            "the clock. pretrain, finetune and detect choose everything else and write it to budget.yaml."
        },
    )
    country: Annotated[str | None, Nature("nothing")] = field(
        default=None,
        metadata={
            "help": "Country of the power grid for CO2e, as a three-letter ISO code; default: the world average."
        },
    )

    def __post_init__(self) -> None:
        check_country(self.country)
        refuse_sharding(self)
        if self.budget is not None:  # `hf_dbp.training.budget` sets the schedule, evaluates, saves and ends
            parse_duration(self.budget)
            if self.max_steps <= 0:  # type: ignore[has-type]
                self.max_steps = 10**9
            self.warmup_steps = 0
            self.do_train = self.do_eval = self.disable_tqdm = True  # the number of steps is not known
            self.eval_strategy = self.save_strategy = "no"
        self.remove_unused_columns = False
        feed_fast(self)
        if self.eval_strategy == "no":
            self.load_best_model_at_end = False
        if self.save_strategy is None:
            self.save_strategy = "steps" if self.eval_strategy == "no" else self.eval_strategy
        if self.save_steps is None:  # the best checkpoint must have been saved
            needed = self.load_best_model_at_end and self.eval_strategy == self.save_strategy == "steps"
            self.save_steps = (self.eval_steps or self.logging_steps) if needed else 500
        try:
            use_timeout(self)
            super().__post_init__()
        except (ArithmeticError, AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
            # transformers raises these for flags that do not fit together or that need a missing package
            raise UserError(f"these flags do not work: {' '.join(str(error).split())}") from error
        check_reporters(self.report_to)
        if self.auto_find_batch_size and self.world_size > 1:
            raise UserError(
                "--auto_find_batch_size: several processes would find different batch sizes; find one with a single "
                "process, and give --per_device_train_batch_size"
            )
        check_processes(self)
        use_one_gpu(self)
        warn_of_slow_products(self)


def warn_of_slow_products(args: TrainingArguments) -> None:
    """Name the flags that let a CPU compute products of 16 bits in which it is slow."""
    for flag in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"):
        dtype = torch.bfloat16 if flag.startswith("bf16") else torch.float16
        if getattr(args, flag) and not fast_in_16_bits(args.device, dtype):
            logger.warning("--%s can take 20 times as long as float32 on this CPU; give --%s false", flag, flag)


#: the natures in fine-tuning, where ``optim`` alone chooses the optimizer and no check of the order of images refuses
#: another number of images per step
FINETUNED = RunArguments.STOCK | {
    "optim": Nature("training", "refused"),
    "per_device_train_batch_size": Nature("training", "told", common=True),
    "gradient_accumulation_steps": Nature("training", "told", common=True),
}


@dataclass
class PretrainingArguments(RunArguments):
    """TrainingArguments with the defaults that masked autoencoding needs; eval_loss decides the best checkpoint."""

    output_dir: str = field(default="outputs/pretraining", metadata={"help": "Folder for all output."})
    base_learning_rate: Annotated[float | None, Nature("nothing")] = field(
        default=None, metadata={"help": "If set, learning_rate = base_learning_rate * total batch / 256."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta2 (He et al.: 0.95)."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0, as in He et al., for none."})
    push_unfused: Annotated[bool, Nature("nothing")] = field(
        default=False, metadata={"help": "Also push the unfused model, to NAME-unfused."}
    )

    def __post_init__(self) -> None:
        self.metric_for_best_model, self.greater_is_better = "eval_loss", False
        super().__post_init__()
        self.scale_learning_rate()

    def scale_learning_rate(self) -> None:
        """Scale the learning rate with the batch if a base learning rate is given."""
        if self.base_learning_rate is not None:
            total = self.train_batch_size * self.gradient_accumulation_steps * self.world_size
            self.learning_rate = self.base_learning_rate * total / 256


GROUPS = (ModelArguments, DataArguments, DecorrelationArguments, PretrainingArguments)
