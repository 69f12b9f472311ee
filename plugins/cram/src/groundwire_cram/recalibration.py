"""BatchNorm statistics of a model whose weights were changed after training.

A pruned layer gives smaller activations, so the running statistics of training are wrong and accuracy collapses. New
ones are collected as a cumulative average: with the usual momentum of 0.1, twenty batches would leave 12 % of the
reset value in them.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from groundwire.batch import default_fields, unknown_batch
from groundwire.errors import PluginError
from groundwire.undo.without_trace import without_trace

_Module = TypeVar("_Module", bound=nn.Module)


def batchnorms(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of ``module`` (1d, 2d, 3d, Sync) that keep running statistics.

    Example:
        >>> len(batchnorms(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))))
        1
    """
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def recalibrate_batchnorm(module: _Module, loader: Iterable[Any], batches: int = 20) -> _Module:
    """Replace BatchNorm running statistics, in place, by the cumulative average over some batches.

    BatchNorm layers run in training mode, all others in evaluation mode, so the statistics are those of inference.
    A module that defines ``forward`` is called with the batch's inputs (see :func:`groundwire.fields.default_fields`);
    a LightningModule without one runs its ``training_step``, without a Trainer and without logging. Other buffers,
    attributes, modes and random states are afterwards as before.

    Args:
        module: The module to recalibrate.
        loader: Gives batches; training data.
        batches: How many to use at most.

    Returns:
        ``module``.

    Raises:
        PluginError: ``loader`` is empty, or a batch cannot be read.
        ValueError: ``batches`` is not positive.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> _ = recalibrate_batchnorm(net, [torch.tensor([[1.0], [3.0]])])
        >>> net[0].running_mean
        tensor([2.])
    """
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches}")
    layers = batchnorms(module)
    if not layers:
        warnings.warn(f"{type(module).__name__} has no BatchNorm statistics to recalibrate", stacklevel=2)
        return module
    statistics = _collect(module, layers, loader, batches)
    for layer, found in zip(layers, statistics, strict=True):
        for name, value in found.items():
            layer._buffers[name].copy_(value)  # type: ignore[union-attr]
    return module


def _collect(module: nn.Module, layers: list[_BatchNorm], loader: Iterable[Any], batches: int) -> list[dict[str, Any]]:
    """Return the new statistics; the module itself is as before when this returns."""
    with without_trace(module), torch.no_grad():
        module.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's way to ask for a cumulative average
            layer.train()
        used = 0
        for used, batch in enumerate(itertools.islice(loader, batches), start=1):
            _forward(module, batch, used - 1)
        if not used:
            raise PluginError("the loader for BatchNorm recalibration is empty -> give one with training data")
        return [
            {name: value.clone() for name, value in layer._buffers.items() if value is not None} for layer in layers
        ]


def _forward(module: nn.Module, batch: Any, batch_idx: int) -> None:
    device = next(itertools.chain(module.parameters(), module.buffers())).device
    batch = move_data_to_device(batch, device)
    if not _defines_forward(module):
        several = len(inspect.signature(module.training_step).parameters) > 1  # type: ignore[arg-type]
        module.training_step(*((batch, batch_idx) if several else (batch,)))  # type: ignore[operator]
        return
    fields = default_fields(batch)
    if fields is None:
        raise unknown_batch(batch)
    module(**fields.inputs) if isinstance(fields.inputs, Mapping) else module(fields.inputs)


def _defines_forward(module: nn.Module) -> bool:
    """Return whether ``forward`` is the user's: Lightning's own, in either package, only raises."""
    home = type(module).forward.__module__ or ""
    return not (hasattr(module, "training_step") and home.split(".")[0] in ("lightning", "pytorch_lightning", "torch"))
