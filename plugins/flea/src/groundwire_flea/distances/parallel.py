"""Parallel work: here, or by the engine that joblib is configured with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import joblib
import torch
from numpy.typing import NDArray
from rich.progress import track


def run_jobs(jobs: Sequence[Any], n_jobs: int | None, progress: bool) -> Iterable[NDArray[Any]]:
    """Results of ``joblib.delayed`` jobs in order, wherever joblib is configured to run them."""
    if len(jobs) == 1:
        return [function(*args, **kwargs) for function, args, kwargs in jobs]
    results: Iterable[NDArray[Any]] = joblib.Parallel(_workers(n_jobs), return_as=_order(progress))(jobs)
    return track(results, "Comparing sources", total=len(jobs), transient=True) if progress else results


def _workers(n_jobs: int | None) -> int | None:
    """Joblib's ``n_jobs``; an engine that is not joblib's own (Ray) gets all its workers where nobody said how many.

    It would otherwise get one, for which joblib does not use it at all.
    """
    engine, said = joblib.parallel.get_active_backend()
    own = type(engine).__module__.startswith("joblib.")
    return -1 if n_jobs is None and said is None and not own else n_jobs


def _order(progress: bool) -> str:
    """Results one by one where a progress bar wants them and the engine (not Ray) can give them so."""
    engine, _ = joblib.parallel.get_active_backend()
    return "generator" if progress and engine.supports_return_generator else "list"


@contextmanager
def one_thread() -> Iterator[None]:
    """Context manager that gives torch one thread: small matrices are solved several times faster than by two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
