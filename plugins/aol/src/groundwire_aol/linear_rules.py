"""Norms of Linear and convolution layers: AOL's proved again, the others exact or bounded from above."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from groundwire_aol.constraint import TRANSPOSED
from groundwire_aol.functional import Geometry
from groundwire_aol.norms import MAX_COLUMNS, kernel_norm, matrix_norm, nonnegative_norm, operator_norm, rescaled_norm


def of_linear(layer: Any, x: Tensor, known: Any = None) -> tuple[float, str]:
    """Bound of a layer's norm, and how it was proved.

    Args:
        layer: Linear, convolution or transposed convolution, with the weight that is used.
        x: An input; its shape counts.
        known: For an AOL layer its rule, what it divided by, and its steps and side.
    """
    weight = layer.weight.detach().double()
    if known is not None:
        rule, squared, (steps, side) = known
        if rule.geometry == _geometry(layer) and _bounded_padding(layer):
            norm = rescaled_norm(weight, squared, rule.rescaled_geometry, steps=steps, side=side)
            return norm, "AOL, proved again in float64"
    return matrix_norm(weight) if isinstance(layer, nn.Linear) else _convolution(layer, x)


def _geometry(layer: Any) -> Geometry:
    if isinstance(layer, nn.Linear):
        return Geometry()
    mode = layer.padding_mode
    return Geometry(
        tuple(layer.stride), tuple(layer.dilation), layer.groups, isinstance(layer, TRANSPOSED), mode == "circular"
    )


def _bounded_padding(layer: Any) -> bool:
    """Whether the bound of a rescaled kernel bounds the layer: padding repeats no pixel."""
    if isinstance(layer, nn.Linear) or layer.padding_mode == "zeros" or isinstance(layer.padding, str):
        return isinstance(layer, nn.Linear) or layer.padding_mode in ("zeros", "circular")
    sizes = zip(layer.kernel_size, layer.dilation, layer.padding, strict=True)
    return layer.padding_mode == "circular" and all(2 * p <= d * (k - 1) for k, d, p in sizes)


def _convolution(layer: Any, x: Tensor) -> tuple[float, str]:
    shape = tuple(x.shape[1:])
    if math.prod(shape) <= MAX_COLUMNS:
        twin = copy.deepcopy(layer).double()
        return operator_norm(twin, shape), "exact (singular values)"
    weight = layer.weight.detach().double()
    if isinstance(layer, TRANSPOSED) or layer.padding_mode == "zeros":
        return kernel_norm(weight, _geometry(layer)), "upper bound (iterated Gram kernel)"
    geometry = Geometry(tuple(layer.stride), tuple(layer.dilation), layer.groups)

    def padded(value: Tensor) -> Tensor:
        return torch.nn.functional.pad(value, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)

    return (
        kernel_norm(weight, geometry) * nonnegative_norm(padded, shape),
        f"upper bound (iterated Gram kernel, times that of {layer.padding_mode} padding)",
    )
