"""What is known about each operation of a traced graph: a bound of its result, or a refusal that says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from groundwire_aol import constants
from groundwire_aol.centering import ConvexSum, Rescaled, ScaledConcat
from groundwire_aol.constraint import TRANSPOSED, computes_linear
from groundwire_aol.errors import UnknownLipschitzError
from groundwire_aol.functional import Geometry
from groundwire_aol.norms import (
    MAX_COLUMNS,
    ROUNDING,
    kernel_norm,
    matrix_norm,
    nonnegative_norm,
    operator_norm,
    rescaled_norm,
)


@dataclass(frozen=True)
class Proof:
    """Bound from the model's input to a step's output, and how its last factor was proved."""

    lipschitz: float
    how: str


@dataclass(frozen=True)
class Step:
    """One node of the graph with the values of its arguments, and the bounds of those that depend on the input."""

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    nodes: tuple[Any, ...]
    named_nodes: Mapping[str, Any]
    bounds: Mapping[fx.Node, float]
    values: Mapping[fx.Node, Any]

    @property
    def is_layer(self) -> bool:
        """Whether it is a whole layer rather than a function or method."""
        return bool(self.node.op == "call_module")

    @property
    def path(self) -> str:
        """The layer, or the layer in whose forward the operation is and its name."""
        if self.node.op == "call_module":
            return str(self.node.target)
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        owner = stack[-1][0] if stack else ""
        return f"{owner}.{self.node.name}" if owner else self.node.name

    @property
    def operation(self) -> str:
        """What it is called."""
        return constants.name_of(self.node.target) if self.node.op != "call_module" else "layer"

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The value of an argument, however it was passed."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def depends(self, argument: Any) -> bool:
        """Whether an argument, as it stands in the graph, depends on the model's input."""
        found: list[bool] = []
        fx.node.map_arg(argument, lambda n: found.append(n in self.bounds))
        return any(found)

    @property
    def sole(self) -> float | None:
        """Bound of the first argument, if nothing else depends on the input."""
        rest = (*self.nodes[1:], *self.named_nodes.values())
        first = self.nodes[0] if self.nodes else None
        alone = isinstance(first, fx.Node) and first in self.bounds and not any(map(self.depends, rest))
        return self.bounds[first] if alone and isinstance(first, fx.Node) else None

    def unknown(self, why: str, hint: str = "") -> UnknownLipschitzError:
        """The refusal of this step."""
        return UnknownLipschitzError(self.path, why, hint)


#: Linear, without negative entries, at most moving, copying, dropping or averaging entries: the Schur test bounds them.
NONNEGATIVE = frozenset((
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "moveaxis", "squeeze",
    "unsqueeze", "expand", "repeat", "repeat_interleave", "tile", "getitem", "select", "narrow", "index_select",
    "split", "chunk",
    "unbind", "flip", "roll", "pad", "mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "unfold", "fold", "view_as", "reshape_as", "expand_as", "T", "mT", "to", "type_as", "diagonal",
    "tensor_split",
    "rot90", "cumsum",
))  # fmt: skip
NONNEGATIVE_LAYERS = (
    nn.Flatten, nn.Unflatten, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold, nn.Fold,
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d, nn.CircularPad3d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
)  # fmt: skip
#: Modes of interpolation without negative weights.
INTERPOLATIONS = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")
MAX_POOLS = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
#: Of the input only these facts may be used as numbers.
FACTS = frozenset(
    ("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "dtype", "device", "len", "is_floating_point")
)
#: May be computed from constants alone: always the same result.
PURE = frozenset((
    *NONNEGATIVE, *constants.FUNCTIONS, *FACTS, "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow",
    "sqrt", "rsqrt",
    "exp", "log", "square", "reciprocal", "softmax", "softplus", "norm", "max", "min", "maximum", "minimum", "cat",
    "stack", "matmul", "mm",
    "zeros", "ones", "full", "eye", "arange", "linspace", "tensor", "as_tensor", "where", "prod", "sign", "getattr",
    "item",
    "zeros_like", "ones_like", "transpose", "floor", "ceil", "int", "eq", "ne", "lt", "gt", "le", "ge", "and_", "or_",
    "not_", "normalize",
))  # fmt: skip

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
    "Embedding": "certify the part behind it, with respect to embeddings",
    "embedding": "certify the part behind it, with respect to embeddings",
    "mul": "a product of two activations is not Lipschitz; multiply by a constant, or add",
    "truediv": "dividing by an activation is not Lipschitz; divide by a constant",
    "div": "dividing by an activation is not Lipschitz; divide by a constant",
    "pow": "powers are not Lipschitz; use an activation",
    "square": "powers are not Lipschitz; use an activation",
    "normalize": "dividing by a norm is not Lipschitz; divide by a constant",
    "scaled_dot_product_attention": "dot-product attention is not Lipschitz",
    "dropout": "pass training=self.training, or use nn.Dropout",
    "LSTM": "recurrent layers multiply activations", "GRU": "recurrent layers multiply activations",
}  # fmt: skip


