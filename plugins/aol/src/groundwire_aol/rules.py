"""What is known about each operation of a traced graph: a bound of its result, or a refusal that says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from groundwire_aol import constants
from groundwire_aol.centering import ConvexSum, Rescaled, ScaledConcat
from groundwire_aol.constraint import computes_linear
from groundwire_aol.errors import UnknownLipschitzError
from groundwire_aol.function_rules import FUNCTION_RULES
from groundwire_aol.linear_rules import of_linear
from groundwire_aol.norms import ROUNDING, nonnegative_norm
from groundwire_aol.operations import (
    BATCHNORMS,
    FACTS,
    INTERPOLATIONS,
    MAX_POOLS,
    NONNEGATIVE,
    NONNEGATIVE_LAYERS,
    PURE,
    hint,
)
from groundwire_aol.step import Proof, Step


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

    def layer(self, step: Step) -> nn.Module | None:
        """The layer that the step is, None for a function."""
        return self.module.get_submodule(str(step.node.target)) if step.is_layer else None

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
        except (IndexError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
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
            raise step.unknown(f"{type(layer).__name__} of several inputs has no rule", hint(type(layer).__name__))
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
            return of_linear(layer, x, self.squares.get(str(step.node.target)))
        name = type(layer).__name__
        raise step.unknown(f"{name} has no known Lipschitz constant (input of shape {tuple(x.shape)})", hint(name))

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
        rule = FUNCTION_RULES.get(name)
        if rule is not None:
            return rule(self, step)
        before = step.sole
        if before is not None and name in constants.FUNCTIONS:
            return Proof(before * constants.FUNCTIONS[name], "known constant")
        if before is not None and name in NONNEGATIVE:
            return self.nonnegative(step, before)
        raise step.unknown(f"{name} has no known Lipschitz constant here", hint(name))

    def nonnegative(self, step: Step, before: float) -> Proof:
        """Bound of a rearrangement or average, by the Schur test."""
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
