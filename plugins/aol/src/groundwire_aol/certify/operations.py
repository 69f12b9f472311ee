"""The table: for each operation its Lipschitz rule, its rounding rule and its shape rule.

To add an operation, add one entry. What has none is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groundwire_aol.certify import lipschitz_rules as lip
from groundwire_aol.certify import rounding_rules as rnd
from groundwire_aol.certify import shape_rules as shape
from groundwire_aol.certify.call import Call, Proof
from groundwire_aol.layers.activations import GroupSort, MaxMin, NActivation
from groundwire_aol.layers.normalization import BatchCentering
from groundwire_aol.layers.parametrization import computes_linear
from groundwire_aol.layers.pooling import GlobalAvgPool, Rescaled
from groundwire_aol.layers.residual import ConvexSum, ScaledConcat


@dataclass(frozen=True)
class Operation:
    """One operation, under all its names.

    Attributes:
        lipschitz: Bound of its result; a number is the largest slope of a function of each entry.
        rounding: The error that it adds by itself.
        shape: Raises where the result has a shape for which ``lipschitz`` is not valid.
        layers: Its classes in torch.nn and in this package.
        functions: Its names in torch, torch.nn.functional, operator and as a method.
        constant: Of a function of each entry that has no arguments that matter, its largest slope.
    """

    lipschitz: lip.LipschitzRule
    rounding: rnd.RoundingRule
    shape: Callable[[Call, Any], None]
    layers: tuple[type[nn.Module], ...] = ()
    functions: tuple[str, ...] = ()
    constant: float | None = None


def _each(
    constant: float | Callable[[Call], float | None],
    rounding: rnd.RoundingRule,
    layers: tuple[type[nn.Module], ...] = (),
    functions: str = "",
) -> Operation:
    """Return a function of each entry."""
    fixed = None if callable(constant) else constant
    return Operation(lip.slope(constant), rounding, shape.same, layers, tuple(functions.split()), fixed)


def _linear(rounding: rnd.RoundingRule, layers: tuple[type[nn.Module], ...] = (), functions: str = "") -> Operation:
    """Return a linear operation without negative entries: it moves, copies, drops or averages."""
    return Operation(lip.nonnegative, rounding, shape.measured, layers, tuple(functions.split()))


def _operation(
    lipschitz: lip.LipschitzRule,
    rounding: rnd.RoundingRule,
    shapes: Callable[[Call, Any], None],
    layers: tuple[type[nn.Module], ...] = (),
    functions: str = "",
) -> Operation:
    return Operation(lipschitz, rounding, shapes, layers, tuple(functions.split()))


# A layer times a constant: the rules of the layer, times the constant.


def _rescaled(call: Call) -> Proof:
    factor = abs(call.layer.factor) * (1 + 1e-6)
    inner = _inner(call).lipschitz(replace(call, layer=call.layer.layer))
    return Proof(inner.lipschitz * factor, f"{inner.how}, times {call.layer.factor:g}")


def _rescaled_rounding(at: rnd.Magnitudes) -> rnd.Affine | None:
    inner = _inner(at.call).rounding(replace(at, call=replace(at.call, layer=at.call.layer.layer)))
    return None if inner is None else inner * max(1.0, abs(at.call.layer.factor)) + rnd.few(at)


def _rescaled_shape(call: Call, value: Any) -> None:
    _inner(call).shape(replace(call, layer=call.layer.layer), value)


def _inner(call: Call) -> Operation:
    found = operation_of_layer(call.layer.layer)
    if found is None:
        raise call.unknown(f"{type(call.layer.layer).__name__} has no known Lipschitz constant")
    return found


_DENSE = Operation(lip.linear_layer, rnd.linear_layer, shape.multiplied)
_CONVOLUTIONS = Operation(lip.linear_layer, rnd.linear_layer, shape.convolved)

#: Largest slopes, rounded up.
SIGMOID, HARDSIGMOID, SILU, MISH, HARDSWISH, SELU, GELU = 0.25, 1 / 6 + 1e-9, 1.09985, 1.08851, 1.5, 1.75810, 1.12905

OPERATIONS: tuple[Operation, ...] = (
    # Functions of each entry
    _each(1.0, rnd.exact, (nn.Identity,), "detach clone contiguous abs absolute neg negative"),
    _each(1.0, rnd.few, (), "float double"),
    _each(1.0, rnd.exact, (nn.ReLU,), "relu relu_"),
    _each(1.0, rnd.exact, (nn.ReLU6,), "relu6"),
    _each(1.0, rnd.approximate, (nn.Tanh,), "tanh tanh_"),
    _each(1.0, rnd.few, (nn.Softsign,), "softsign"),
    _each(1.0, rnd.approximate, (nn.LogSigmoid,), "logsigmoid log_sigmoid"),
    _each(1.0, rnd.approximate, (nn.Tanhshrink,), "tanhshrink"),
    _each(1.0, rnd.few, (nn.Softshrink,), "softshrink"),
    _each(1.0, rnd.approximate, (), "sin cos"),
    _each(1.0, rnd.few, (nn.Hardtanh,), "hardtanh clamp clip clamp_min clamp_max"),
    _each(SIGMOID, rnd.approximate, (nn.Sigmoid,), "sigmoid"),
    _each(HARDSIGMOID, rnd.approximate, (nn.Hardsigmoid,), "hardsigmoid"),
    _each(SILU, rnd.approximate, (nn.SiLU,), "silu"),
    _each(MISH, rnd.approximate, (nn.Mish,), "mish"),
    _each(HARDSWISH, rnd.few, (nn.Hardswish,), "hardswish"),
    _each(SELU, rnd.approximate, (nn.SELU,), "selu"),
    _each(GELU, rnd.approximate, (nn.GELU,), "gelu"),
    _each(lip.leaky_relu, rnd.few, (nn.LeakyReLU,), "leaky_relu leaky_relu_"),
    _each(lip.rrelu, rnd.few, (nn.RReLU,)),
    _each(lip.prelu, rnd.few, (nn.PReLU,), "prelu"),
    _each(lip.elu, rnd.approximate, (nn.ELU,), "elu"),
    _each(lip.celu, rnd.approximate, (nn.CELU,)),
    _each(lip.softplus, rnd.softplus, (nn.Softplus,)),
    _operation(
        lip.inactive, rnd.exact, shape.same,
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        "dropout dropout1d dropout2d dropout3d alpha_dropout",
    ),
    # Functions of groups of channels, and normalization
    _operation(lip.known, rnd.exact, shape.same, (MaxMin, GroupSort)),
    _operation(lip.known, rnd.n_activation, shape.same, (NActivation,)),
    _operation(lip.known, rnd.centering, shape.same, (BatchCentering,)),
    _operation(
        lip.batchnorm, rnd.batchnorm, shape.same,
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), "batch_norm",
    ),
    # Several branches
    _operation(lip.total, rnd.few, shape.broadcast, (), "add sub rsub iadd isub"),
    _operation(lip.scaling, rnd.few, shape.broadcast, (), "mul multiply div divide truediv imul itruediv"),
    _operation(lip.concatenation, rnd.exact, shape.concatenated, (), "cat concat concatenate stack"),
    _operation(lip.convex_sum, rnd.convex_sum, shape.equal, (ConvexSum,)),
    _operation(lip.scaled_concatenation, rnd.few, shape.concatenated, (ScaledConcat,)),
    # Extremes
    _operation(lip.extreme_of_two, rnd.exact, shape.broadcast, (), "maximum minimum"),
    _operation(lip.extreme, rnd.exact, shape.extreme, (), "max min amax amin"),
    _operation(lip.sorting, rnd.exact, shape.fewer, (), "sort topk"),
    _operation(lip.selection, rnd.exact, shape.broadcast_of_all, (), "where"),
    *(
        _operation(lip.max_pool(axes), rnd.exact, shape.pooled, (layer,), f"max_pool{axes}d")
        for axes, layer in ((1, nn.MaxPool1d), (2, nn.MaxPool2d), (3, nn.MaxPool3d))
    ),
    *(
        _operation(lip.adaptive_max_pool(axes), rnd.exact, shape.pooled, (layer,), f"adaptive_max_pool{axes}d")
        for axes, layer in ((1, nn.AdaptiveMaxPool1d), (2, nn.AdaptiveMaxPool2d), (3, nn.AdaptiveMaxPool3d))
    ),
    # Rearrangements and copies
    _linear(
        rnd.exact,
        (
            nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold, nn.ZeroPad1d,
            nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
            nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d,
            nn.CircularPad3d, nn.UpsamplingNearest2d,
        ),
        "view reshape flatten unflatten permute transpose swapaxes movedim moveaxis squeeze unsqueeze expand repeat "
        "repeat_interleave tile select narrow index_select split chunk unbind flip roll pixel_shuffle "
        "pixel_unshuffle channel_shuffle unfold view_as reshape_as expand_as T mT diagonal tensor_split rot90 t "
        "gather take_along_dim",
    ),
    _operation(lip.item, rnd.exact, shape.measured, (), "getitem"),
    _operation(lip.values, rnd.exact, shape.fewer_in_all, (), "values"),
    _linear(rnd.few, (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), "pad to type_as"),
    _linear(rnd.interpolation, (nn.Upsample, nn.UpsamplingBilinear2d), "interpolate upsample"),
    # Averages
    _operation(lip.known, rnd.global_average, shape.fewer, (GlobalAvgPool,)),
    *(
        _linear(rnd.averaging_windows(axes), (layer,), f"avg_pool{axes}d")
        for axes, layer in ((1, nn.AvgPool1d), (2, nn.AvgPool2d), (3, nn.AvgPool3d))
    ),
    _linear(
        rnd.averaging, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Fold),
        "mean sum adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d fold cumsum",
    ),
    # Products with constant weights; layers of them are found by what they compute, see operation_of_layer
    _operation(lip.dense, rnd.dense, shape.multiplied, (), "linear"),
    _operation(lip.product, rnd.product, shape.multiplied, (), "matmul mm"),
    _operation(lip.einsum, rnd.einsum, shape.measured, (), "einsum"),
    _operation(
        lip.convolution, rnd.convolution, shape.convolved, (),
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    # A layer times a constant
    Operation(_rescaled, _rescaled_rounding, _rescaled_shape, (Rescaled,)),
)  # fmt: skip

LAYERS = {layer: operation for operation in OPERATIONS for layer in operation.layers}
FUNCTIONS = {name: operation for operation in OPERATIONS for name in operation.functions}

MAX_POOLS: dict[type[nn.Module], int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

#: Of the input only these facts may be used as numbers.
FACTS = frozenset((
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "dtype", "device", "len", "is_floating_point",
))  # fmt: skip
#: Functions of a tensor of which only the shape and the dtype count.
CONSTANTS_LIKE = frozenset(("zeros_like", "ones_like", "new_zeros", "new_ones"))
#: What may be computed from constants alone, beside the functions in the table: it always gives the same result.
PURE = frozenset((
    "floordiv", "mod", "pow", "sqrt", "rsqrt", "exp", "log", "square", "reciprocal", "softmax", "softplus", "norm",
    "zeros", "ones", "full", "eye", "arange", "linspace", "tensor", "as_tensor", "where", "prod", "sign", "item",
    "zeros_like", "ones_like", "floor", "ceil", "int", "eq", "ne", "lt", "gt", "le", "ge", "and_", "or_", "not_",
    "normalize", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm",
))  # fmt: skip

#: What to use instead of operations that have no rule.
HINTS: dict[str, str] = {
    "LayerNorm": "use groundwire_aol.BatchCentering: dividing by a deviation has slopes up to 1 / sqrt(eps), about 316",
    "GroupNorm": "use groundwire_aol.BatchCentering: dividing by a deviation has slopes up to 1 / sqrt(eps), about 316",
    "InstanceNorm1d": "use groundwire_aol.BatchCentering", "InstanceNorm2d": "use groundwire_aol.BatchCentering",
    "InstanceNorm3d": "use groundwire_aol.BatchCentering", "RMSNorm": "use groundwire_aol.BatchCentering",
    "LocalResponseNorm": "use groundwire_aol.BatchCentering",
    "MultiheadAttention": "dot-product attention is not Lipschitz; use convolutions or dense layers",
    "Softmax": "return the scores before it: certificates are margins of scores",
    "LogSoftmax": "return the scores before it: certificates are margins of scores",
    "softmax": "return the scores before it: certificates are margins of scores",
    "log_softmax": "return the scores before it: certificates are margins of scores",
    "OptimizedModule": "compile the model after the conversion",
    "Embedding": "certify the part behind it, with respect to embeddings",
    "embedding": "certify the part behind it, with respect to embeddings",
    "pow": "powers are not Lipschitz; use an activation",
    "square": "powers are not Lipschitz; use an activation",
    "normalize": "dividing by a norm is not Lipschitz; divide by a constant",
    "scaled_dot_product_attention": "dot-product attention is not Lipschitz",
    "dropout": "pass training=self.training, or use nn.Dropout",
    "LSTM": "recurrent layers multiply activations", "GRU": "recurrent layers multiply activations",
}  # fmt: skip


def hint(name: str) -> str:
    """Return what to use instead of an operation without a rule."""
    return HINTS.get(name, "replace it, or certify the part of the model behind it, from its result on")


def operation_of_layer(layer: nn.Module) -> Operation | None:
    """Return the entry of a layer: by its exact class, or because it computes what a Linear or convolution does."""
    found = LAYERS.get(type(layer))
    if found is None and computes_linear(layer):
        found = _DENSE if isinstance(layer, nn.Linear) else _CONVOLUTIONS
    return found


def is_known_function(target: Any) -> bool:
    """Tell whether a function is torch's or Python's own: others may only share a name with one.

    Example:
        >>> is_known_function(torch.relu), is_known_function(lambda x: x)
        (True, False)
    """
    if isinstance(target, str):
        return is_original(getattr(torch.Tensor, target, None))
    name = getattr(target, "__name__", "")
    places: tuple[Any, ...] = (torch, nn.functional, operator, torch.Tensor)
    own = any(getattr(place, name, None) is target for place in places) or target in _BUILTINS
    own = own or getattr(torch.linalg, name.removeprefix("linalg_"), None) is target
    return own and is_original(target)


_BUILTINS = (
    getattr,
    math.sqrt,
    nn.functional.logsigmoid,
    nn.functional.conv1d,
    nn.functional.conv2d,
    nn.functional.conv3d,
)
#: Where the code of torch and this package comes from; torch.fx names what it generates so.
_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<eval_with_key>")


def is_original(function: Any) -> bool:
    """Tell whether a function is compiled, or written in torch or this package: not a patch by somebody else."""
    code = getattr(function, "__code__", None)
    return code is None or code.co_filename.startswith(_FOLDERS)
