"""Lipschitz rules: bounds of the result of a call from those of its arguments, in L2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from groundwire_aol.certify.call import Call, Proof, sizes_per_axis
from groundwire_aol.certify.linear_norms import layer_norm
from groundwire_aol.certify.norms import (
    MAX_COLUMNS,
    ROUNDING,
    kernel_norm,
    matrix_norm,
    nonnegative_norm,
    operator_norm,
)
from groundwire_aol.certify.shape_rules import repetitions
from groundwire_aol.layers.rescale import Geometry

LipschitzRule: TypeAlias = Callable[[Call], Proof]

#: Modes of interpolation without negative weights.
INTERPOLATIONS = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")
#: Covers the rounding of a factor to the dtype of the model.
_FACTOR = 1 + 1e-6


# Entry by entry


def slope(constant: float | Callable[[Call], float | None]) -> LipschitzRule:
    """Return the rule of a function of each entry, by its largest slope; None where there is none."""

    def rule(call: Call) -> Proof:
        found = constant(call) if callable(constant) else constant
        if found is None:
            raise call.unknown(f"{call.name} with these arguments has no known Lipschitz constant")
        if found > 1 and _in_place(call):
            raise call.unknown("it changes a tensor in place that others may use", "use inplace=False")
        return Proof(call.only * found, "known constant")

    return rule


def _in_place(call: Call) -> bool:
    if call.layer is not None:
        return bool(getattr(call.layer, "inplace", False))
    return bool(call.kwargs.get("inplace")) or any(a is True for a in call.args[1:]) or call.name.endswith("_")


def leaky_relu(call: Call) -> float:
    """Return the largest slope of LeakyReLU."""
    value = call.layer.negative_slope if call.layer else call.argument(1, "negative_slope", 0.01)
    return max(1.0, abs(float(value)))


def elu(call: Call) -> float:
    """Return the largest slope of ELU."""
    return max(1.0, abs(float(call.layer.alpha if call.layer else call.argument(1, "alpha", 1.0))))


def prelu(call: Call) -> float:
    """Return the largest slope of PReLU."""
    weight = call.layer.weight if call.layer else torch.as_tensor(call.args[1])
    return max(1.0, float(weight.detach().abs().max()))


def rrelu(call: Call) -> float:
    """Return the largest slope of RReLU; in evaluation it is the mean of the two."""
    return max(1.0, abs(float(call.layer.lower)), abs(float(call.layer.upper)))


def celu(call: Call) -> float | None:
    """Return the largest slope of CELU: exp(x / alpha) below 0 has slopes up to 1 for positive alpha."""
    return 1.0 if call.layer.alpha > 0 else None


def softplus(call: Call) -> float | None:
    """Return the largest slope of Softplus. Beyond its threshold it is the identity; a low one makes that a jump."""
    return 1.0 if call.layer.beta > 0 and call.layer.threshold >= 20 else None


def inactive(call: Call) -> Proof:
    """Bound of dropout, which is the identity in evaluation."""
    if call.layer is None and call.argument(2, "training", call.name != "alpha_dropout"):
        raise call.unknown("dropout is active in evaluation", "pass training=self.training, or use nn.Dropout")
    return Proof(call.only, "inactive in evaluation")


def known(call: Call) -> Proof:
    """Bound of this package's activations, centering and pooling: 1."""
    if getattr(call.layer, "dim", 1) % call.x.dim() == 0:
        raise call.unknown(f"{call.name} works along the batch", "use dim=1")
    return Proof(call.only, "known constant")


def batchnorm(call: Call) -> Proof:
    """Bound of BatchNorm in evaluation: the largest factor of its channels."""
    norm = BatchNormConstants.of(call)
    if norm is None:
        raise call.unknown(
            "BatchNorm without running statistics, or in training mode, divides by those of the batch",
            "use groundwire_aol.BatchCentering",
        )
    return Proof(call.only * float(norm.factors.max()) * ROUNDING * _FACTOR, "largest factor of its channels")


