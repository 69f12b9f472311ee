"""Norms of Linear and convolution layers: AOL's proved again, the others exact or bounded from above."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundwire_aol.certify.norms import (
    MAX_COLUMNS,
    kernel_norm,
    matrix_norm,
    nonnegative_norm,
    operator_norm,
    rescaled_norm,
)
from groundwire_aol.layers.parametrization import TRANSPOSED, aol_of
from groundwire_aol.layers.rescale import Geometry, Side, chosen_side, squared_scale


@dataclass(frozen=True)
class Rescale:
    """How an AOL layer made its weight: what the proof that it has norm at most 1 needs.

    Attributes:
        layer_geometry: For which the layer was made.
        geometry: That the rule used.
        squared: The diagonal that it divided by the root of, in float64 from the raw weight.
        steps: Of the rule.
        side: That was scaled.
    """

    layer_geometry: Geometry
    geometry: Geometry
    squared: Tensor
    steps: int
    side: Side


def rescales_in(module: nn.Module) -> dict[str, Rescale]:
    """Return, by path, how the AOL layers in ``module`` make their weights."""
    found = {}
    for path, layer in module.named_modules():
        rule = aol_of(layer)
        if rule is None or len(layer.parametrizations["weight"]) > 1:
            continue  # If something else also changes the weight, the layer is bounded as a plain one.
        raw = layer.parametrizations["weight"].original.detach().cpu().double()
        side = "in" if rule.compat else chosen_side(raw, rule.geometry, rule.side)
        steps = 1 if rule.compat else rule.steps
        squared = squared_scale(raw, rule.rescaled_geometry, steps=steps, side=side)
        found[path] = Rescale(rule.geometry, rule.rescaled_geometry, squared, steps, side)
    return found


def layer_norm(layer: Any, x: Tensor, rescale: Rescale | None = None) -> tuple[float, str]:
    """Return a bound of a layer's spectral norm, and how it was proved.

    Args:
        layer: Linear, convolution or transposed convolution, with the weight that is used.
        x: An input; its shape counts.
        rescale: How an AOL layer made its weight.
    """
    weight = layer.weight.detach().double()
    if rescale is not None and rescale.layer_geometry == _geometry(layer) and _bounded_padding(layer):
        norm = rescaled_norm(weight, rescale.squared, rescale.geometry, steps=rescale.steps, side=rescale.side)
        return norm, "AOL, proved again in float64"
    return matrix_norm(weight) if isinstance(layer, nn.Linear) else _convolution_norm(layer, x)


def _geometry(layer: Any) -> Geometry:
    if isinstance(layer, nn.Linear):
        return Geometry()
    circular = layer.padding_mode == "circular"
    return Geometry(tuple(layer.stride), tuple(layer.dilation), layer.groups, isinstance(layer, TRANSPOSED), circular)


def _bounded_padding(layer: Any) -> bool:
    """Tell whether the bound of a rescaled kernel bounds the layer: padding repeats no pixel."""
    if isinstance(layer, nn.Linear) or layer.padding_mode == "zeros" or isinstance(layer.padding, str):
        return isinstance(layer, nn.Linear) or layer.padding_mode in ("zeros", "circular")
    sizes = zip(layer.kernel_size, layer.dilation, layer.padding, strict=True)
    return layer.padding_mode == "circular" and all(2 * p <= d * (k - 1) for k, d, p in sizes)


def _convolution_norm(layer: Any, x: Tensor) -> tuple[float, str]:
    shape = tuple(x.shape[1:])
    if math.prod(shape) <= MAX_COLUMNS:
        return operator_norm(copy.deepcopy(layer).double(), shape), "exact (singular values)"
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
