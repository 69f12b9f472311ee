"""The check with two processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from groundwire.hooks.registry import implementations
from groundwire.testing.fitting import differences, package_of, tensors_of
from groundwire.testing.subject import NotApplicableError, Subject, ViolationError, refuse, transformed

#: Seconds that a collective operation may wait for the other rank, and that the whole check may take.
PATIENCE, LIMIT = 20, 90


class _WriteRank(Callback):
    """Each rank writes what it ended with: with forked processes, files are all that comes back."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # Buffers are each rank's own under DDP (BatchNorm statistics of its own batches).
        buffers = {f"weights.{name}" for name, _ in pl_module.named_buffers()}
        found = {k: v for k, v in tensors_of(trainer, pl_module).items() if k not in buffers}
        torch.save(found, self.directory / f"rank{trainer.global_rank}.pt")


def ranks_agree_under_ddp(subject: Subject) -> None:
    """Two processes (``ddp_fork``, gloo) end with bit-equal weights and optimizer state, and in finite time."""
    _require_fork()
    plugin = subject.factory()
    # In the parent, as groundwire asks under fork: it would keep an unchanged model otherwise.
    module = transformed(subject.module(), plugin)
    options = {"start_method": "fork", "process_group_backend": "gloo", "timeout": timedelta(seconds=PATIENCE)}
    strategy = package_of(module).strategies.DDPStrategy(**options)
    with _ended_after(LIMIT), _one_thread():
        callbacks = [plugin, _WriteRank(subject.directory)]
        # Rows are often chosen from the scores of the epochs before.
        epochs = 3 if "gw_train_data" in implementations(plugin) else 1
        subject.fit(callbacks, module, strategy=strategy, devices=2, max_epochs=epochs)
    ranks = [torch.load(subject.directory / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    refuse(differences(*ranks), "rank 0 against rank 1")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Forked children inherit it: GNU OpenMP would wait for ever in them, if this process has used several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_fork() -> None:
    if not hasattr(os, "fork") or not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise NotApplicableError("this platform has no fork, or this torch has no gloo")
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise NotApplicableError("CUDA is in use in this process, which therefore cannot fork")


@contextmanager
def _ended_after(seconds: int) -> Iterator[None]:
    """Processes started inside are ended when they take longer.

    Raises:
        ViolationError: They did.
    """
    others = {process.pid for process in multiprocessing.active_children()}
    late = threading.Event()

    def end() -> None:
        late.set()
        for process in multiprocessing.active_children():
            if process.pid not in others:
                process.kill()

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    except Exception as error:
        if late.is_set():
            raise ViolationError(f"the two processes were not done after {seconds} seconds") from error
        raise
    finally:
        timer.cancel()
