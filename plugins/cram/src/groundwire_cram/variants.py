"""Pruned versions of a model during a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from groundwire import Variant
from groundwire.window import copy_containers
from groundwire_cram.pruning import pruned
from groundwire_cram.recalibration import batchnorms, recalibrate_batchnorm


def host_copy(batch: Any) -> Any:
    """``batch`` in host memory, in containers of its own."""
    return move_data_to_device(copy_containers(batch), torch.device("cpu"))


def variant(module: nn.Module, sparsity: float, data: Iterable[Any], batches: int) -> Variant:
    """``module`` pruned to ``sparsity``, and recalibrated where it has BatchNorm and ``data`` is not empty."""
    name = f"{sparsity:g}"
    if batchnorms(module) and not data:
        return Variant(f"{name} (not recalibrated)", partial(pruned, module, sparsity))
    return Variant(name, partial(_recalibrated, module, sparsity, data, batches))


def described(label: str) -> str:
    """A variant's name, or "dense", in words.

    Example:
        >>> described("0.9"), described("0.5 (not recalibrated)")
        ('model with 90 % of its weights set to zero', 'model with 50 % of its weights set to zero (not recalibrated)')
    """
    if label == "dense":
        return "model as trained"
    sparsity, _, note = label.partition(" ")
    return f"model with {100 * float(sparsity):g} % of its weights set to zero" + (f" {note}" if note else "")


@contextmanager
def _recalibrated(module: nn.Module, sparsity: float, data: Iterable[Any], batches: int) -> Iterator[None]:
    layers = batchnorms(module)
    saved = [{k: v.clone() for k, v in layer._buffers.items() if v is not None} for layer in layers]
    with pruned(module, sparsity):
        try:
            if layers:
                recalibrate_batchnorm(module, data, batches)
            yield
        finally:
            for layer, buffers in zip(layers, saved, strict=True):
                for key, value in buffers.items():
                    layer._buffers[key].copy_(value)  # type: ignore[union-attr]
