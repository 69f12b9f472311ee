"""Replacements of layers when a network is made 1-Lipschitz."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn
from torch.nn.utils import parametrize

from groundwire_aol.certify.call import sizes_per_axis
from groundwire_aol.certify.lipschitz_rules import INTERPOLATIONS, max_pool_constant
from groundwire_aol.certify.operations import BATCHNORMS, MAX_POOLS, hint, operation_of_layer
from groundwire_aol.errors import UnknownLipschitzError, UnsoundError
from groundwire_aol.layers.activations import MaxMin, NActivation
from groundwire_aol.layers.normalization import BatchCentering
from groundwire_aol.layers.parametrization import aol_of, computes_linear, geometry_of
from groundwire_aol.layers.pooling import GlobalAvgPool, Rescaled

Activation: TypeAlias = Literal["maxmin", "nactivation"] | None
Init: TypeAlias = Literal["orthogonal", "keep"]
LastLayer: TypeAlias = Literal["aol", "normalized"]

#: Replaced by MaxMin or NActivation. Tanh, Sigmoid and the like stay: somebody chose them for their range.
REPLACED = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus,
)  # fmt: skip
_AVG_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_GLOBAL_POOLS = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}


@dataclass(frozen=True)
class Replacement:
    """Replacement of a layer, and how that is told.

    Attributes:
        layer: The new layer; None for "the same with an AOL weight".
        line: "Old -> new".
    """

    layer: nn.Module | None
    line: str


def replacement(
    path: str, layer: nn.Module, channels: int | None, activation: Activation, init: Init
) -> Replacement | None:
    """Return what becomes of a layer; None if it stays.

    Args:
        path: Where it is, for the refusal.
        layer: A step of the traced model.
        channels: Of its input, if they are known.
        activation: As for :func:`groundwire_aol.lipschitz`.
        init: As for :func:`groundwire_aol.lipschitz`.

    Raises:
        UnknownLipschitzError: There is no rule.
        UnsoundError: Its padding has no bound.

    Example:
        >>> replacement("0", nn.MaxPool2d(3, 2), None, "maxmin", "keep").line
        'MaxPool2d -> divided by its constant 2'
    """
    name = type(layer).__name__
    if aol_of(layer) is not None:
        return None
    if computes_linear(layer):
        if "weight" not in layer._parameters and not parametrize.is_parametrized(layer, "weight"):
            raise UnknownLipschitzError(
                path,
                "a hook makes its weight, as torch.nn.utils.weight_norm's does",
                "remove it, such as by torch.nn.utils.remove_weight_norm, or use torch.nn.utils.parametrizations",
            )
        try:
            geometry_of(layer)
        except UnsoundError as error:
            raise UnsoundError(f"{path}: {error}") from error
        start = ", orthogonal start" if init == "orthogonal" and takes_weights(layer) else ""
        return Replacement(None, f"{name} -> AOL weight of norm at most 1{start}")
    if type(layer) in REPLACED and activation is not None:
        return _activation(path, name, channels, activation)
    if type(layer) in BATCHNORMS:
        return Replacement(_centering(layer, init), f"{name} -> BatchCentering: the division has no bound")
    for kinds, rule in _RULES:
        if type(layer) in kinds:
            return rule(path, layer)
    if _stays(layer):
        return None
    raise UnknownLipschitzError(path, f"{name} has no known Lipschitz constant", hint(name))


def takes_weights(layer: Any) -> bool:
    """Tell whether ``layer.weight = w`` works, which needs the inverse of every parametrization.

    Example:
        >>> takes_weights(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
        True
    """
    chain = layer.parametrizations.weight if parametrize.is_parametrized(layer, "weight") else ()
    return all(hasattr(part, "right_inverse") for part in chain)


def _stays(layer: nn.Module) -> bool:
    return operation_of_layer(layer) is not None or type(layer).__module__.startswith("groundwire_aol.")


def _activation(path: str, name: str, channels: int | None, activation: Activation) -> Replacement:
    """MaxMin needs pairs, NActivation the number of channels."""
    if activation == "nactivation":
        if channels is None:
            raise UnknownLipschitzError(path, "the number of its channels is unknown", "use activation='maxmin'")
        return Replacement(NActivation(channels), f"{name} -> NActivation")
    if channels is not None and channels % 2:
        raise UnknownLipschitzError(
            path,
            f"MaxMin needs an even number of channels, got {channels}",
            "make the layer before it wider by one, or use activation='nactivation'",
        )
    return Replacement(MaxMin(), f"{name} -> MaxMin")


def _centering(norm: Any, init: Init) -> BatchCentering:
    """BatchNorm's mean and bias, unless training begins anew."""
    new = BatchCentering(norm.num_features, norm.momentum if norm.momentum is not None else 0.1, bias=norm.affine)
    if init == "keep" and norm.running_mean is not None:
        new.running_mean.copy_(norm.running_mean)
    if new.bias is not None:
        new.bias.requires_grad_(norm.bias.requires_grad)
        if init == "keep":
            new.bias.data.copy_(norm.bias.detach())
    return new


def _max_pool(path: str, layer: Any) -> Replacement | None:
    """Windows that overlap count pixels more than once."""
    constant = max_pool_constant(layer.kernel_size, layer.stride, layer.dilation, MAX_POOLS[type(layer)])
    if layer.return_indices:
        raise UnknownLipschitzError(path, "indices are no continuous function", "use return_indices=False")
    if constant <= 1:
        return None
    line = f"{type(layer).__name__} -> divided by its constant {constant:g}"
    return Replacement(Rescaled(layer, 1 / constant), line)


def _global_pool(_: str, layer: Any) -> Replacement | None:
    axes = _GLOBAL_POOLS[type(layer)]
    if set(sizes_per_axis(layer.output_size, axes)) != {1}:
        return None
    return Replacement(GlobalAvgPool(axes), f"{type(layer).__name__}(1) -> sum over the root of the size")


def _avg_pool(_: str, layer: Any) -> Replacement | None:
    """Averaging shrinks: multiplied so that a constant image keeps its length."""
    axes = _AVG_POOLS[type(layer)]
    size, stride, padding = (sizes_per_axis(v, axes) for v in (layer.kernel_size, layer.stride, layer.padding))
    apart = size == stride and not any(padding) and not layer.ceil_mode
    factor = math.sqrt(math.prod(size))
    if not apart or getattr(layer, "divisor_override", None) is not None or factor <= 1:
        return None
    line = f"{type(layer).__name__} -> times {factor:g}, so that its constant is 1 and not 1/{factor:g}"
    return Replacement(Rescaled(layer, factor), line)


def _upsample(path: str, layer: Any) -> Replacement | None:
    """Copies of a pixel count as often as they are made."""
    factor = layer.scale_factor
    if layer.mode not in INTERPOLATIONS:
        raise UnknownLipschitzError(path, f"mode {layer.mode!r} has negative weights", "use 'nearest' or 'bilinear'")
    if not (isinstance(factor, int | float) and float(factor).is_integer()) or layer.align_corners:
        return None
    axes = {"linear": 1, "bilinear": 2, "trilinear": 3}.get(layer.mode, 2)
    constant = math.sqrt(float(factor) ** axes)
    return Replacement(Rescaled(layer, 1 / constant), f"Upsample -> divided by its constant {constant:g}")


_RULES: tuple[tuple[Container[type[nn.Module]], Callable[[str, Any], Replacement | None]], ...] = (
    (MAX_POOLS, _max_pool), (_GLOBAL_POOLS, _global_pool), (_AVG_POOLS, _avg_pool), ((nn.Upsample,), _upsample),
)  # fmt: skip