@dataclass(frozen=True)
class BatchNormConstants:
    """Constants of BatchNorm in evaluation, as a layer or a function: ``factors * (x - mean) + bias``."""

    factors: Tensor
    mean: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, call: Call) -> BatchNormConstants | None:
        """Return those of a call; None where statistics are of the batch."""
        layer = call.layer
        if layer is not None:
            mean, var, weight, bias, eps = (
                layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps,
            )  # fmt: skip
        else:
            names = ("running_mean", "running_var", "weight", "bias")
            mean, var, weight, bias = (call.argument(i, name) for i, name in enumerate(names, start=1))
            eps = call.argument(7, "eps", 1e-5)
            if call.argument(5, "training", False):
                return None
        if mean is None or var is None:
            return None
        factors = (var.detach().double() + eps).rsqrt()
        if weight is not None:
            factors = factors * weight.detach().double().abs()
        return cls(factors, mean.detach().double(), None if bias is None else bias.detach())


# Several branches


def total(call: Call) -> Proof:
    """Bound of a sum or difference. In place or not: nothing may read what was there before."""
    if len(call.args) > 2:
        raise call.unknown("add with a third argument has no rule", "use alpha=")
    alpha = abs(float(call.kwargs.get("alpha", 1)))
    first, second = repetitions(call)
    return Proof(alpha * first + second if call.name == "rsub" else first + alpha * second, "sum")


def scaling(call: Call) -> Proof:
    """Bound of a product with, or a quotient by, a constant: its largest factor."""
    first, second = call.nodes[:2]
    divides = call.name in ("div", "divide", "truediv", "itruediv")
    if divides and call.depends(second):
        raise call.unknown("dividing by an activation is not Lipschitz", "divide by a constant")
    if call.depends(first) and call.depends(second):
        raise call.unknown("a product of two activations is not Lipschitz", "multiply by a constant, or add")
    if call.kwargs.get("rounding_mode") is not None:
        raise call.unknown("rounding is not continuous")
    constant = call.args[1] if call.depends(first) else call.args[0]
    values = torch.as_tensor(constant).detach().double().abs()
    factor = float(1 / values.min()) if divides else float(values.max())
    return Proof(max(repetitions(call)) * factor * _FACTOR, "largest factor")


def concatenation(call: Call) -> Proof:
    """Bound of branches side by side: the root of the sum of squares."""
    dim = call.argument(1, "dim", call.kwargs.get("axis", 0))
    branches = call.nodes[0] if call.nodes else call.named_nodes["tensors"]
    dims = {v.dim() + (call.name == "stack") for v in call.x}
    if call.name in ("hstack", "vstack") or not isinstance(dim, int) or len(dims) != 1 or dim % max(dims) == 0:
        raise call.unknown("it concatenates samples", "concatenate along the channels, dim=1")
    if isinstance(branches, fx.Node):
        return Proof(call.bounds[branches] * math.sqrt(len(call.x)), "root of the number of branches")
    return Proof(math.hypot(*(call.bounds.get(n, 0.0) for n in branches)), "root of the sum of squares")


def scaled_concatenation(call: Call) -> Proof:
    """Bound of :class:`ScaledConcat`."""
    if call.layer.dim == 0:
        raise call.unknown("it concatenates samples", "concatenate channels")
    parts = [call.bounds.get(n, 0.0) for n in call.nodes[0]]
    return Proof(math.hypot(*parts) / math.sqrt(len(parts)) * _FACTOR, "concatenation over sqrt(n)")


def convex_sum(call: Call) -> Proof:
    """Bound of :class:`ConvexSum`."""
    share = float(call.layer.logit.detach().double().sigmoid())
    x, f = (call.bounds.get(n, 0.0) for n in call.nodes)
    return Proof((share * x + (1 - share) * f) * ROUNDING * _FACTOR, f"convex combination, share {share:.3g}")


# Extremes


def extreme_of_two(call: Call) -> Proof:
    """Bound of the larger or smaller of two tensors, entry by entry."""
    return Proof(math.hypot(*repetitions(call)), "root of the sum of squares")


def extreme(call: Call) -> Proof:
    """Bound of the largest or smallest entry along dimensions, or of two tensors."""
    if len(call.nodes) > 1 and call.depends(call.nodes[1]):
        return extreme_of_two(call)
    _refuse_batch_dims(call, call.argument(1, "dim", call.kwargs.get("axis")))
    return Proof(call.only, "one entry of each group")


