"""An upper bound of a model's Lipschitz constant, proved step by step along its graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from groundwire_aol.errors import UnknownLipschitzError, UnsoundError
from groundwire_aol.functional import chosen_side, squared_scale
from groundwire_aol.parametrization import AOLParametrization, aol_of
from groundwire_aol.rules import Rules
from groundwire_aol.step import Proof, Step
from groundwire_aol.tracing import is_leaf, plain_copy, rows_of, trace


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


@dataclass(frozen=True)
class Bound:
    """An upper bound of a model's Lipschitz constant in L2, from its input to its output, in evaluation.

    Attributes:
        value: The bound; ``float(bound)`` is the same.
        layers: One :class:`LayerBound` per step, in order.
        input_shape: Shape of one sample for which it holds.
    """

    value: float
    layers: tuple[LayerBound, ...]
    input_shape: tuple[int, ...]

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        rows = [
            f"  {b.path:<20} {b.operation:<14} {b.constant:9.6f}  {b.proof}"
            for b in self.layers
            if abs(b.constant - 1) > 1e-5
        ]
        lines = [f"Lipschitz constant <= {self.value:.9g} in L2, for inputs of shape {self.input_shape}", *rows]
        return "\n".join([*lines, f"  and {len(self.layers) - len(rows)} steps with constant 1"])


def lipschitz_bound(module: nn.Module, example_input: Tensor) -> Bound:
    """Prove an upper bound of the Lipschitz constant (L2) of ``module`` in evaluation mode.

    A baked copy is traced with torch.fx and walked in order: constants multiply along chains, add at sums, and are
    combined by the root of their squares at concatenations. AOL layers are proved again in float64 from the weights as
    they are rounded; other linear layers get their exact norm (singular values) where they are small enough, otherwise
    a proved upper bound; activations and pools their known constants.

    The bound is for exact arithmetic with these weights and inputs of this shape. ``module`` is not changed.

    Args:
        module: A model whose ``forward`` takes one tensor. Its scores must be its output: no softmax.
        example_input: Shape (B, ...), floating; only its shape and dtype matter.

    Raises:
        UnknownLipschitzError: An operation without a known finite constant, with its path.
        UnsoundError: Weights that are not finite or below 32 bits, or an input that is no float tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _ = model[0].weight.data.copy_(3 * torch.eye(2))
        >>> round(float(lipschitz_bound(model, torch.zeros(1, 2))), 6)
        3.0
    """
    with torch.inference_mode(False):
        example = rows_of(example_input)
    module = nn.Sequential(module) if is_leaf(module) else module
    squares = _squared_scales(module)
    # Not every device has float64. The weights are baked where they live, so they are the ones that will be used.
    twin, example = plain_copy(module).cpu(), example.cpu()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        walk = _Walk(twin, trace(twin), squares)
        lipschitz = walk.through(example)
        _refuse_other_results(twin, example, walk.result)
    return Bound(lipschitz, tuple(walk.layers), tuple(example.shape[1:]))


def _squared_scales(module: nn.Module) -> dict[str, tuple[AOLParametrization, Tensor, Any]]:
    """What each AOL layer divided by, in float64 from its raw weight; that is what its proof needs."""
    found = {}
    for path, layer in module.named_modules():
        rule = aol_of(layer)
        if rule is None:
            continue
        chain = layer.parametrizations["weight"]
        if len(chain) > 1:
            continue  # Something else also changes the weight: the layer is bounded as a plain one.
        raw = chain.original.detach().cpu().double()
        side = "in" if rule.compat else chosen_side(raw, rule.geometry, rule.side)
        steps = 1 if rule.compat else rule.steps
        found[path] = rule, squared_scale(raw, rule.rescaled_geometry, steps=steps, side=side), (steps, side)
    return found


class _Walk:
    """One pass through the graph, with the values and the bounds of all steps."""

    def __init__(self, module: nn.Module, graph: fx.Graph, squares: dict[str, Any]) -> None:
        self.module, self.graph = module, graph
        self.rules = Rules(module, squares)
        self.values: dict[fx.Node, Any] = {}
        self.bounds: dict[fx.Node, float] = {}
        self.layers: list[LayerBound] = []
        self.result: Any = None

    def through(self, example: Tensor) -> float:
        """Bound of the output."""
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        if not inputs or any(not n.args for n in inputs[1:]):
            names = ", ".join(str(n.target) for n in inputs) or "nothing"
            raise UnknownLipschitzError(
                type(self.module).__name__, f"its forward takes {names}", "wrap it in a module that takes one tensor"
            )
        lipschitz = 0.0
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._input(node, inputs[0], example)
            elif node.op == "output":
                self.result = self._value(node.args[0])
                lipschitz = self._bound_of(node.args[0])
                self._refuse_odd_results()
            else:
                self._step(node)
        return lipschitz

    def _input(self, node: fx.Node, first: fx.Node, example: Tensor) -> None:
        self.values[node] = example if node is first else node.args[0]
        if node is first:
            self.bounds[node] = 1.0

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
        try:
            self.values[node] = self.rules.run(step)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise UnsoundError(
                f"{step.path}: the model cannot take an input of shape {self._shape()}: {error}"
            ) from error
        if proof is None:
            return
        self._record(step, proof, self.values[node])

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
        for tensor in _tensors(value):
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

    def _operation(self, step: Step) -> str:
        return type(self.module.get_submodule(step.path)).__name__ if step.is_layer else step.operation

    def _refuse_odd_results(self) -> None:
        for tensor in _tensors(self.result):
            if not tensor.is_floating_point():
                raise UnknownLipschitzError(
                    type(self.module).__name__, f"its output is {tensor.dtype}", "return the scores themselves"
                )
        if not list(_tensors(self.result)):
            raise UnknownLipschitzError(type(self.module).__name__, "its output holds no tensor", "return the scores")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [t for item in value for t in _tensors(item)]
        if isinstance(value, Sequence) and not isinstance(value, str)
        else []
    )


def _refuse_other_results(module: nn.Module, example: Tensor, walked: Any) -> None:
    """The graph must compute what the model computes, and each sample by itself."""
    probe = example + torch.linspace(0.0, 0.5, len(example), dtype=example.dtype, device=example.device).view(
        -1, *(1 for _ in example.shape[1:])
    )
    name = type(module).__name__
    try:
        again, together, alone = (_tensors(module(x.clone())) for x in (example, probe, probe[1:]))
    except Exception as error:
        raise UnknownLipschitzError(
            name, f"its forward fails outside the trace ({error})", "make it take any batch"
        ) from error
    if not _close(again, _tensors(walked)):
        raise UnknownLipschitzError(
            name, "its forward does not compute what was traced", "remove state and random numbers"
        )
    if not _close([t[1:] for t in together], alone):
        raise UnknownLipschitzError(
            name, "the result of a sample depends on its batch", "use no statistics of the batch"
        )


def _close(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Equal up to rounding, which is relative to the largest entry."""
    return len(ones) == len(others) and all(
        a.shape == b.shape and bool((a - b).abs().amax() <= 1e-4 * a.abs().amax())
        for a, b in zip(ones, others, strict=True)
    )
