"""The walk along a traced graph: bounds of every step, and of its rounding, from those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from groundwire_aol.errors import UnknownLipschitzError, UnsoundError
from groundwire_aol.rounding import Rounding, RoundingWalk
from groundwire_aol.rounding_rules import is_exact
from groundwire_aol.rules import Rules
from groundwire_aol.step import Proof, Step
from groundwire_aol.tracing import tensors_of


@dataclass(frozen=True)
class LayerBound:
    """What one step of the graph adds to the bound.

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


class Walk:
    """One pass through the graph, with the values and the bounds of all steps."""

    def __init__(self, module: nn.Module, graph: fx.Graph, squares: dict[str, Any]) -> None:
        self.module, self.graph = module, graph
        self.rules = Rules(module, squares)
        self.values: dict[fx.Node, Any] = {}
        self.bounds: dict[fx.Node, float] = {}
        self.layers: list[LayerBound] = []
        self.result: Any = None
        self.outputs: list[fx.Node] = []
        self._rounding: RoundingWalk | None = None

    def through(self, example: Tensor) -> float:
        """Bound of the output."""
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        if not inputs or any(not n.args for n in inputs[1:]):
            names = ", ".join(str(n.target) for n in inputs) or "nothing"
            raise UnknownLipschitzError(
                type(self.module).__name__, f"its forward takes {names}", "wrap it in a module that takes one tensor"
            )
        self._rounding = RoundingWalk(self.rules, example.dtype)
        lipschitz = 0.0
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._input(node, inputs[0], example)
            elif node.op == "output":
                self.result = self._value(node.args[0])
                self.outputs = list(node.all_input_nodes)
                lipschitz = self._bound_of(node.args[0])
                self._refuse_odd_results()
            else:
                self._step(node)
        return lipschitz

    def _input(self, node: fx.Node, first: fx.Node, example: Tensor) -> None:
        self.values[node] = example if node is first else node.args[0]
        if node is first:
            self.bounds[node] = 1.0
            self._errors.start(node)

    @property
    def _errors(self) -> RoundingWalk:
        assert self._rounding is not None
        return self._rounding

    def rounding(self) -> Rounding:
        """Of the output, once it was reached."""
        return self._errors.result(self.outputs)

    def _value(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: self.values[n])

    def _bound_of(self, argument: Any) -> float:
        """Of several tensors together: the root of the sum of squares."""
        found: list[float] = []
        fx.node.map_arg(argument, lambda n: found.append(self.bounds.get(n, 0.0)))
        return found[0] if len(found) == 1 else math.hypot(*found)

    def _step(self, node: fx.Node) -> None:
        inputs: list[fx.Node] = [n for n in node.all_input_nodes if n in self.bounds]
        step = Step(
            node,
            self._value(node.args),
            self._value(node.kwargs),
            tuple(node.args),
            dict(node.kwargs),
            {n: self.bounds[n] for n in inputs},
            self.values,
        )
        proof = self.rules.of(step)
        before = self._versions(node)
        try:
            self.values[node] = self.rules.run(step)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise UnsoundError(
                f"{step.path}: the model cannot take an input of shape {self._shape()}: {error}"
            ) from error
        self._refuse_old_readers(step, [n for n, version in self._versions(node) if (n, version) not in before])
        if proof is None:
            return
        self._record(step, proof, self.values[node])

    def _versions(self, node: fx.Node) -> list[tuple[fx.Node, tuple[int, ...]]]:
        """How often was written into each input. Torch itself refuses writes into tensors of inference mode."""
        tensors = {n: tensors_of(self.values[n]) for n in node.all_input_nodes}
        return [(n, tuple(t._version for t in found if not t.is_inference())) for n, found in tensors.items()]

    def _refuse_old_readers(self, step: Step, written: list[fx.Node]) -> None:
        """What was bounded before a step wrote into it, or into what it is a view of, must not be read after that."""
        hint = "write x = x + y instead of x += y, and use the results of in-place functions"
        if any(n not in self.bounds for n in written):
            raise step.unknown("it changes a constant in place", hint)
        if not written or is_exact(step.operation, self.rules.layer(step)):
            return
        places = {t.untyped_storage().data_ptr() for n in written for t in tensors_of(self.values[n])}
        for node, value in self.values.items():
            later = [user for user in node.users if user is not step.node and user not in self.values]
            shares = any(t.untyped_storage().data_ptr() in places for t in tensors_of(value))
            if node is not step.node and later and shares:
                raise step.unknown(
                    f"it changes a tensor in place that {later[0].name} reads again as {node.name}", hint
                )

    def _shape(self) -> tuple[int, ...]:
        first = next(n for n in self.graph.nodes if n.op == "placeholder")
        return tuple(self.values[first].shape[1:])

    def _record(self, step: Step, proof: Proof, value: Any) -> None:
        largest = max(step.bounds.values(), default=0.0)
        if not math.isfinite(proof.lipschitz):
            raise UnsoundError(f"{step.path}: its constant is {proof.lipschitz} -> check its weights")
        self.bounds[step.node] = proof.lipschitz
        constant = proof.lipschitz / largest if largest else 0.0
        self.layers.append(LayerBound(step.path, self._operation(step), constant, proof.lipschitz, proof.how))
        for tensor in tensors_of(value):
            if tensor.dim() < 1 or tensor.shape[0] != 2:
                raise UnknownLipschitzError(
                    step.path,
                    f"its result of shape {tuple(tensor.shape)} has no row per sample",
                    "keep the batch first",
                )
            if tensor.is_floating_point() and tensor.dtype in (torch.float16, torch.bfloat16):
                raise UnsoundError(
                    f"{step.path} computes in {tensor.dtype}, for which nothing is proved -> use float32"
                )
        self._errors.follow(step, proof, value)

    def _operation(self, step: Step) -> str:
        return type(self.module.get_submodule(step.path)).__name__ if step.is_layer else step.operation

    def _refuse_odd_results(self) -> None:
        for tensor in tensors_of(self.result):
            if not tensor.is_floating_point():
                raise UnknownLipschitzError(
                    type(self.module).__name__, f"its output is {tensor.dtype}", "return the scores themselves"
                )
        if not list(tensors_of(self.result)):
            raise UnknownLipschitzError(type(self.module).__name__, "its output holds no tensor", "return the scores")
