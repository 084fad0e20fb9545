"""The processes of a run: one GPU each, none that trains apart, and an end that they come to together."""

from __future__ import annotations

import gc
import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from hf_dbp.errors import UserError

__all__ = ["check_processes", "end_processes", "ending_processes", "use_one_gpu"]

logger = logging.getLogger(__name__)


def use_one_gpu(args: TrainingArguments) -> None:
    """Let a process that no launcher started train on one GPU, and say how to use all of them.

    The stock Trainer takes all for nn.DataParallel, whose replicas lose what a forward gathers.
    """
    if args.n_gpu > 1:
        logger.warning(
            "1 of %d GPUs is used; for all of them: accelerate launch --multi_gpu --num_processes %d SCRIPT ...",
            args.n_gpu, args.n_gpu,
        )  # fmt: skip
        args._n_gpu = 1


def check_processes(args: TrainingArguments) -> None:
    """Refuse processes of one launcher that would train apart, into one folder: on CPUs accelerate joins them if asked.

    Raises:
        ValueError: the launcher's WORLD_SIZE is not that of the arguments.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and args.world_size < started:
        raise UserError(f"{started} processes, and not a GPU for each: they would train apart; add --use_cpu")


def end_processes() -> None:
    """After the last thing that the processes of a run do together: end their group while Python is whole.

    Gloo's threads may still hold tensors of the last collective, which aborts a process that exits without this
    (pytorch/pytorch#179291). A DDP model that outlives the group can hang: nothing may refer to it any more.
    """
    if dist.is_initialized():
        gc.collect()
        PartialState().destroy_process_group()


@contextmanager
def ending_processes() -> Iterator[None]:
    """`end_processes` after a run that ended well, or was stopped by a signal; one that failed ends as it can."""
    try:
        yield
    except SystemExit as stopped:
        traceback.clear_frames(stopped.__traceback__)
        end_processes()
        raise
    end_processes()