class Rules:
    """The rules for one baked model."""

    def __init__(self, module: nn.Module, squares: Mapping[str, Any]) -> None:
        self.module, self.squares = module, squares

    def run(self, step: Step) -> Any:
        """What the step computes."""
        node = step.node
        if node.op == "get_attr":
            found: Any = self.module
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return found
        if node.op == "call_module":
            return self.module.get_submodule(str(node.target))(*step.args, **step.kwargs)
        if node.op == "call_method":
            return getattr(step.args[0], str(node.target))(*step.args[1:], **step.kwargs)
        assert callable(node.target)
        return node.target(*step.args, **step.kwargs)

    def of(self, step: Step) -> Proof | None:
        """Bound of the result; None if it does not depend on the input.

        Raises:
            UnknownLipschitzError: There is no rule.
        """
        if step.node.op == "get_attr":
            return None
        if "out" in step.kwargs:
            raise step.unknown("out= writes into another tensor", "use the result")
        try:
            return self._layer(step) if step.node.op == "call_module" else self._function(step)
        except UnknownLipschitzError:
            raise
        except (IndexError, KeyError, AttributeError, TypeError, ValueError) as error:
            raise step.unknown(f"{step.operation} is called in a way that has no rule ({error})") from error

    # Layers

    def _layer(self, step: Step) -> Proof | None:
        layer = self.module.get_submodule(str(step.node.target))
        if not step.bounds:
            raise step.unknown("a layer is applied to a constant", "compute it once and register it as a buffer")
        if isinstance(layer, ConvexSum):
            share = float(layer.logit.detach().double().sigmoid())
            x, f = (step.bounds.get(n, 0.0) for n in step.nodes)
            self._same_shapes(step)
            return Proof(
                (share * x + (1 - share) * f) * ROUNDING * (1 + 1e-6), f"convex combination, share {share:.3g}"
            )
        if isinstance(layer, ScaledConcat):
            parts = [step.bounds.get(n, 0.0) for n in step.nodes[0]]
            if layer.dim == 0:
                raise step.unknown("it concatenates samples", "concatenate channels")
            return Proof(math.hypot(*parts) / math.sqrt(len(parts)) * (1 + 1e-6), "concatenation over sqrt(n)")
        before = step.sole
        if before is None:
            raise step.unknown(f"{type(layer).__name__} of several inputs has no rule", _hint(type(layer).__name__))
        constant, how = self._constant(step, layer)
        return Proof(before * constant, how)

    def _constant(self, step: Step, layer: nn.Module) -> tuple[float, str]:
        x = step.args[0]
        if getattr(layer, "dim", None) == 0:
            raise step.unknown(f"{type(layer).__name__} works along the batch", "use dim=1")
        activation = constants.MODULES.get(type(layer), constants.of_activation(layer))
        if activation is not None:
            if activation > 1 and getattr(layer, "inplace", False):
                raise step.unknown("it changes a tensor in place that others may use", "use inplace=False")
            return activation, "known constant"
        if isinstance(layer, Rescaled):
            inner, how = self._constant(step, layer.layer)
            return inner * abs(layer.factor) * (1 + 1e-6), f"{how}, times {layer.factor:g}"
        if type(layer) in MAX_POOLS and not layer.return_indices:
            return (
                constants.of_max_pool(layer.kernel_size, layer.stride, layer.dilation, MAX_POOLS[type(layer)]),  # type: ignore[index]
                "root of the number of windows that share a pixel",
            )
        if type(layer) in BATCHNORMS:
            return self._batchnorm(step, layer)
        if type(layer) in NONNEGATIVE_LAYERS:
            return self._schur(step, layer, x)
        if computes_linear(layer):
            return self._linear(step, layer, x)
        name = type(layer).__name__
        raise step.unknown(f"{name} has no known Lipschitz constant (input of shape {tuple(x.shape)})", _hint(name))

    def _batchnorm(self, step: Step, layer: Any) -> tuple[float, str]:
        if layer.running_var is None:
            raise step.unknown(
                "BatchNorm without running statistics divides by those of the batch",
                "use groundwire_aol.BatchCentering",
            )
        factors = (layer.running_var.double() + layer.eps).rsqrt()
        if layer.weight is not None:
            factors = factors * layer.weight.detach().double().abs()
        return float(factors.max()) * ROUNDING * (1 + 1e-6), "largest factor of its channels"

    def _schur(self, step: Step, function: Callable[[Tensor], Any], x: Tensor) -> tuple[float, str]:
        mode = getattr(function, "mode", None)
        if isinstance(function, nn.Upsample) and mode not in INTERPOLATIONS:
            raise step.unknown(f"interpolation mode {mode!r} has negative weights", "use 'nearest' or 'bilinear'")
        try:
            return nonnegative_norm(function, tuple(x.shape[1:])), "row and column sums"
        except (ValueError, RuntimeError, IndexError) as error:
            raise step.unknown(str(error).split("\n")[0], "keep the batch dimension first and apart") from error

    def _linear(self, step: Step, layer: Any, x: Tensor) -> tuple[float, str]:
        weight = layer.weight.detach().double()
        known = self.squares.get(str(step.node.target))
        if known is not None:
            rule, squared, (steps, side) = known
            if rule.geometry == _geometry(layer) and _bounded_padding(layer):
                return (
                    rescaled_norm(weight, squared, rule.rescaled_geometry, steps=steps, side=side),
                    "AOL, proved again in float64",
                )
        if isinstance(layer, nn.Linear):
            return matrix_norm(weight)
        return _convolution(layer, x)

    @staticmethod
    def _same_shapes(step: Step) -> None:
        shapes = {tuple(a.shape) for a in step.args}
        if len(shapes) > 1:
            raise step.unknown(f"it combines shapes {sorted(shapes)}", "give it tensors of one shape")

    # Functions and methods

    def _function(self, step: Step) -> Proof | None:
        name = step.operation
        if not constants.is_known_function(step.node.target):
            raise step.unknown(f"{name} is no function of torch", "call torch functions, or put it into a module")
        if not step.bounds:
            if name not in PURE:
                raise step.unknown(f"{name} may give another result on every call", "register a buffer instead")
            return None
        if name == "getattr":
            name = str(step.args[1])
        if name in FACTS:
            return None
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, step)
        before = step.sole
        if before is not None and name in constants.FUNCTIONS:
            return Proof(before * constants.FUNCTIONS[name], "known constant")
        if before is not None and name in NONNEGATIVE:
            return self._nonnegative(step, before)
        raise step.unknown(f"{name} has no known Lipschitz constant here", _hint(name))

    def _nonnegative(self, step: Step, before: float) -> Proof:
        x = step.args[0]
        name = step.operation
        if isinstance(x, tuple | list):
            if name == "getitem":
                return Proof(before, "one of several")
            raise step.unknown(f"{name} of several tensors has no rule")
        if name in ("interpolate", "upsample") and step.argument(3, "mode", "nearest") not in INTERPOLATIONS:
            raise step.unknown("this interpolation has negative weights", "use mode='nearest' or 'bilinear'")
        if name == "to" and any(d in (torch.float16, torch.bfloat16) or not _floats(d) for d in _dtypes(step)):
            raise step.unknown("it rounds to fewer bits", "stay in float32")

        def function(value: Tensor) -> Tensor:
            value = value if name in ("to", "type_as") else value.to(torch.float64)
            found = self.run(_with_first(step, value))
            return torch.cat([t.flatten(1) for t in found], 1) if isinstance(found, tuple | list) else found

        constant, how = self._schur(step, function, x)
        return Proof(before * constant, how)


