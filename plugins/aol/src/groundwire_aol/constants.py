"""Lipschitz constants (L2) of what is not linear: closed forms, and largest slopes rounded up."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from groundwire_aol.activations import GroupSort, MaxMin, NActivation
from groundwire_aol.centering import BatchCentering, GlobalAvgPool

#: Elementwise functions with a fixed constant. The values above 1 are the largest slopes, rounded up.
MODULES: dict[type[nn.Module], float] = {
    nn.Identity: 1.0, nn.ReLU: 1.0, nn.ReLU6: 1.0, nn.Tanh: 1.0, nn.Softsign: 1.0, nn.LogSigmoid: 1.0,
    nn.Tanhshrink: 1.0, nn.Softshrink: 1.0, nn.Dropout: 1.0, nn.Dropout1d: 1.0, nn.Dropout2d: 1.0, nn.Dropout3d: 1.0,
    nn.AlphaDropout: 1.0, nn.FeatureAlphaDropout: 1.0,
    nn.Sigmoid: 0.25, nn.Hardsigmoid: 1 / 6 + 1e-9, nn.SiLU: 1.09985, nn.Mish: 1.08851, nn.Hardswish: 1.5, nn.SELU:
    1.75810,
    nn.GELU: 1.12905,
    MaxMin: 1.0, GroupSort: 1.0, NActivation: 1.0, BatchCentering: 1.0, GlobalAvgPool: 1.0,
}  # fmt: skip

#: The same for functions and methods, by name.
FUNCTIONS: dict[str, float] = {
    "relu": 1.0, "relu_": 1.0, "relu6": 1.0, "tanh": 1.0, "tanh_": 1.0, "softsign": 1.0, "logsigmoid": 1.0, "abs": 1.0,
    "absolute": 1.0, "neg": 1.0, "negative": 1.0, "clamp": 1.0, "clip": 1.0, "clamp_min": 1.0, "clamp_max": 1.0,
    "hardtanh": 1.0, "tanhshrink": 1.0, "softshrink": 1.0, "sin": 1.0, "cos": 1.0, "sigmoid": 0.25,
    "hardsigmoid": 1 / 6 + 1e-9, "silu": 1.09985, "mish": 1.08851, "hardswish": 1.5, "selu": 1.75810, "gelu": 1.12905,
    "detach": 1.0, "clone": 1.0, "contiguous": 1.0, "float": 1.0, "double": 1.0, "alpha_dropout": 1.0,
}  # fmt: skip


def of_activation(layer: nn.Module) -> float | None:
    """The constant of an elementwise layer whose arguments matter, None for other layers.

    Example:
        >>> of_activation(nn.LeakyReLU(-2.0))
        2.0
    """
    if type(layer) is nn.LeakyReLU:
        return max(1.0, abs(layer.negative_slope))
    if type(layer) is nn.RReLU:
        # In evaluation the slope is the mean of the two.
        return max(1.0, abs(layer.lower), abs(layer.upper))
    if type(layer) is nn.PReLU:
        return max(1.0, float(layer.weight.detach().abs().max()))
    if type(layer) is nn.ELU:
        return max(1.0, abs(layer.alpha))
    if type(layer) is nn.CELU:
        # exp(x / alpha) below 0 has slopes up to 1 for positive alpha; other alphas are no activation.
        return 1.0 if layer.alpha > 0 else None
    if type(layer) is nn.Softplus:
        return 1.0 if layer.beta > 0 and layer.threshold >= 0 and _continuous(layer) else None
    if type(layer) is nn.Hardtanh:
        return 1.0
    return None


def _continuous(layer: Any) -> bool:
    """Beyond its threshold Softplus becomes the identity; a low threshold makes that a jump."""
    return bool(layer.threshold >= 20)


def of_max_pool(kernel: Any, stride: Any, dilation: Any, axes: int) -> float:
    """A pixel that lies in n windows counts n times: the root of the largest n, ``prod ceil(k / (s / gcd(s, d)))``.

    Example:
        >>> of_max_pool(3, 2, 1, 2)
        2.0
    """
    kernel, stride, dilation = (per_axis(v, axes) for v in (kernel, stride or kernel, dilation))
    windows = [math.ceil(k / (s // math.gcd(s, d))) for k, s, d in zip(kernel, stride, dilation, strict=True)]
    return math.sqrt(math.prod(windows))


def per_axis(value: Any, axes: int) -> tuple[int, ...]:
    """A number for each axis, however it was given."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def name_of(target: Any) -> str:
    """How a traced function or method is called in the tables.

    Example:
        >>> name_of(nn.functional.relu), name_of(operator.add), name_of("view")
        ('relu', 'add', 'view')
    """
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def is_known_function(target: Any) -> bool:
    """Whether a function is torch's or Python's own: others may only share a name with one."""
    if isinstance(target, str):
        return True
    if target in (getattr, math.sqrt):
        return True
    places: tuple[Any, ...] = (torch, nn.functional, operator, torch.Tensor)
    return any(getattr(place, name_of(target), None) is target for place in places) or target in _BUILTINS


_BUILTINS: set[Callable[..., Any]] = {
    torch.nn.functional.conv1d,
    torch.nn.functional.conv2d,
    torch.nn.functional.conv3d,
}
