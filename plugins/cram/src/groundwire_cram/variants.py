"""Compressed versions of a model during a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from groundwire import Variant
from groundwire.batch import copy_containers
from groundwire_cram.minimizer import Minimizer
from groundwire_cram.operators import Magnitude, Operator
from groundwire_cram.pruning import compressed
from groundwire_cram.recalibration import Step, batchnorms, training_step, update_statistics
from groundwire_cram.settings import Settings

Statistics = list[dict[str, Tensor]]


class Calibrated:
    """BatchNorm statistics of the versions of one set of weights: each version is recalibrated once for it.

    A version is applied whenever somebody evaluates it. In between nobody changes the weights for good, which their
    version counters tell, once the counts of our own edits are taken off.
    """

    def __init__(self) -> None:
        self._counts: list[tuple[int, int]] = []
        self._known: dict[str, Statistics] = {}

    def of(self, module: nn.Module, name: str) -> Statistics | None:
        """Return the statistics of the version ``name``, if they were collected for these weights."""
        if self._counts != _counts(module):
            self._known.clear()
        return self._known.get(name)

    def keep(self, name: str, statistics: Statistics) -> None:
        """Remember the statistics of a version."""
        self._known[name] = statistics

    def unchanged(self, module: nn.Module) -> None:
        """Note that the weights are the same as when :meth:`of` was asked, whatever their counters say."""
        self._counts = _counts(module)


def _counts(module: nn.Module) -> list[tuple[int, int]]:
    return [(id(p), p._version) for p in module.parameters()]


def host_copy(batch: Any) -> Any:
    """Return ``batch`` in host memory, in containers of its own."""
    return move_data_to_device(copy_containers(batch), torch.device("cpu"))


def variants(
    module: nn.Module,
    minimizer: Minimizer,
    data: Iterable[Any],
    batches: int,
    calibrated: Calibrated,
    loss_fn: Step | None = None,
) -> list[Variant]:
    """Return what CrAM trained for, recalibrated where the module has BatchNorm and ``data`` is not empty.

    Statistics come from the user's own step, which visits what training does: ``loss_fn`` or ``training_step``.
    """
    step = training_step(module, loss_fn)
    operators = [o for o in minimizer.operators if not (isinstance(o, Magnitude) and o.sparsity == 0)]
    blind = bool(batchnorms(module)) and not data
    found = []
    for operator in operators:
        apply = partial(
            _applied, module, operator, minimizer.settings, [] if blind else data, batches, calibrated, step
        )
        found.append(Variant(f"{operator} (not recalibrated)" if blind else str(operator), apply))
    return found


def described(label: str) -> str:
    """Return a variant's name, or "dense", in words.

    Example:
        >>> described("0.5 (not recalibrated)"), described("2:4")
        ('model with 50 % of its weights set to zero (not recalibrated)', 'model compressed to 2:4')
    """
    if label == "dense":
        return "model as trained"
    level, _, note = label.partition(" ")
    try:
        text = f"model with {100 * float(level):g} % of its weights set to zero"
    except ValueError:
        text = f"model compressed to {level}"
    return text + (f" {note}" if note else "")


@contextmanager
def _applied(
    module: nn.Module,
    operator: Operator,
    settings: Settings,
    data: Iterable[Any],
    batches: int,
    calibrated: Calibrated,
    step: Step,
) -> Iterator[None]:
    layers = list(batchnorms(module).values()) if data else []
    saved = _statistics(layers)
    known = calibrated.of(module, str(operator))
    try:
        with compressed(module, operator, settings.skip, settings.compat):
            try:
                if known is not None:
                    _set(layers, known)
                elif layers:
                    update_statistics(module, data, batches, step)
                    calibrated.keep(str(operator), _statistics(layers))
                yield
            finally:
                _set(layers, saved)
    finally:
        calibrated.unchanged(module)


def _statistics(layers: Iterable[nn.Module]) -> Statistics:
    return [{k: v.clone() for k, v in layer._buffers.items() if v is not None} for layer in layers]


def _set(layers: Iterable[nn.Module], statistics: Statistics) -> None:
    for layer, buffers in zip(layers, statistics, strict=True):
        for key, value in buffers.items():
            layer._buffers[key].copy_(value)  # type: ignore[union-attr]
