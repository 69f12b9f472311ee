"""Propagation of bounds along a traced graph, from the input to the output: of distances, and of rounding.

Next to each Lipschitz bound L go the size of the exact value, ``||v(x)|| <= ||v(0)|| + L ||x||``, and the error of the
computed one. A call multiplies the errors of its inputs by its own constant and adds its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from groundwire_aol.certify.batch_size import BatchSize
from groundwire_aol.certify.call import Call, Proof, floats_in
from groundwire_aol.certify.graph import tensors_of
from groundwire_aol.certify.linear_norms import Rescale
from groundwire_aol.certify.operations import (
    CONSTANTS_LIKE,
    FACTS,
    FUNCTIONS,
    PURE,
    Operation,
    hint,
    is_known_function,
    operation_of_layer,
)
from groundwire_aol.certify.rounding import Rounding
from groundwire_aol.certify.rounding_rules import UNITS, Affine, Magnitudes, exact, smallest_normal, unit_of
from groundwire_aol.errors import UnknownLipschitzError, UnsoundError

#: Covers the rounding of the float64 arithmetic here.
_UP = 1 + 1e-9


@dataclass(frozen=True)
class LayerBound:
    """One step of a proof: what a call adds to the bound.

    Attributes:
        path: Name of the layer, or of the traced operation.
        operation: What it is.
        constant: Its own Lipschitz constant (L2); for a sum or concatenation the result's relative to its largest
            input.
        lipschitz: Bound from the model's input to this step's output.
        proof: How the constant was proved.
    """

    path: str
    operation: str
    constant: float
    lipschitz: float
    proof: str


class Propagation:
    """One pass through the graph, with the values and the bounds of all nodes.

    Args:
        module: The module that was traced, with plain weights.
        graph: Its graph.
        rescales: By path, how the weight of each AOL layer was made.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, rescales: Mapping[str, Rescale]) -> None:
        self.module, self.graph, self.rescales = module, graph, rescales
        self.values: dict[fx.Node, Any] = {}
        self.bounds: dict[fx.Node, float] = {}
        self.layers: list[LayerBound] = []
        self.errors: RoundingErrors | None = None
        self.batch_size = BatchSize()
        self.outputs: list[fx.Node] = []

    def run(self, example: Tensor) -> float:
        """Return the bound of the output.

        Raises:
            UnknownLipschitzError: There is no rule for an operation, or none for these shapes.
            UnsoundError: The model cannot take the input, or has weights without a bound.
        """
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        name = type(self.module).__name__
        _refuse_odd_arguments(name, inputs)
        self.errors = RoundingErrors(example.dtype)
        lipschitz = 0.0
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = example if node is inputs[0] else node.args[0]
            elif node.op == "output":
                _refuse_odd_results(name, self._value(node.args[0]))
                self.outputs = list(node.all_input_nodes)
                lipschitz = self._bound_of_outputs(node.args[0])
            else:
                self._call(node)
            if node is inputs[0]:
                self.bounds[node] = 1.0
                self.errors.start(node)
        return lipschitz

    def rounding(self) -> Rounding:
        """Return the bound of the output's rounding, once it was reached."""
        assert self.errors is not None
        return self.errors.result(self.outputs)

    def _value(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: self.values[n])

    def _bound_of_outputs(self, argument: Any) -> float:
        """Return the bound of several tensors together: the root of the sum of squares."""
        found: list[float] = []
        fx.node.map_arg(argument, lambda n: found.append(self.bounds.get(n, 0.0)))
        return found[0] if len(found) == 1 else math.hypot(*found)

    def _call(self, node: fx.Node) -> None:
        bounds = {n: self.bounds[n] for n in node.all_input_nodes if n in self.bounds}
        layer = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        args, kwargs = self._value(node.args), self._value(node.kwargs)
        call = Call(node, self.module, args, kwargs, bounds, self.rescales, layer)
        operation = _operation_of(call)
        proof = proof_of(call, operation)
        self.batch_size.follow(call, operation)
        before = self._versions(node)
        try:
            value = self.values[node] = call.run()
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise UnsoundError(
                f"{call.path}: the model cannot take an input of shape {self._input_shape()}: {error}"
            ) from error
        written = [n for n, version in self._versions(node) if (n, version) not in before]
        self._refuse_stale_reads(call, operation, written)
        if operation is None or proof is None:
            return
        operation.shape(call, value)
        self._record(call, operation, proof, value)

    def _versions(self, node: fx.Node) -> list[tuple[fx.Node, tuple[int, ...]]]:
        """Count the writes into each input. Torch itself refuses writes into tensors of inference mode."""
        tensors = {n: tensors_of(self.values[n]) for n in node.all_input_nodes}
        return [(n, tuple(t._version for t in found if not t.is_inference())) for n, found in tensors.items()]

    def _refuse_stale_reads(self, call: Call, operation: Operation | None, written: list[fx.Node]) -> None:
        """Refuse reads, after a call wrote into a tensor, of what was bounded before, or of what it is a view of.

        An operation that only moves and compares is no reason: what it wrote is bounded by what was there.
        """
        way_out = "write x = x + y instead of x += y, and use the results of in-place functions"
        if any(n not in self.bounds for n in written):
            raise call.unknown("it changes a constant in place", way_out)
        if not written or (operation is not None and operation.rounding is exact):
            return
        places = {t.untyped_storage().data_ptr() for n in written for t in tensors_of(self.values[n])}
        for node, value in self.values.items():
            later = [user for user in node.users if user is not call.node and user not in self.values]
            shares = any(t.untyped_storage().data_ptr() in places for t in tensors_of(value))
            if node is not call.node and later and shares:
                raise call.unknown(
                    f"it changes a tensor in place that {later[0].name} reads again as {node.name}", way_out
                )

    def _input_shape(self) -> tuple[int, ...]:
        first = next(n for n in self.graph.nodes if n.op == "placeholder")
        return tuple(self.values[first].shape[1:])

    def _record(self, call: Call, operation: Operation, proof: Proof, value: Any) -> None:
        if not math.isfinite(proof.lipschitz):
            raise UnsoundError(f"{call.path}: its constant is {proof.lipschitz} -> check its weights")
        self.bounds[call.node] = proof.lipschitz
        constant = _own_constant(call, proof)
        self.layers.append(LayerBound(call.path, call.name, constant, proof.lipschitz, proof.how))
        for tensor in tensors_of(value):
            if tensor.dim() < 1 or tensor.shape[0] != 2:
                raise call.unknown(
                    f"its result of shape {tuple(tensor.shape)} has no row per sample", "keep the batch first"
                )
            if tensor.is_floating_point() and tensor.dtype in (torch.float16, torch.bfloat16):
                raise UnsoundError(
                    f"{call.path} computes in {tensor.dtype}, for which nothing is proved -> use float32"
                )
        assert self.errors is not None
        self.errors.follow(call, operation, proof, value)


