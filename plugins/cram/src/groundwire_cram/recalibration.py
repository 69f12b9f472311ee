"""BatchNorm statistics of a model whose weights were changed after training.

A pruned layer gives smaller activations, so the running statistics of training are wrong and accuracy collapses. New
ones are collected as a cumulative average: with the usual momentum of 0.1, twenty batches would leave 12 % of the
reset value in them.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from groundwire import Fields
from groundwire.batch import default_fields, unknown_batch
from groundwire.errors import PluginError
from groundwire.forward import call_forward
from groundwire.modules import overrides
from groundwire.undo.without_trace import without_trace

_Module = TypeVar("_Module", bound=nn.Module)


#: ``step(module, batch)`` runs the module on a batch; what it returns does not matter.
Step = Callable[[Any, Any], Any]


def batchnorms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of ``module`` (1d, 2d, 3d, Sync) that keep running statistics, by name.

    Example:
        >>> list(batchnorms(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))))
        ['0']
    """
    found = {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm)}
    return {name: layer for name, layer in found.items() if layer.running_mean is not None}


def recalibrate_batchnorm(
    module: _Module,
    loader: Iterable[Any],
    batches: int = 20,
    *,
    step: Step | None = None,
    fields: Callable[[Any], Fields | None] | None = None,
) -> _Module:
    """Replace BatchNorm running statistics, in place, by the cumulative average over some batches.

    BatchNorm layers run in training mode, all others in evaluation mode, so the statistics are those of inference.
    A module that defines ``forward`` is called with the batch's inputs (see :func:`groundwire.batch.default_fields`);
    a LightningModule without one runs its ``training_step``, without a Trainer and without logging. Layers that were
    not visited keep their statistics, with a warning. Other buffers, attributes, modes and random states are
    afterwards as before.

    Args:
        module: The module to recalibrate.
        loader: Gives batches; training data.
        batches: How many to use at most.
        step: ``step(module, batch)``, to be called in place of ``forward``, for a model whose training visits more:
            ``lambda autoencoder, batch: autoencoder.decoder(autoencoder.encoder(batch[0]))``.
        fields: ``fields(batch) -> Fields`` (or None for the default), for batches that the default cannot read.

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
    if not batchnorms(module):
        warnings.warn(f"{type(module).__name__} has no BatchNorm statistics to recalibrate", stacklevel=2)
        return module
    how = "forward" if step is None and _defines(module, "forward") else "training_step" if step is None else "step"
    missed = update_statistics(module, loader, batches, step or _own_step(module, fields))
    if missed:
        warnings.warn(
            f"{how} of {type(module).__name__} does not visit {', '.join(missed)}, whose statistics stay as they were "
            "-> step=lambda module, batch: ..., which runs what is used at inference",
            stacklevel=2,
        )
    return module


def update_statistics(module: nn.Module, loader: Iterable[Any], batches: int, step: Step) -> list[str]:
    """Give each BatchNorm layer that ``step`` visits its new statistics; return the names of the others."""
    layers = batchnorms(module)
    visited: set[str] = set()
    hooks = [layer.register_forward_pre_hook(lambda *_, name=name: visited.add(name)) for name, layer in layers.items()]
    try:
        with without_trace(module), torch.no_grad():
            module.eval()
            for layer in layers.values():
                layer.reset_running_stats()
                layer.momentum = None  # torch's way to ask for a cumulative average
                layer.train()
            used = 0
            for batch in itertools.islice(loader, batches):
                device = next(itertools.chain(module.parameters(), module.buffers())).device
                step(module, move_data_to_device(batch, device))
                used += 1
            if not used:
                raise PluginError("the loader for BatchNorm recalibration is empty -> give one with training data")
            found = {name: {k: v.clone() for k, v in layers[name].named_buffers()} for name in visited}
    finally:
        for hook in hooks:
            hook.remove()
    for name, statistics in found.items():
        for key, value in statistics.items():
            layers[name]._buffers[key].copy_(value)  # type: ignore[union-attr]
    return [name for name in layers if name not in visited]


def training_step(module: nn.Module, loss_fn: Step | None = None) -> Step:
    """Return the step of the user's own training: ``loss_fn`` or ``training_step``; ``forward`` if there is neither."""
    if loss_fn is not None:
        return loss_fn
    if _defines(module, "training_step") and getattr(module, "automatic_optimization", True):
        return _training_step()
    return _own_step(module, None)


def _own_step(module: nn.Module, fields: Callable[[Any], Fields | None] | None) -> Step:
    return partial(_forward, fields) if _defines(module, "forward") else _training_step()


def _training_step() -> Step:
    counter = itertools.count()

    def step(module: Any, batch: Any) -> Any:
        several = len(inspect.signature(module.training_step).parameters) > 1
        return module.training_step(batch, next(counter)) if several else module.training_step(batch)

    return step


def _forward(fields: Callable[[Any], Fields | None] | None, module: nn.Module, batch: Any) -> Any:
    found = (fields(batch) if fields is not None else None) or default_fields(batch)
    if found is None:
        raise unknown_batch(batch)
    return call_forward(module, batch, found)


def _defines(module: nn.Module, method: str) -> bool:
    """Return whether ``method`` is the user's: Lightning's own, in either package, only raises or does nothing."""
    inherited = hasattr(type(module), method) and not overrides(module, method)
    return hasattr(module, method) and not (inherited and hasattr(module, "training_step"))
