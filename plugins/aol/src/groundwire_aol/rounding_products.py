"""The rounding error of products with weights: ``gamma_n (|| |W| || ||x|| + ||b||)``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

from torch import Tensor, nn

from groundwire_aol.constraint import TRANSPOSED
from groundwire_aol.norms import nonnegative_norm
from groundwire_aol.situation import Affine, Situation, expanded_norm, gamma, smallest_normal


def of_linear(at: Situation) -> Affine:
    """Of a Linear or (transposed) convolution layer."""
    layer = copy.deepcopy(at.layer).double()
    weight = layer.weight
    terms = weight[:, 0].numel() // layer.groups if isinstance(layer, TRANSPOSED) else _nonzero(weight)
    weight.data.abs_()
    bias, layer.bias = layer.bias, None
    return _dot(at, layer, terms, bias)


def _nonzero(weight: Tensor) -> int:
    """Most terms of a sum: products with zero are exact, and so is adding them."""
    return int((weight.detach() != 0).flatten(1).sum(1).max())


def _dot(at: Situation, absolute: Callable[[Tensor], Tensor], terms: int, bias: Tensor | None) -> Affine:
    norm = nonnegative_norm(absolute, tuple(at.sample.shape[1:]))
    lost = smallest_normal(at.sample.dtype) * math.sqrt(at.entries * at.sample[0].numel()) * (terms + 2) * (1 + norm)
    products = at.inputs * norm + Affine(expanded_norm(bias, at))
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
    rest = list(step.args[3:])
    named = {k: v for k, v in step.kwargs.items() if k not in ("input", "weight", "bias")}

    def absolute(x: Tensor) -> Tensor:
        found: Tensor = step.node.target(x, weight.double().abs(), None, *rest, **named)  # type: ignore[operator]
        return found

    return _dot(at, absolute, weight[0].numel() * weight.shape[0], bias)


#: By name of the function.
PRODUCTS: dict[str, Callable[[Situation], Affine]] = {
    "linear": _dense, "matmul": _product, "mm": _product, "conv1d": _kernel, "conv2d": _kernel, "conv3d": _kernel,
    "conv_transpose1d": _kernel, "conv_transpose2d": _kernel, "conv_transpose3d": _kernel,
}  # fmt: skip