def _operation_of(call: Call) -> Operation | None:
    if call.layer is not None:
        return operation_of_layer(call.layer)
    return FUNCTIONS.get(call.name) if call.node.op in ("call_function", "call_method") else None


def proof_of(call: Call, operation: Operation | None) -> Proof | None:
    """Return the bound of a call's result; None if it does not depend on the input.

    Raises:
        UnknownLipschitzError: There is no rule.
    """
    if call.node.op == "get_attr":
        return None
    if call.kwargs.get("out") is not None:
        raise call.unknown("out= writes into another tensor", "use the result")
    if call.layer is None and not is_known_function(call.node.target):
        raise call.unknown(f"{call.name} is no function of torch", "call torch functions, or put it into a module")
    if not call.bounds:
        _refuse_impure(call, operation)
        return None
    if call.layer is None and (call.name in FACTS or call.name in CONSTANTS_LIKE):
        return None
    if operation is None:
        shape = f" (input of shape {tuple(call.x.shape)})" if isinstance(call.x, Tensor) else ""
        raise call.unknown(f"{call.name} has no known Lipschitz constant{shape}", hint(call.name))
    try:
        return operation.lipschitz(call)
    except UnknownLipschitzError:
        raise
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise call.unknown(f"{call.name} is called in a way that has no rule ({error})") from error


def _refuse_impure(call: Call, operation: Operation | None) -> None:
    """Raise for a call that does not depend on the input and may still give another result each time."""
    if call.layer is not None:
        raise call.unknown("a layer is applied to a constant", "compute it once and register it as a buffer")
    deterministic = operation is not None and "dropout" not in operation.functions
    if not (deterministic or call.node.target is getattr or call.name in PURE or call.name in FACTS):
        raise call.unknown(f"{call.name} may give another result on every call", "register a buffer instead")


