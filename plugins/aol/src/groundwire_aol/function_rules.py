"""One rule per function or method, for what is neither elementwise nor a rearrangement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from groundwire_aol import constants
from groundwire_aol.functional import Geometry
from groundwire_aol.norms import kernel_norm, matrix_norm
from groundwire_aol.operations import hint
from groundwire_aol.step import Proof, Step

if TYPE_CHECKING:
    from groundwire_aol.rules import Rules

FUNCTION_RULES: dict[str, Callable[[Rules, Step], Proof | None]] = {}


def _rule(*names: str) -> Callable[[Callable[[Rules, Step], Proof | None]], Callable[[Rules, Step], Proof | None]]:
    def note(function: Callable[[Rules, Step], Proof | None]) -> Callable[[Rules, Step], Proof | None]:
        FUNCTION_RULES.update(dict.fromkeys(names, function))
        return function

    return note


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 1


def _spread(step: Step, positions: tuple[int, ...] = (0, 1)) -> list[float]:
    """Bounds of the operands, each times the root of how often broadcasting repeats it."""
    values = [step.args[p] for p in positions]
    tensors = [v for v in values if isinstance(v, Tensor)]
    total = torch.broadcast_shapes(*(t.shape for t in tensors))  # type: ignore[no-untyped-call]
    found = []
    for position, value in zip(positions, values, strict=True):
        node = step.nodes[position]
        bound = step.bounds.get(node, 0.0) if isinstance(node, fx.Node) else 0.0
        if bound and (value.dim() != len(total) or value.shape[0] != total[0] or value.shape[0] != 2):
            raise step.unknown(f"broadcasting {tuple(value.shape)} to {tuple(total)} moves the batch dimension")
        found.append(bound * math.sqrt(math.prod(total) / _size(value)) if bound else 0.0)
    return found


@_rule("add", "sub", "rsub", "iadd", "isub")
def _sum(rules: Rules, step: Step) -> Proof:
    # In place or not: the walk sees to it that nothing reads what was there before.
    alpha = abs(float(step.kwargs.get("alpha", 1)))
    first, second = _spread(step)
    if len(step.args) > 2:
        raise step.unknown("add with a third argument has no rule", "use alpha=")
    return Proof(first + alpha * second if step.operation != "rsub" else alpha * first + second, "sum")


@_rule("mul", "multiply", "div", "divide", "truediv", "imul", "itruediv")
def _scaling(rules: Rules, step: Step) -> Proof:
    first, second = step.nodes[:2]
    if step.depends(first) and step.depends(second):
        raise step.unknown("a product or quotient of two activations is not Lipschitz", hint(step.operation))
    if step.kwargs.get("rounding_mode") is not None:
        raise step.unknown("rounding is not continuous")
    divides = step.operation in ("div", "divide", "truediv", "itruediv")
    if divides and step.depends(second):
        raise step.unknown("dividing by an activation is not Lipschitz", hint("div"))
    constant = step.args[1] if step.depends(first) else step.args[0]
    values = torch.as_tensor(constant).detach().double().abs()
    factor = float(1 / values.min()) if divides else float(values.max())
    return Proof(max(_spread(step)) * factor * (1 + 1e-6), "largest factor")


@_rule("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def _concatenation(rules: Rules, step: Step) -> Proof:
    dim = step.argument(1, "dim", step.kwargs.get("axis", 0))
    parts = step.nodes[0] if step.nodes else step.named_nodes["tensors"]
    values = step.args[0] if step.args else step.kwargs["tensors"]
    dims = {v.dim() + (step.operation == "stack") for v in values}
    if step.operation in ("hstack", "vstack") or not isinstance(dim, int) or len(dims) != 1 or dim % max(dims) == 0:
        raise step.unknown("it concatenates samples", "concatenate along the channels, dim=1")
    if isinstance(parts, fx.Node):
        return Proof(step.bounds[parts] * math.sqrt(len(values)), "root of the number of branches")
    return Proof(math.hypot(*(step.bounds.get(n, 0.0) for n in parts)), "root of the sum of squares")


@_rule("maximum", "minimum")
def _pointwise_extreme(rules: Rules, step: Step) -> Proof:
    return Proof(math.hypot(*_spread(step)), "root of the sum of squares")


@_rule("max", "min", "amax", "amin")
def _extreme(rules: Rules, step: Step) -> Proof:
    if len(step.nodes) > 1 and step.depends(step.nodes[1]):
        return Proof(math.hypot(*_spread(step)), "root of the sum of squares")
    _refuse_batch_dims(step, step.argument(1, "dim", step.kwargs.get("axis")))
    return Proof(_only(step), "one entry of each group")


@_rule("sort")
def _sorted(rules: Rules, step: Step) -> Proof:
    _refuse_batch_dims(step, step.argument(1, "dim", -1))
    return Proof(_only(step), "sorting")


@_rule("getitem")
def _item(rules: Rules, step: Step) -> Proof:
    before = _only(step)
    source = step.args[0]
    if isinstance(source, tuple | list):
        chosen = source[step.args[1]]
        if isinstance(chosen, Tensor) and not chosen.is_floating_point():
            raise step.unknown("indices of entries are no continuous function", "use the values")
        return Proof(before, "one of several")
    return rules.nonnegative(step, before)


def _only(step: Step) -> float:
    before = step.sole
    if before is None:
        raise step.unknown(f"{step.operation} with an index that depends on the input has no rule")
    return before


def _refuse_batch_dims(step: Step, dims: Any) -> None:
    axes = step.args[0].dim()
    given = [dims] if isinstance(dims, int) else list(dims or ())
    if not given or any(not isinstance(d, int) or d % axes == 0 for d in given):
        raise step.unknown("it works on the whole batch", "give dim, other than 0")


@_rule("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(rules: Rules, step: Step) -> Proof:
    if step.argument(6, "return_indices", False):
        raise step.unknown("indices of entries are no continuous function")
    size, stride, dilation = (
        step.argument(i, n, d) for i, n, d in ((1, "kernel_size", None), (2, "stride", None), (4, "dilation", 1))
    )
    constant = constants.of_max_pool(size, stride or size, dilation, int(step.operation[-2]))
    return Proof(_only(step) * constant, "root of the number of windows that share a pixel")


@_rule("leaky_relu", "leaky_relu_")
def _leaky_relu(rules: Rules, step: Step) -> Proof:
    return _slope(step, step.argument(1, "negative_slope", 0.01))


@_rule("elu")
def _elu(rules: Rules, step: Step) -> Proof:
    return _slope(step, step.argument(1, "alpha", 1.0))


@_rule("prelu")
def _prelu(rules: Rules, step: Step) -> Proof:
    return _slope(step, float(torch.as_tensor(step.args[1]).detach().abs().max()))


def _slope(step: Step, slope: float) -> Proof:
    constant = max(1.0, abs(float(slope)))
    if constant > 1 and (step.argument(2, "inplace", False) or step.operation.endswith("_")):
        raise step.unknown("it changes a tensor in place", "use inplace=False")
    return Proof(_only(step) * constant, "known constant")


@_rule("silu", "mish", "hardswish", "selu", "gelu")
def _steep(rules: Rules, step: Step) -> Proof:
    if step.kwargs.get("inplace") or any(a is True for a in step.args[1:]):
        raise step.unknown("it changes a tensor in place", "use inplace=False")
    return Proof(_only(step) * constants.FUNCTIONS[step.operation], "known constant")


@_rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")
def _dropout(rules: Rules, step: Step) -> Proof:
    if step.argument(2, "training", step.operation != "alpha_dropout"):
        raise step.unknown("dropout is active in evaluation", hint("dropout"))
    return Proof(_only(step), "inactive in evaluation")


@_rule("linear")
def _dense(rules: Rules, step: Step) -> Proof:
    weight = step.argument(1, "weight")
    constant, how = matrix_norm(weight.detach().double())
    return Proof(_only(step) * constant, how)


@_rule("matmul", "mm")
def _product(rules: Rules, step: Step) -> Proof:
    matrix = step.args[1]
    if not (isinstance(matrix, Tensor) and matrix.dim() == 2 and step.args[0].dim() >= 2):
        raise step.unknown("only x @ W with a constant matrix W has a rule", "use nn.Linear")
    constant, how = matrix_norm(matrix.detach().double())
    return Proof(_only(step) * constant, how)


@_rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _kernel(rules: Rules, step: Step) -> Proof:
    axes, transposed = int(step.operation[-2]), "transpose" in step.operation
    position = {"stride": 3, "groups": 6, "dilation": 7 if transposed else 5}
    if transposed:
        position["groups"] = 6
    stride, dilation = (constants.per_axis(step.argument(position[n], n, 1), axes) for n in ("stride", "dilation"))
    geometry = Geometry(stride, dilation, step.argument(position["groups"], "groups", 1), transposed)
    weight = step.argument(1, "weight").detach().double()
    return Proof(_only(step) * kernel_norm(weight, geometry), "upper bound (iterated Gram kernel)")
