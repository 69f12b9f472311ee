"""Rounding rules: the error that each operation adds by itself, in the standard model of floating-point arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from groundwire_aol.certify.call import Call, floats_in, sizes_per_axis
from groundwire_aol.certify.lipschitz_rules import BatchNormConstants
from groundwire_aol.certify.norms import nonnegative_norm
from groundwire_aol.layers.parametrization import TRANSPOSED

#: Unit roundoff.
UNITS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
#: Elementwise functions that IEEE 754 does not fix are taken to be right to this many u times max(|x|, 1).
APPROXIMATE = 16


@dataclass(frozen=True)
class Affine:
    """``offset + slope ||x||``, x the model's input."""

    offset: float = 0.0
    slope: float = 0.0

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.offset + other.offset, self.slope + other.slope)

    def __mul__(self, factor: float) -> Affine:
        return Affine(self.offset * factor, self.slope * factor)

    def largest(self, other: Affine) -> Affine:
        """Return a bound of both."""
        return Affine(max(self.offset, other.offset), max(self.slope, other.slope))


@dataclass(frozen=True)
class Magnitudes:
    """A call, and bounds of the norms around it.

    Attributes:
        call: The call.
        value: Its result for two rows.
        unit: u of the dtypes in it, the larger one.
        inputs: Norms of the computed inputs, added up.
        reached: What the call makes of them at most, without constants.
        size: Norm of the result of exact arithmetic on the computed inputs.
    """

    call: Call
    value: Any
    unit: float
    inputs: Affine
    reached: Affine
    size: Affine

    @property
    def entries(self) -> int:
        """Number of entries of one sample of the result."""
        tensors = [self.value] if isinstance(self.value, Tensor) else [t for t in self.value if isinstance(t, Tensor)]
        return sum(t[0].numel() for t in tensors)

    def sums(self, terms: int) -> Affine:
        """Return the error of sums of so many nonnegative multiples of entries."""
        return self.reached * gamma(terms + 4, self.unit)

    def norm_of_channels(self, channels: Tensor | None) -> float:
        """Return the norm of one value per channel, at all positions of the result."""
        if channels is None:
            return 0.0
        return float(channels.detach().double().norm()) * math.sqrt(self.entries / channels.numel())


RoundingRule: TypeAlias = Callable[[Magnitudes], Affine | None]


def gamma(terms: int, unit: float) -> float:
    """Return ``n u / (1 - n u)``: what a sum of n products is wrong by at most, relative to the sum of absolute values.

    Example:
        >>> gamma(1, 0.25), gamma(4, 0.25)
        (0.3333333333333333, inf)
    """
    return terms * unit / (1 - terms * unit) if terms * unit < 0.5 else math.inf


def smallest_normal(dtype: torch.dtype) -> float:
    """Return what may be lost below the range of the dtype, also where denormal numbers are flushed to zero."""
    return torch.finfo(dtype).smallest_normal


# Rules


def exact(at: Magnitudes) -> Affine:
    """Nothing: entries are moved and compared."""
    return Affine()


def few(at: Magnitudes) -> Affine:
    """Error of a few operations on each entry, none larger than what comes in or out."""
    return (at.size + at.reached) * (4 * at.unit)


def approximate(at: Magnitudes) -> Affine:
    """Error of one function of each entry that is not fixed by IEEE 754."""
    layer = at.call.layer
    if layer is not None:
        scale = max(abs(getattr(layer, "alpha", 1.0)), 1 / abs(getattr(layer, "beta", 1.0)))
    else:
        scale = abs(float(at.call.argument(1, "alpha", 1.0))) if at.call.name == "elu" else 1.0
    whole = at.reached + at.inputs * 2.0 + Affine(math.sqrt(at.entries) * 2 * max(1.0, scale))
    return whole * (APPROXIMATE * at.unit)


def softplus(at: Magnitudes) -> Affine:
    """Error of Softplus, which torch computes as the identity beyond its threshold."""
    layer = at.call.layer
    jump = math.log1p(math.exp(-layer.threshold)) / layer.beta * (1 + 1e-9)
    return approximate(at) + Affine(jump * math.sqrt(at.entries))


def averaging(at: Magnitudes) -> Affine:
    """Error of sums of at most all entries of a sample."""
    return at.sums(at.call.x[0].numel())


def averaging_windows(axes: int) -> RoundingRule:
    """Return the rule of average pooling over so many axes."""

    def rule(at: Magnitudes) -> Affine:
        layer = at.call.layer
        return averaging(at) if layer is None else at.sums(math.prod(sizes_per_axis(layer.kernel_size, axes)))

    return rule


