"""The rounding error that each operation adds by itself, in the standard model of floating-point arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from groundwire_aol import constants
from groundwire_aol.activations import GroupSort, MaxMin, NActivation
from groundwire_aol.centering import BatchCentering, ConvexSum, GlobalAvgPool, Rescaled, ScaledConcat
from groundwire_aol.constraint import TRANSPOSED, computes_linear
from groundwire_aol.norms import nonnegative_norm
from groundwire_aol.operations import BATCHNORMS, MAX_POOLS, NONNEGATIVE
from groundwire_aol.step import Step

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
        """At least both."""
        return Affine(max(self.offset, other.offset), max(self.slope, other.slope))


@dataclass(frozen=True)
class Situation:
    """A step, and bounds of what is around it.

    Attributes:
        step: The step.
        layer: Its layer, None for a function.
        value: What it computed for two rows.
        unit: u of the dtypes in it, the larger one.
        inputs: Bound of the norms of the computed inputs, added up.
        reached: What the step makes of them at most, without constants.
        size: Bound of the norm of the result of exact arithmetic on the computed inputs.
    """

    step: Step
    layer: Any
    value: Any
    unit: float
    inputs: Affine
    reached: Affine
    size: Affine

    @property
    def entries(self) -> int:
        """Of one sample of the result."""
        tensors = [self.value] if isinstance(self.value, Tensor) else [t for t in self.value if isinstance(t, Tensor)]
        return sum(t[0].numel() for t in tensors)

    @property
    def sample(self) -> Tensor:
        """The first argument, a tensor of two rows."""
        found: Tensor = self.step.args[0] if self.step.args else next(iter(self.step.kwargs.values()))
        return found

    @property
    def few(self) -> Affine:
        """A few operations on each entry, none larger than what comes in or out."""
        return (self.size + self.reached) * (4 * self.unit)

    def sums(self, terms: int) -> Affine:
        """Sums of so many nonnegative multiples of entries."""
        return self.reached * gamma(terms + 4, self.unit)

    def approximate(self, scale: float = 1.0) -> Affine:
        """One function of each entry that is not fixed by IEEE 754."""
        whole = self.reached + self.inputs * 2.0 + Affine(math.sqrt(self.entries) * 2 * max(1.0, scale))
        return whole * (APPROXIMATE * self.unit)


def gamma(terms: int, unit: float) -> float:
    """``n u / (1 - n u)``: relative to the sum of absolute values, what a sum of n products is wrong by at most.

    Example:
        >>> gamma(1, 0.25), gamma(4, 0.25)
        (0.3333333333333333, inf)
    """
    return terms * unit / (1 - terms * unit) if terms * unit < 0.5 else math.inf


def smallest_normal(dtype: torch.dtype) -> float:
    """What may be lost below the range of the dtype, also where denormal numbers are flushed to zero."""
    return torch.finfo(dtype).smallest_normal


EXACT_LAYERS = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, MaxMin, GroupSort, *MAX_POOLS, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle, nn.Unfold, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d,
    nn.CircularPad2d, nn.CircularPad3d, nn.UpsamplingNearest2d,
)  # fmt: skip
FEW_LAYERS = (
    nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Softshrink, nn.Softsign, nn.Hardswish, nn.ConstantPad1d,
    nn.ConstantPad2d, nn.ConstantPad3d,
)  # fmt: skip
APPROXIMATE_LAYERS = (
    nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Tanhshrink, nn.Hardsigmoid, nn.SiLU, nn.Mish, nn.SELU, nn.GELU, nn.ELU,
    nn.CELU, nn.Softplus,
)  # fmt: skip
_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)

EXACT_FUNCTIONS = frozenset((
    "cat", "concat", "concatenate", "stack", "maximum", "minimum", "max", "min", "amax", "amin", "sort", "relu",
    "relu_", "relu6", "abs", "absolute", "neg", "negative", "detach", "clone", "contiguous", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "alpha_dropout", "max_pool1d", "max_pool2d", "max_pool3d",
))  # fmt: skip
FEW_FUNCTIONS = frozenset((
    "add", "sub", "rsub", "mul", "multiply", "div", "divide", "truediv", "leaky_relu", "leaky_relu_", "prelu", "clamp",
    "clip", "clamp_min", "clamp_max", "hardtanh", "softshrink", "softsign", "hardswish", "pad", "float", "double", "to",
    "type_as",
))  # fmt: skip
APPROXIMATE_FUNCTIONS = frozenset((
    "tanh", "tanh_", "sigmoid", "logsigmoid", "tanhshrink", "hardsigmoid", "silu", "mish", "selu", "gelu", "elu", "sin",
    "cos",
))  # fmt: skip
SUMMING = frozenset((
    "mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "fold", "cumsum",
))  # fmt: skip
INTERPOLATING = ("interpolate", "upsample")


def local_error(at: Situation) -> Affine | None:
    """Bound of ``||computed - exact||`` of one step on the same inputs; None where there is no rule."""
    return _of_function(at) if at.layer is None else _of_layer(at)


def _of_layer(at: Situation) -> Affine | None:
    layer = at.layer
    kind = type(layer)
    special = _SPECIAL.get(kind)
    if special is not None:
        return special(at)
    if kind in EXACT_LAYERS or (kind is nn.Upsample and layer.mode in ("nearest", "nearest-exact")):
        return Affine()
    if kind in FEW_LAYERS:
        return at.few
    if kind in APPROXIMATE_LAYERS:
        return at.approximate(max(abs(getattr(layer, "alpha", 1.0)), 1 / abs(getattr(layer, "beta", 1.0))))
    if kind in _POOLS:
        return at.sums(math.prod(constants.per_axis(layer.kernel_size, _POOLS[kind])))
    if kind in _ADAPTIVE or kind is nn.Fold:
        return at.sums(at.sample[0].numel())
    if kind in BATCHNORMS:
        return _batchnorm(at)
    return _linear(at) if computes_linear(layer) else None


def _of_function(at: Situation) -> Affine | None:
    name = at.step.operation
    if name in INTERPOLATING:
        return Affine() if at.step.argument(3, "mode", "nearest") in ("nearest", "nearest-exact") else None
    if name in FEW_FUNCTIONS:
        return at.few
    if name in APPROXIMATE_FUNCTIONS:
        return at.approximate(abs(float(at.step.argument(1, "alpha", 1.0))) if name == "elu" else 1.0)
    if name in SUMMING:
        return at.sums(at.sample[0].numel())
    if name in EXACT_FUNCTIONS or name in NONNEGATIVE:
        return Affine()
    rule = _PRODUCTS.get(name)
    return rule(at) if rule is not None else None


# Layers of this package


def _rescaled(at: Situation) -> Affine | None:
    inner = _of_layer(replace(at, layer=at.layer.layer))
    return None if inner is None else inner * max(1.0, abs(at.layer.factor)) + at.few


def _convex(at: Situation) -> Affine:
    # The computed share is off by a few u, and so is one minus it.
    return at.inputs * (APPROXIMATE * at.unit)


def _scaled_concat(at: Situation) -> Affine:
    return at.few


def _global_pool(at: Situation) -> Affine:
    return at.sums(math.prod(at.sample.shape[-at.layer.axes :]))


def _n_activation(at: Situation) -> Affine:
    # Left of a negative knot and right of a positive one x is at least as large as the knot.
    knots = at.layer.theta.detach().double() * math.sqrt(at.layer.lr_factor)
    beyond = float(torch.maximum(knots.amin(1), -knots.amax(1)).clamp_min(0).max())
    return (at.inputs + Affine(beyond * math.sqrt(at.entries))) * (8 * at.unit)


def _centering(at: Situation) -> Affine:
    constant = _expanded(at.layer.running_mean, at) + _expanded(at.layer.bias, at)
    return (at.inputs + Affine(constant)) * gamma(4, at.unit)


_SPECIAL: dict[type[nn.Module], Callable[[Situation], Affine | None]] = {
    Rescaled: _rescaled, ConvexSum: _convex, ScaledConcat: _scaled_concat, GlobalAvgPool: _global_pool,
    NActivation: _n_activation, BatchCentering: _centering,
}  # fmt: skip


def _batchnorm(at: Situation) -> Affine:
    norm = at.layer
    factors = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factors = factors * norm.weight.detach().double().abs()
    constant = _expanded(factors * norm.running_mean.double(), at) + _expanded(norm.bias, at)
    return (at.inputs * float(factors.max()) + Affine(constant)) * gamma(12, at.unit)


def _expanded(channels: Tensor | None, at: Situation) -> float:
    """Norm of one value per channel, at all positions."""
    if channels is None:
        return 0.0
    return float(channels.detach().double().norm()) * math.sqrt(at.entries / channels.numel())


# Products with weights


def _linear(at: Situation) -> Affine:
    layer = copy.deepcopy(at.layer).double()
    weight = layer.weight
    if isinstance(layer, TRANSPOSED):
        terms = weight[:, 0].numel() // layer.groups
    else:
        terms = _nonzero(weight)
    weight.data.abs_()
    bias, layer.bias = layer.bias, None
    return _dot(at, layer, terms, bias)


def _nonzero(weight: Tensor) -> int:
    """Most terms of a sum: products with zero are exact, and so is adding them."""
    return int((weight.detach() != 0).flatten(1).sum(1).max())


def _dot(at: Situation, absolute: Callable[[Tensor], Tensor], terms: int, bias: Tensor | None) -> Affine:
    norm = nonnegative_norm(absolute, tuple(at.sample.shape[1:]))
    lost = smallest_normal(at.sample.dtype) * math.sqrt(at.entries * at.sample[0].numel()) * (terms + 2) * (1 + norm)
    products = at.inputs * norm + Affine(_expanded(bias, at))
    return products * gamma(terms + 2, at.unit) + at.inputs * lost + Affine(lost)


def _dense(at: Situation) -> Affine:
    weight, bias = at.step.argument(1, "weight").detach(), at.step.argument(2, "bias")
    return _dot(at, lambda x: nn.functional.linear(x, weight.double().abs()), _nonzero(weight), bias)


def _product(at: Situation) -> Affine:
    matrix = at.step.args[1].detach()
    return _dot(at, lambda x: x @ matrix.double().abs(), matrix.shape[0], None)


def _kernel(at: Situation) -> Affine:
    step = at.step
    weight, bias = step.argument(1, "weight").detach(), step.argument(2, "bias")
    rest = [a for a in step.args[3:]]
    named = {k: v for k, v in step.kwargs.items() if k not in ("input", "weight", "bias")}

    def absolute(x: Tensor) -> Tensor:
        found: Tensor = step.node.target(x, weight.double().abs(), None, *rest, **named)  # type: ignore[operator]
        return found

    return _dot(at, absolute, weight[0].numel() * weight.shape[0], bias)


_PRODUCTS: dict[str, Callable[[Situation], Affine]] = {
    "linear": _dense, "matmul": _product, "mm": _product,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _kernel),
}  # fmt: skip