def _own_constant(call: Call, proof: Proof) -> float:
    largest = max(call.bounds.values(), default=0.0)
    return proof.lipschitz / largest if largest else 0.0


class RoundingErrors:
    """Sizes and errors of all nodes so far, as functions of the input's norm.

    Args:
        dtype: Of the model.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sizes: dict[fx.Node, Affine] = {}
        self.errors: dict[fx.Node, Affine] = {}
        self.peak = Affine(0.0, 1.0)
        self.unknown = "" if dtype in UNITS else f"{dtype} is not float32 or float64"

    def start(self, node: fx.Node) -> None:
        """Add the model's input, which is exact."""
        self.sizes[node], self.errors[node] = Affine(0.0, 1.0), Affine()

    def follow(self, call: Call, operation: Operation, proof: Proof, value: Any) -> None:
        """Add a call that depends on the input. The second row of ``value`` is of the input zero."""
        if self.unknown:
            return
        unit = unit_of(value, self.dtype)
        rows = floats_in(value)
        computed = {n: self.sizes[n] + self.errors[n] for n in call.bounds}
        carried = self._through(call, operation, proof, self.errors)
        zero = math.hypot(*(float(t[1].double().norm()) for t in rows))
        magnitudes = Magnitudes(
            call,
            value,
            unit,
            inputs=sum(computed.values(), Affine()),
            reached=self._through(call, operation, proof, computed),
            size=Affine(zero, proof.lipschitz) + carried,
        )
        own = operation.rounding(magnitudes) if math.isfinite(unit) else None
        if own is None:
            self.unknown = f"{call.path} ({call.name}) has no rule for its rounding"
            return
        entries = sum(t[0].numel() for t in rows)
        floor = 16 * smallest_normal(self.dtype) * math.sqrt(max(entries, 1)) * (1 + _own_constant(call, proof))
        # ``size`` counts the zero row as computed, not as it is: the factor makes up for that.
        error = (carried + own + Affine(floor)) * ((1 + 8 * unit) * _UP)
        self.errors[call.node] = error
        self.sizes[call.node] = Affine(zero + error.offset, proof.lipschitz)
        self.peak = self.peak.largest(self.sizes[call.node] + error * (1 / unit))

    def _through(self, call: Call, operation: Operation, proof: Proof, table: Mapping[fx.Node, Affine]) -> Affine:
        """Return the call's bound for inputs of these norms: rules are norms of what they are given."""
        nodes = list(call.bounds)
        if len(nodes) == 1 and call.bounds[nodes[0]] > 0:
            return table[nodes[0]] * (proof.lipschitz / call.bounds[nodes[0]])
        offset, slope = (
            operation.lipschitz(replace(call, bounds={n: getattr(table[n], part) for n in nodes})).lipschitz
            for part in ("offset", "slope")
        )
        return Affine(offset, slope)

    def result(self, nodes: list[fx.Node]) -> Rounding:
        """Return the bound of the output, made of these nodes."""
        found = [self.errors[n] for n in nodes if n in self.errors]
        total = Affine(math.hypot(*(e.offset for e in found)), math.hypot(*(e.slope for e in found)))
        finite = math.isfinite(total.offset) and math.isfinite(total.slope)
        unknown = self.unknown or ("" if finite else "a sum of products is too long for this dtype")
        return Rounding(total.offset, total.slope, (self.peak.offset, self.peak.slope), self.dtype, unknown)


def _refuse_odd_arguments(name: str, inputs: list[fx.Node]) -> None:
    if not inputs or any(not n.args for n in inputs[1:]):
        names = ", ".join(str(n.target) for n in inputs) or "nothing"
        raise UnknownLipschitzError(name, f"its forward takes {names}", "wrap it in a module that takes one tensor")
    for node in inputs[1:]:
        if node.users:
            raise UnknownLipschitzError(
                name,
                f"its forward computes with its argument {node.target}, of which another call may give another value",
                "set it in __init__, or wrap the model in a module that always passes the same value",
            )


def _refuse_odd_results(name: str, result: Any) -> None:
    found = tensors_of(result)
    for tensor in found:
        if not tensor.is_floating_point():
            raise UnknownLipschitzError(name, f"its output is {tensor.dtype}", "return the scores themselves")
    if not found:
        raise UnknownLipschitzError(name, "its output holds no tensor", "return the scores")
