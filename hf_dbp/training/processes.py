"""The processes of a run: one GPU each, all training together, alone in their folder, and a coordinated end."""

from __future__ import annotations

import gc
import logging
import os
import re
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from hf_dbp.errors import UserError
from hf_dbp.locking import one_writer

__all__ = ["alone", "check_processes", "end_processes", "ending_processes", "use_one_gpu", "use_timeout"]

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0  # in which every process that gave up waiting says so
GAVE_UP = "hf_dbp gave up"  # what it says, under its rank


def use_one_gpu(args: TrainingArguments) -> None:
    """Let a process started without a launcher train on one GPU, and say how to use all of them.

    The stock Trainer would use all with nn.DataParallel, whose replicas lose what a forward pass gathers.
    """
    if args.n_gpu > 1:
        logger.warning(
            "1 of %d GPUs is used; for all of them: accelerate launch --multi_gpu --num_processes %d SCRIPT ...",
            args.n_gpu, args.n_gpu,
        )  # fmt: skip
        args._n_gpu = 1


def check_processes(args: TrainingArguments) -> None:
    """Refuse processes of one launcher that would train separately into one folder; on CPUs, accelerate joins them only
    if asked.

    Raises:
        UserError: the launcher's WORLD_SIZE differs from the arguments'.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and args.world_size < started:
        raise UserError(f"{started} processes but not one GPU for each: they would train separately; add --use_cpu")


def use_timeout(args: TrainingArguments) -> None:
    """Let ``--ddp_timeout`` hold on CPUs too: there transformers, if it joins the processes, leaves 30 minutes.

    To be called before `TrainingArguments.__post_init__`.
    """
    if args.use_cpu:
        PartialState(cpu=True, backend=args.ddp_backend, timeout=timedelta(seconds=args.ddp_timeout))


@contextmanager
def alone(args: TrainingArguments, folder: str | os.PathLike[str]) -> Iterator[None]:
    """`one_writer` for the folder of a run, which is made if need be; to be entered by all processes.

    One of them takes the lock. The others wait for it: otherwise they might resume from an earlier checkpoint than it
    does, if a run that is ending saves another one meanwhile.
    """
    with ExitStack() as stack:
        if args.should_save:
            Path(folder).mkdir(parents=True, exist_ok=True)
            stack.enter_context(one_writer(Path(folder)))
        PartialState().wait_for_everyone()
        yield


def silent_ranks() -> list[int]:
    """The processes that do not say within `GRACE_SECONDS` that they gave up too; empty if nobody can be asked."""
    where, found = os.environ, list[list[int]]()
    attempt = where.get("TORCHELASTIC_RESTART_COUNT", "0")  # all attempts of a launcher have one store

    def ask() -> None:
        try:
            place = where["MASTER_ADDR"], int(where["MASTER_PORT"])
            patience = timedelta(seconds=GRACE_SECONDS)
            store = dist.TCPStore(*place, is_master=False, timeout=patience)  # type: ignore[attr-defined]
            store.set(f"{GAVE_UP} {attempt} {dist.get_rank()}", "")
            end, silent = time.monotonic() + GRACE_SECONDS, [*range(dist.get_world_size())]
            while silent and time.monotonic() < end:
                time.sleep(0.1)
                silent = [rank for rank in silent if not store.check([f"{GAVE_UP} {attempt} {rank}"])]
            found.append(silent)
        except RuntimeError:  # the host that keeps the store is gone
            return

    asking = threading.Thread(target=ask, daemon=True)  # a store behind a cut cable does not answer
    asking.start()
    asking.join(2 * GRACE_SECONDS)
    return found[0] if found else []


def lost_processes(error: RuntimeError) -> str | None:
    """The line about processes that a gloo collective waited for in vain, or lost; None for any other error."""
    if not dist.is_initialized() or "gloo" not in str(error):
        return None
    this = f"rank {dist.get_rank()} of {dist.get_world_size()} processes"
    remedy = "see what its log says, end what is left of the run on every host, and repeat the commands to resume"
    waited = re.search(r"Timed out waiting (\d+)ms", str(error))
    if waited:
        ranks = " and ".join(f"rank {rank}" for rank in silent_ranks()) or "another one"
        seconds = int(waited[1]) / 1000
        return f"{this} waited {seconds:g} s (--ddp_timeout) for {ranks}, which hangs or is cut off: {remedy}"
    lost = re.search(r"(?:Read error|Write error|Connection closed by peer) \[([\da-fA-F.:]+)\]", str(error))
    if lost:
        return f"{this} lost the one at {lost[1]}, which has ended or whose host is gone: {remedy}"
    return None


def end_processes() -> None:
    """End the process group after the last joint action of a run, while Python is still intact.

    Gloo's threads may still hold tensors of the last collective, which aborts a process that exits without this
    (pytorch/pytorch#179291). A DDP model that outlives the group can hang, so nothing may refer to it any more.
    """
    if dist.is_initialized():
        gc.collect()
        PartialState().destroy_process_group()


@contextmanager
def ending_processes() -> Iterator[None]:
    """`end_processes` after a run that ended well, or was stopped by a signal; one that failed ends as it can.

    Raises:
        UserError: another process hangs or is gone.
    """
    try:
        yield
    except SystemExit as stopped:
        traceback.clear_frames(stopped.__traceback__)
        end_processes()
        raise
    except RuntimeError as error:
        line = lost_processes(error)
        if line is None:
            raise
        raise UserError(line) from error
    end_processes()