def global_average(at: Magnitudes) -> Affine:
    """Error of :class:`GlobalAvgPool`."""
    return at.sums(math.prod(at.call.x.shape[-at.call.layer.axes :]))


def interpolation(at: Magnitudes) -> Affine | None:
    """Nothing for the nearest entry; the weights of others have no rule."""
    mode = at.call.layer.mode if at.call.layer is not None else at.call.argument(3, "mode", "nearest")
    return Affine() if mode in ("nearest", "nearest-exact") else None


def convex_sum(at: Magnitudes) -> Affine:
    """Error of :class:`ConvexSum`: the computed share is off by a few u, and so is one minus it."""
    return at.inputs * (APPROXIMATE * at.unit)


def n_activation(at: Magnitudes) -> Affine:
    """Error of :class:`NActivation`: beyond a negative lower or a positive upper knot, x is larger than the knot."""
    layer = at.call.layer
    knots = layer.theta.detach().double() * math.sqrt(layer.lr_factor)
    beyond = float(torch.maximum(knots.amin(1), -knots.amax(1)).clamp_min(0).max())
    return (at.inputs + Affine(beyond * math.sqrt(at.entries))) * (8 * at.unit)


def centering(at: Magnitudes) -> Affine:
    """Error of :class:`BatchCentering`."""
    layer = at.call.layer
    constant = at.norm_of_channels(layer.running_mean) + at.norm_of_channels(layer.bias)
    return (at.inputs + Affine(constant)) * gamma(4, at.unit)


def batchnorm(at: Magnitudes) -> Affine | None:
    """Error of BatchNorm in evaluation."""
    norm = BatchNormConstants.of(at.call)
    if norm is None:
        return None
    constant = at.norm_of_channels(norm.factors * norm.mean) + at.norm_of_channels(norm.bias)
    return (at.inputs * float(norm.factors.max()) + Affine(constant)) * gamma(12, at.unit)


def einsum(at: Magnitudes) -> None:
    """No rule: its sums have any length."""


# Products with weights: ``gamma_n (|| |W| || ||x|| + ||b||)``


def linear_layer(at: Magnitudes) -> Affine:
    """Error of a Linear or (transposed) convolution layer."""
    layer = copy.deepcopy(at.call.layer).double()
    weight = layer.weight
    terms = weight[:, 0].numel() // layer.groups if isinstance(layer, TRANSPOSED) else _nonzero(weight)
    weight.data.abs_()
    bias, layer.bias = layer.bias, None
    return _products(at, layer, terms, bias)


def _nonzero(weight: Tensor) -> int:
    """Return the most terms of a sum: products with zero are exact, and so is adding them."""
    return int((weight.detach() != 0).flatten(1).sum(1).max())


def _products(at: Magnitudes, absolute: Callable[[Tensor], Tensor], terms: int, bias: Tensor | None) -> Affine:
    x = at.call.x
    norm = nonnegative_norm(absolute, tuple(x.shape[1:]))
    lost = smallest_normal(x.dtype) * math.sqrt(at.entries * x[0].numel()) * (terms + 2) * (1 + norm)
    products = at.inputs * norm + Affine(at.norm_of_channels(bias))
    return products * gamma(terms + 2, at.unit) + at.inputs * lost + Affine(lost)


def dense(at: Magnitudes) -> Affine:
    """Error of ``F.linear``."""
    weight, bias = at.call.argument(1, "weight").detach(), at.call.argument(2, "bias")
    return _products(at, lambda x: nn.functional.linear(x, weight.double().abs()), _nonzero(weight), bias)


def product(at: Magnitudes) -> Affine:
    """Error of ``x @ W``."""
    matrix = at.call.args[1].detach()
    return _products(at, lambda x: x @ matrix.double().abs(), matrix.shape[0], None)


def convolution(at: Magnitudes) -> Affine:
    """Error of a functional convolution."""
    call = at.call
    weight, bias = call.argument(1, "weight").detach(), call.argument(2, "bias")
    others = {k: v for k, v in call.kwargs.items() if k not in ("input", "weight", "bias")}

    def absolute(x: Tensor) -> Tensor:
        found: Tensor = call.node.target(x, weight.double().abs(), None, *call.args[3:], **others)  # type: ignore[operator]
        return found

    return _products(at, absolute, weight[0].numel() * weight.shape[0], bias)


def unit_of(value: Any, dtype: torch.dtype) -> float:
    """Return the larger u of the dtypes of a result and of the model."""
    return max([UNITS.get(t.dtype, math.inf) for t in floats_in(value)] + [UNITS[dtype]])
