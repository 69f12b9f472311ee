"""An upper bound of a model's Lipschitz constant, proved step by step along its graph."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from groundwire_aol.certify.consistency import random_states, refuse_other_results
from groundwire_aol.certify.falsifier import search
from groundwire_aol.certify.graph import is_leaf, trace
from groundwire_aol.certify.linear_norms import rescales_in
from groundwire_aol.certify.plain_copy import evaluation_copy, remove_parametrizations, rows_of
from groundwire_aol.certify.propagation import LayerBound, Propagation
from groundwire_aol.certify.rounding import Rounding
from groundwire_aol.certify.weights import Weights
from groundwire_aol.errors import UnknownLipschitzError
from groundwire_aol.layers.parametrization import has_unit_rows


@dataclass(frozen=True)
class Head:
    """The last layer of a model, for certificates per pair of classes.

    Attributes:
        path: Its path.
        body: Lipschitz bound of the model up to its input.
        weight: As it is stored, (K, d).
    """

    path: str
    body: float
    weight: Tensor


@dataclass(frozen=True)
class Bound:
    """An upper bound of a model's Lipschitz constant in L2, from its input to its output, in evaluation.

    It holds weak references to the model and marks of its weights: :func:`certified_radius` refuses it once they
    changed. In a pickle, or without the model, it says "unchecked".

    Attributes:
        value: The bound; ``float(bound)`` is the same.
        layers: One :class:`LayerBound` per step, in order.
        input_shape: Shape of one sample for which it holds.
        rounding: How far the computed output can be from the one of exact arithmetic.
        upto: Path of the last layer, if ``value`` is of the model up to its input only.
        head: The last layer, with ``upto`` or if it is a :class:`groundwire_aol.NormalizedLinear`. Certificates are
            then per pair of classes.
        weights: The weights for which it was proved.
    """

    value: float
    layers: tuple[LayerBound, ...]
    input_shape: tuple[int, ...]
    rounding: Rounding = field(repr=False)
    upto: str = ""
    head: Head | None = field(default=None, repr=False, compare=False)
    weights: Weights = field(default_factory=Weights, repr=False, compare=False)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        rows = [
            f"  {b.path:<20} {b.operation:<14} {b.constant:9.6f}  {b.proof}"
            for b in self.layers
            if abs(b.constant - 1) > 1e-5
        ]
        part = f"up to {self.upto} " if self.upto else ""
        lines = [f"Lipschitz constant {part}<= {self.value:.9g} in L2, for inputs of shape {self.input_shape}", *rows]
        state = f"weights {self.weights.state()}"
        return "\n".join(
            [*lines, f"  and {len(self.layers) - len(rows)} steps with constant 1", str(self.rounding), state]
        )


def lipschitz_bound(
    module: nn.Module, example_input: Tensor, *, upto: str | None = None, falsify: bool = True, seed: int = 0
) -> Bound:
    """Prove an upper bound of the Lipschitz constant (L2) of ``module`` in evaluation mode.

    A baked copy is traced with torch.fx and walked in order: constants multiply along chains, add at sums, and are
    combined by the root of their squares at concatenations. AOL layers are proved again in float64 from the weights as
    they are rounded; other linear layers get their exact norm (singular values) where they are small enough, otherwise
    a proved upper bound; activations and pools their known constants.

    The bound is for exact arithmetic with these weights and inputs of this shape. What rounding does to the scores is
    bounded beside it, in ``bound.rounding``: :func:`certified_radius` takes it off with ``inputs=``. ``module`` is not
    changed.

    Args:
        module: A model whose ``forward`` takes one tensor. Its scores must be its output: no softmax.
        example_input: Shape (B, ...), floating; its shape and dtype matter, and the search begins there.
        upto: Path of the last layer, a Linear that gives the scores. The bound is then of the model up to its input: it
            is what ``certified_radius(last_layer=weight)`` takes.
        falsify: Whether to search for a contradiction before the bound is returned, see
            :func:`groundwire_aol.certify.falsifier.search`. It takes at most as long as the proof.
        seed: Of the search, and of the draws in which the model is compared with its graph. The states of all random
            generators on the CPU are afterwards what they were.

    Raises:
        UnknownLipschitzError: An operation without a known finite constant, with its path; or the model computes
            something else in another draw, batch or mode.
        UnsoundError: Weights that are not finite or below 32 bits, or an input that is no float tensor; or two inputs
            were found that contradict the bound.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        >>> _ = model[0].weight.data.copy_(3 * torch.eye(2))
        >>> round(float(lipschitz_bound(model, torch.zeros(1, 2))), 6)
        3.0
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), random_states(seed):
        started = time.perf_counter()
        example = rows_of(example_input).cpu()
        live = evaluation_copy(nn.Sequential(module) if is_leaf(module) else module)
        rescales = rescales_in(live)
        # Not every device has float64. The weights are baked where they live, so they are the ones that will be used.
        plain = remove_parametrizations(copy.deepcopy(live)).cpu()
        live = live.cpu()
        propagation = Propagation(plain, trace(plain), rescales)
        lipschitz = propagation.run(example.clone())
        refuse_other_results(live, plain, propagation.graph, example)
        rounding = propagation.rounding()
        if falsify:
            search(live, example, lipschitz, rounding, seed=seed, seconds=time.perf_counter() - started)
        head = _head(propagation, upto) if upto is not None else _normalized_head(propagation, live)
    value = lipschitz if head is None or upto is None else head.body
    shape, layers = tuple(example.shape[1:]), tuple(propagation.layers)
    return Bound(value, layers, shape, rounding, upto or "", head, Weights(module))


def _normalized_head(propagation: Propagation, live: nn.Module) -> Head | None:
    """Return the last layer, if its rows have length 1: then certificates are per pair of classes."""
    [output] = [n for n in propagation.graph.nodes if n.op == "output"]
    last = output.args[0]
    if not isinstance(last, fx.Node) or last.op != "call_module" or propagation.values[last].dim() != 2:
        return None
    path = str(last.target)
    return _head(propagation, path) if has_unit_rows(live.get_submodule(path)) else None


def _head(propagation: Propagation, path: str) -> Head:
    """Return the last layer.

    Raises:
        UnknownLipschitzError: It is no Linear layer whose output, and nothing else, is the model's.
    """
    calls = [n for n in propagation.graph.nodes if n.op == "call_module" and n.target == path]
    outputs = [n.args[0] for n in propagation.graph.nodes if n.op == "output"]
    layer = propagation.module.get_submodule(path) if calls else None
    if len(calls) != 1 or outputs != calls or not isinstance(layer, nn.Linear):
        last = outputs[0].target if isinstance(outputs[0], fx.Node) else "no single layer"
        raise UnknownLipschitzError(
            path, f"it is not the Linear layer that gives the model's scores ({last} gives them)", "name that layer"
        )
    features = calls[0].args[0]
    if propagation.values[features].dim() != 2 or features not in propagation.bounds:
        raise UnknownLipschitzError(path, "its input is not of shape (B, d)", "flatten it before")
    return Head(path, propagation.bounds[features], layer.weight.detach().double())