def sorting(call: Call) -> Proof:
    """Bound of sorting, and of the largest so many: 1."""
    _refuse_batch_dims(call, call.argument(2 if call.name == "topk" else 1, "dim", -1))
    return Proof(call.only, "sorting")


def selection(call: Call) -> Proof:
    """Bound of entries of one tensor where a constant mask is true, of another elsewhere."""
    if call.depends(call.nodes[0]):
        raise call.unknown("a selection by the values of activations may jump", "use torch.maximum, relu or clamp")
    return Proof(math.hypot(*repetitions(call, 3)), "root of the sum of squares")


def _refuse_batch_dims(call: Call, dims: Any) -> None:
    given = [dims] if isinstance(dims, int) else list(dims or ())
    if not given or any(not isinstance(d, int) or d % call.x.dim() == 0 for d in given):
        raise call.unknown("it works on the whole batch", "give dim, other than 0")


def max_pool(axes: int) -> LipschitzRule:
    """Return the rule of max pooling over so many axes: windows that overlap count pixels more than once."""

    def rule(call: Call) -> Proof:
        layer = call.layer
        if layer.return_indices if layer else call.argument(6, "return_indices", False):
            raise call.unknown("indices of entries are no continuous function", "use return_indices=False")
        arguments = ((1, "kernel_size", None), (2, "stride", None), (4, "dilation", 1))
        size, stride, dilation = (getattr(layer, n) if layer else call.argument(i, n, d) for i, n, d in arguments)
        constant = max_pool_constant(size, stride, dilation, axes)
        return Proof(call.only * constant, "root of the number of windows that share a pixel")

    return rule


def adaptive_max_pool(axes: int) -> LipschitzRule:
    """Return the rule of adaptive max pooling: a pixel counts as often as windows hold it."""

    def rule(call: Call) -> Proof:
        layer = call.layer
        if layer.return_indices if layer else call.argument(2, "return_indices", False):
            raise call.unknown("indices of entries are no continuous function", "use return_indices=False")
        sizes = sizes_per_axis(layer.output_size if layer else call.argument(1, "output_size"), axes)
        windows = 1
        for size, outputs in zip(call.x.shape[-axes:], sizes, strict=True):
            count = [0] * size
            for i in range(size if outputs is None else outputs):
                start, end = i * size // (outputs or size), -(-(i + 1) * size // (outputs or size))
                count[start:end] = [c + 1 for c in count[start:end]]
            windows *= max(count)
        return Proof(call.only * math.sqrt(windows), "root of the number of windows that share a pixel")

    return rule


