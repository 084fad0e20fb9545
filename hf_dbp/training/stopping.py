"""SIGTERM and SIGINT during training: finish the step, save a checkpoint, and exit with status 128 + signal.

The processes of a run receive the signal at different moments, so they agree on a step: after each step they all-reduce
the largest signal number received, and read the result of the step before, so nothing waits for the device.
transformers' own `enable_jit_checkpoint` handles only SIGTERM, saves in the middle of a step, at a different step in
each process, and then ends the run as if training were complete.

Loader workers ignore both signals while their parent process runs, and end with it. A second signal ends that process
at once. Launchers forward signals that a terminal or scheduler has already sent to the whole group, so signals within a
second count as one.
"""

from __future__ import annotations

import atexit
import multiprocessing.context
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import TrainerCallback

__all__ = ["StopOnSignal", "Stopped", "end_workers", "handling", "leave", "shield_workers"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_SECONDS = 1.0


def shield_workers(loader: DataLoader[Any]) -> None:
    """Make a loader's workers leave the signals to this process, starting before they are forked."""
    loader.worker_init_fn = partial(_start_worker, _ending(), loader.worker_init_fn)
    if sys.platform != "win32" and loader.num_workers and multiprocessing.get_context().get_start_method() == "fork":
        loader.multiprocessing_context = _Workers()


if sys.platform != "win32":

    class _Worker(multiprocessing.context.ForkProcess):
        """Starts with both signals blocked, because torch installs a handler that would end it before
        `_start_worker`."""

        def start(self) -> None:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    class _Workers(multiprocessing.context.ForkContext):
        Process = _Worker


@cache
def _ending() -> Any:
    """A byte shared with the workers: 1 once this process is ending, which sends them SIGTERM and waits for them."""
    ending = multiprocessing.RawValue("b", 0)
    atexit.register(setattr, ending, "value", 1)
    return ending


def _start_worker(ending: Any, then: Callable[[int], None] | None, number: int) -> None:
    def end(number: int, frame: Any) -> None:
        if ending.value:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if then is not None:
        then(number)


def end_workers(loaders: Iterable[DataLoader[Any]]) -> None:
    """End the persistent workers of these loaders, which start new ones if they are read again.

    Left to the garbage collector, each worker of a loader in a reference cycle, as a Trainer's are, is waited for in
    vain for five seconds: the collector closes the queues before the loader can tell its workers to end.
    """
    for loader in loaders:
        base = getattr(loader, "base_dataloader", loader)  # accelerate's loaders read from another
        if isinstance(base._iterator, _MultiProcessingDataLoaderIter):
            base._iterator._shutdown_workers()
            base._iterator = None


@contextmanager
def handling(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle both signals inside the block; works only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def leave(number: int, frame: Any) -> None:
    """Signal handler that raises SystemExit(128 + signal), so `finally` blocks can clean up."""
    raise SystemExit(128 + number)


class Stopped(Exception):
    """A signal stopped training, after its checkpoint was saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint after the step in which a signal arrived, then raises `Stopped`."""

    def __init__(self) -> None:
        self.received, self._received_at = 0, 0.0
        self.agreed = 0
        self._underway: tuple[Tensor, Any] | None = None
        self._leaving = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive signals inside the block."""
        with handling(self._receive):
            yield

    def _receive(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._received_at = number, now
        elif now - self._received_at > SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agreed, self._underway, self._leaving = 0, None, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agreed = self.agreed or self._agree(args)
        if not float(state.epoch).is_integer():  # the end of an epoch belongs before the checkpoint
            self._leave(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave(control)

    def _leave(self, control: Any) -> None:
        if self.agreed:
            self._leaving = control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._leaving:
            raise Stopped(self.agreed)

    def _agree(self, args: Any) -> int:
        """The largest signal number of any process: now with one process, else as of the step before."""
        if args.world_size == 1:
            return self.received
        answer = 0
        if self._underway is not None:
            number, copied = self._underway
            if copied is not None:
                copied.synchronize()
            answer = int(number)
        number, copied = torch.full((), self.received, dtype=torch.int32, device=args.device), None
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number.is_cuda:
            number, copied = number.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._underway = number, copied
        return answer
