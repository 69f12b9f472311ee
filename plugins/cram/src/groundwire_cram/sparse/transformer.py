"""Encoder layers of torch: their fused inference reads weights, and never calls the layers that could be sparse."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from groundwire_cram.sparse.autotune import MARGIN, Measure, summary

#: By class, the attribute that asks for fused inference.
_FLAGS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
#: Attribute that keeps its value while it is off.
_KEPT = "_fused_inference"

Calls = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]


def unfuse(module: nn.Module) -> None:
    """Let encoder layers call their own layers."""
    for part in module.modules():
        flag = _FLAGS.get(type(part))
        if flag is not None and getattr(part, flag, False):
            part.__dict__[_KEPT] = getattr(part, flag)
            setattr(part, flag, 0)


def fuse(module: nn.Module) -> None:
    """Undo :func:`unfuse`."""
    for part in module.modules():
        if _KEPT in part.__dict__:
            setattr(part, _FLAGS[type(part)], part.__dict__.pop(_KEPT))


@contextmanager
def calls(module: nn.Module) -> Iterator[Calls]:
    """Context manager that records the arguments with which each encoder layer is called first, by ``id``."""
    found: Calls = {}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(id(layer), (args, kwargs))

    layers = [layer for layer in module.modules() if type(layer) is nn.TransformerEncoderLayer]
    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def slower(module: nn.Module, new: dict[int, nn.Module], called: Calls, least: float, measure: Measure) -> set[str]:
    """Return the names of layers in ``new`` that are no gain, because the encoder layer around them is faster fused.

    Where sparse layers stay, the encoder layer remains unfused; elsewhere it is fused again.
    """
    dropped: set[str] = set()
    for name, layer in module.named_modules():
        if type(layer) is not nn.TransformerEncoderLayer or _KEPT not in layer.__dict__:
            continue
        inside = {f"{name}.{n}".lstrip("."): m for n, m in layer.named_modules() if id(m) in new}
        if inside and id(layer) in called and not _gains(layer, new, *called[id(layer)], least, measure):
            dropped |= inside.keys()
        if not inside or dropped & inside.keys():
            fuse(layer)
    for part in module.modules():
        if type(part) is nn.TransformerEncoder and not any(_KEPT in layer.__dict__ for layer in part.layers):
            fuse(part)
    return dropped


def _gains(layer: nn.Module, new: dict[int, nn.Module], args: Any, kwargs: Any, least: float, measure: Measure) -> bool:
    """Measure whether an encoder layer with sparse layers is faster than as torch fuses it."""
    fused, sparse = copy.copy(layer), copy.copy(layer)
    fuse(fused)
    sparse.__dict__["_modules"] = {key: new.get(id(child), child) for key, child in layer._modules.items()}
    with torch.no_grad():
        time = summary(measure(lambda: fused(*args, **kwargs), lambda: sparse(*args, **kwargs)))
    return time.certain >= MARGIN * least