def max_pool_constant(kernel: Any, stride: Any, dilation: Any, axes: int) -> float:
    """Return the constant of max pooling: a pixel that lies in n windows counts n times.

    It is the root of the largest n, ``prod ceil(k / (s / gcd(s, d)))``.

    Example:
        >>> max_pool_constant(3, 2, 1, 2)
        2.0
    """
    kernel, stride, dilation = (sizes_per_axis(v, axes) for v in (kernel, stride or kernel, dilation))
    windows = [math.ceil(k / (s // math.gcd(s, d))) for k, s, d in zip(kernel, stride, dilation, strict=True)]
    return math.sqrt(math.prod(windows))


# Linear operations


def nonnegative(call: Call) -> Proof:
    """Bound of a rearrangement, copy or average by the Schur test, which runs the call on these shapes."""
    name, x, before = call.name, call.x, call.only
    if isinstance(x, tuple | list):
        raise call.unknown(f"{name} of several tensors has no rule")
    if name in ("interpolate", "upsample", "Upsample"):
        mode = call.layer.mode if call.layer else call.argument(3, "mode", "nearest")
        if mode not in INTERPOLATIONS:
            raise call.unknown(f"interpolation mode {mode!r} has negative weights", "use 'nearest' or 'bilinear'")
    converts = name in ("to", "type_as")
    if converts and any(d in (torch.float16, torch.bfloat16) or not d.is_floating_point for d in _dtypes(call)):
        raise call.unknown("it rounds to fewer bits", "stay in float32")

    def function(value: Tensor) -> Tensor:
        found = call.with_first(value if converts else value.to(torch.float64)).run()
        return torch.cat([t.flatten(1) for t in found], 1) if isinstance(found, tuple | list) else found

    try:
        return Proof(before * nonnegative_norm(function, tuple(x.shape[1:])), "row and column sums")
    except (ValueError, RuntimeError, IndexError) as error:
        raise call.unknown(str(error).split("\n")[0], "keep the batch dimension first and apart") from error


def _dtypes(call: Call) -> list[torch.dtype]:
    values = [*call.args[1:], *call.kwargs.values()]
    return [v.dtype if isinstance(v, Tensor) else v for v in values if isinstance(v, Tensor | torch.dtype)]


def item(call: Call) -> Proof:
    """Bound of one of several tensors, or of entries of one."""
    if not isinstance(call.x, tuple | list):
        return nonnegative(call)
    chosen = call.x[call.args[1]]
    if isinstance(chosen, Tensor) and not chosen.is_floating_point():
        raise call.unknown("indices of entries are no continuous function", "use the values")
    return Proof(call.only, "one of several")


def values(call: Call) -> Proof:
    """Bound of the values of a maximum or of sorting."""
    if call.node.op != "call_function" or not isinstance(call.x, tuple):
        raise call.unknown("values of this have no rule")
    return Proof(call.only, "one of several")


def einsum(call: Call) -> Proof:
    """Bound of an Einstein sum of one activation and constants, from its matrix written out."""
    operands = call.args[1:]
    dependent = [i for i, node in enumerate(call.nodes[1:]) if call.depends(node)]
    if len(dependent) != 1 or not isinstance(operands[dependent[0]], Tensor):
        raise call.unknown("a sum of products of activations is not Lipschitz", "let one operand depend on the input")
    place = dependent[0]
    x = operands[place]
    shape = tuple(x.shape[1:])
    if math.prod(shape) > MAX_COLUMNS:
        raise call.unknown(
            f"the matrix of an einsum with inputs of shape {shape} is too large", "use nn.Linear or conv"
        )

    def function(value: Tensor) -> Tensor:
        constants = [c.detach().double() if isinstance(c, Tensor) else c for c in operands]
        constants[place] = value
        found: Tensor = torch.einsum(call.args[0], *constants)
        if len(found) != len(value):
            raise call.unknown("it sums over the batch", "keep the batch first and apart")
        return found

    mixed = function(torch.stack([torch.ones_like(x[0]).double(), torch.zeros_like(x[0]).double()]))
    if bool(mixed[1].any()):
        raise call.unknown("it mixes the samples of a batch", "keep the batch first and apart")
    bound = next(call.bounds[n] for n in call.bounds)
    return Proof(bound * operator_norm(function, shape), "exact (singular values)")


def linear_layer(call: Call) -> Proof:
    """Bound of a Linear or convolution layer."""
    constant, how = layer_norm(call.layer, call.x, call.rescales.get(call.path))
    return Proof(call.only * constant, how)


def dense(call: Call) -> Proof:
    """Bound of ``F.linear`` with constant weights."""
    constant, how = matrix_norm(call.argument(1, "weight").detach().double())
    return Proof(call.only * constant, how)


def product(call: Call) -> Proof:
    """Bound of a product with a constant matrix."""
    matrix = call.args[1]
    if not (isinstance(matrix, Tensor) and matrix.dim() == 2 and call.x.dim() >= 2):
        raise call.unknown("only x @ W with a constant matrix W has a rule", "use nn.Linear")
    constant, how = matrix_norm(matrix.detach().double())
    return Proof(call.only * constant, how)


def convolution(call: Call) -> Proof:
    """Bound of a convolution or transposed convolution with constant weights."""
    axes, transposed = int(call.name[-2]), "transpose" in call.name
    position = {"stride": 3, "groups": 6, "dilation": 7 if transposed else 5}
    stride, dilation = (sizes_per_axis(call.argument(position[n], n, 1), axes) for n in ("stride", "dilation"))
    geometry = Geometry(stride, dilation, call.argument(position["groups"], "groups", 1), transposed)
    weight = call.argument(1, "weight").detach().double()
    return Proof(call.only * kernel_norm(weight, geometry), "upper bound (iterated Gram kernel)")
