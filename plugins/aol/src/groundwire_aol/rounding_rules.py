"""The rounding error that each operation adds by itself, in the standard model of floating-point arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from groundwire_aol import constants
from groundwire_aol.activations import GroupSort, MaxMin, NActivation
from groundwire_aol.centering import BatchCentering, ConvexSum, GlobalAvgPool, Rescaled, ScaledConcat
from groundwire_aol.constraint import computes_linear
from groundwire_aol.operations import BATCHNORMS, MAX_POOLS, NONNEGATIVE
from groundwire_aol.rounding_products import PRODUCTS, of_linear
from groundwire_aol.situation import APPROXIMATE, Affine, Situation, expanded_norm, gamma

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
    "add", "sub", "rsub", "mul", "multiply", "div", "divide", "truediv", "iadd", "isub", "imul", "itruediv",
    "leaky_relu", "leaky_relu_", "prelu", "clamp", "clip", "clamp_min", "clamp_max", "hardtanh", "softshrink",
    "softsign", "hardswish", "pad", "float", "double", "to", "type_as",
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


def is_exact(operation: str, layer: Any) -> bool:
    """Whether an operation only moves and compares: what reads its input after it wrote into it, reads nothing new."""
    return type(layer) in EXACT_LAYERS if layer is not None else operation in EXACT_FUNCTIONS


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
    return of_linear(at) if computes_linear(layer) else None


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
    rule = PRODUCTS.get(name)
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
    constant = expanded_norm(at.layer.running_mean, at) + expanded_norm(at.layer.bias, at)
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
    constant = expanded_norm(factors * norm.running_mean.double(), at) + expanded_norm(norm.bias, at)
    return (at.inputs * float(factors.max()) + Affine(constant)) * gamma(12, at.unit)