def _floats(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def _dtypes(step: Step) -> list[torch.dtype]:
    values = [*step.args[1:], *step.kwargs.values()]
    return [v.dtype if isinstance(v, Tensor) else v for v in values if isinstance(v, Tensor | torch.dtype)]


def _with_first(step: Step, value: Any) -> Step:
    return Step(step.node, (value, *step.args[1:]), step.kwargs, step.nodes, step.named_nodes, step.bounds, step.values)


def _hint(name: str) -> str:
    return HINTS.get(name, "replace it, or exclude this part and certify the rest")


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
    import copy

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


# One rule per name, for what is neither elementwise nor a rearrangement.

_RULES: dict[str, Callable[[Rules, Step], Proof | None]] = {}


def _rule(*names: str) -> Callable[[Callable[[Rules, Step], Proof | None]], Callable[[Rules, Step], Proof | None]]:
    def note(function: Callable[[Rules, Step], Proof | None]) -> Callable[[Rules, Step], Proof | None]:
        _RULES.update(dict.fromkeys(names, function))
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
    if step.operation in ("iadd", "isub"):
        raise step.unknown("it changes a tensor in place", "write x = x + y")
    alpha = abs(float(step.kwargs.get("alpha", 1)))
    first, second = _spread(step)
    if len(step.args) > 2:
        raise step.unknown("add with a third argument has no rule", "use alpha=")
    return Proof(first + alpha * second if step.operation != "rsub" else alpha * first + second, "sum")


@_rule("mul", "multiply", "div", "divide", "truediv")
def _scaling(rules: Rules, step: Step) -> Proof:
    first, second = step.nodes[:2]
    if step.depends(first) and step.depends(second):
        raise step.unknown("a product or quotient of two activations is not Lipschitz", _hint(step.operation))
    if step.kwargs.get("rounding_mode") is not None:
        raise step.unknown("rounding is not continuous")
    divides = step.operation in ("div", "divide", "truediv")
    if divides and step.depends(second):
        raise step.unknown("dividing by an activation is not Lipschitz", _hint("div"))
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
    return rules._nonnegative(step, before)


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
        raise step.unknown("dropout is active in evaluation", _hint("dropout"))
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
    stride, dilation = (constants._per_axis(step.argument(position[n], n, 1), axes) for n in ("stride", "dilation"))
    geometry = Geometry(stride, dilation, step.argument(position["groups"], "groups", 1), transposed)
    weight = step.argument(1, "weight").detach().double()
    return Proof(_only(step) * kernel_norm(weight, geometry), "upper bound (iterated Gram kernel)")
