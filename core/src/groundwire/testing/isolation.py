"""Contexts that keep one test run from another, from the machine it runs on, and from Lightning's chatter."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from groundwire.undo.random_states import preserve_rng, seed_globals

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
# Advice about speed and taste on tiny data; a plugin's own warnings are shown.
_EXPECTED = (
    ".*does not have many workers.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*GPU available but not used.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*It is recommended to use .* when logging on epoch level in distributed setting.*",
    ".*multi-threaded, use of fork\\(\\) may lead to deadlocks.*",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's announcements and the advice that tiny test data always provokes."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message)
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The global random states and Lightning's seed are those of ``seed``; everything is put back on exit.

    Example:
        >>> import torch
        >>> with seeded(): a = torch.rand(1)
        >>> with seeded(): b = torch.rand(1)
        >>> bool(a == b)
        True
    """
    with preserve_rng(), patch.dict(os.environ, PL_GLOBAL_SEED=str(seed)):
        seed_globals(seed)
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes in one thread: faster for tiny models, and a forked process has no thread pool to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Lightning gives each process of a distributed run as many threads as it sees fit, unless this says how many.
        with patch.dict(os.environ, OMP_NUM_THREADS="1"):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def without_discovery() -> Iterator[None]:
    """No plugin is installed, whatever the machine has."""
    with (
        patch("groundwire.discovery.distributions", lambda: iter(())),
    ):
        yield


@contextmanager
def isolated() -> Iterator[None]:
    """:func:`quiet`, :func:`one_thread` and :func:`without_discovery`."""
    with quiet(), one_thread(), without_discovery():
        yield
