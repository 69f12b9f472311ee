r"""The update rule of CrAM: move the weights along their gradient, compress them there, take a second gradient, undo.

CrAM minimises the loss of the compressed model, in a neighbourhood of radius rho:
``min_w max_{|d| <= rho} L(C(w + d))``. One step of CrAM+ with learning rate eta is

.. math:: w \leftarrow w - \eta\,[\nabla L(w) + \nabla L(C(w + \rho \nabla L(w)))]

and CrAM is the same without the first gradient. ``C`` keeps the entries of largest magnitude; in the Multi variant its
sparsity is drawn anew for every step. The sum in brackets is :func:`compression_aware_gradient`; the optimizer's step
is the optimizer's.

Everything happens in place and with one saved copy of the weights. Magnitude and N:M pruning run in a backend's fused
kernels, which store no mask; any other operator compresses the moved weights itself.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from groundwire_cram.kernels.base import Kernels, Part, Pattern
from groundwire_cram.kernels.buffers import Buffers
from groundwire_cram.operators import NM, Layout, Magnitude, Operator, Weights, apply_operator
from groundwire_cram.threshold import published_rank

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Move:
    """Plan of one step: how it moves and compresses.

    Attributes:
        operator: What compresses.
        groups: Names of the tensors that it compresses; those of one group together.
        rho: Length of the move in units of the gradient, or of its norm with ``grad_norm``.
        plus: Add the first gradient.
        sparse_grad: Let pruned entries get no gradient from the compressed model.
        grad_norm: Divide the move by the norm of the whole gradient.
        layouts: Of weights whose inputs are not dimension 1.
        published: Whether N:M follows the published rule.
    """

    operator: Operator
    groups: Sequence[Sequence[str]]
    rho: float = 0.05
    plus: bool = True
    sparse_grad: bool = True
    grad_norm: bool = False
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    published: bool = False

    def weights(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> Weights:
        """Return those of ``names`` that there are, as operators want them."""
        return Weights({name: tensors[name] for name in names if name in tensors}, self.layouts, self.published)

    def scale(self, grads: Mapping[str, Tensor]) -> float:
        """Return what the gradient is multiplied with: rho, or rho / (its norm + 1e-12)."""
        if not self.grad_norm:
            return self.rho
        values = [g.coalesce().values() if g.is_sparse else g for g in grads.values()]
        return self.rho / (float(get_total_norm(values)) + 1e-12)


def compression_aware_gradient(
    weights: Mapping[str, Tensor],
    first: Mapping[str, Tensor],
    second_pass: Callable[[], Mapping[str, Tensor]],
    move: Move,
    kernels: Kernels,
    saved: dict[str, Tensor],
    buffers: Buffers,
) -> Gradients | None:
    """Return the gradient of CrAM for one step; ``weights`` are afterwards as before.

    Args:
        weights: By name; changed in place while ``second_pass`` runs.
        first: The gradient at ``weights``, for each of them.
        second_pass: Gives the gradient at the weights as they are when it is called; it is overwritten.
        move: What to do.
        kernels: The backend.
        saved: Empty. Holds the copy of each weight that is changed, from which an outer guard restores after an
            exception.
        buffers: Memory for those copies, kept from step to step.

    Returns:
        By name, or None if a moved weight is not a finite number: then nothing was changed.
    """
    scale = move.scale(first)
    if any(g.is_sparse or g.is_complex() for g in first.values()):
        return _unfused(weights, first, second_pass, move, scale, saved)
    parts = _parts(weights, first, move, scale, kernels)
    if parts is None:
        return None
    spare = buffers.like({name: weights[name] for name in first})
    with uninterrupted():
        for names, part, pattern in parts:
            kernels.perturb(part, pattern, _oriented(spare, names, move))
            saved.update({name: spare[name] for name in names})
    masks = {} if isinstance(move.operator, Magnitude | NM) else _compress(weights, move)
    second = dict(second_pass())
    if move.sparse_grad:
        for name in masks.keys() & second.keys():
            second[name].masked_fill_(~masks[name], 0)
    with uninterrupted():
        for names, part, pattern in parts:
            copies, seconds = _oriented(saved, names, move), _oriented(second, names, move)
            kernels.combine(part, pattern if move.sparse_grad else None, copies, seconds, plus=move.plus)
            for name in names:
                del saved[name]
    # A weight that the second pass did not reach counts as having gradient zero there.
    reached = {name: second.get(name) for name in first}
    return {
        name: two if two is not None else first[name] if move.plus else torch.zeros_like(first[name])
        for name, two in reached.items()
    }


def _parts(
    weights: Mapping[str, Tensor], first: Mapping[str, Tensor], move: Move, scale: float, kernels: Kernels
) -> list[tuple[list[str], Part, Pattern]] | None:
    """Return what each kernel call works on and sets to zero; None if a moved weight is not finite."""

    def part(names: Sequence[str]) -> Part:
        return Part(_oriented(weights, names, move), _oriented(first, names, move), scale)

    operator = move.operator
    groups = [[name for name in group if name in first] for group in move.groups]
    patterns: list[tuple[list[str], Pattern]] = []
    if isinstance(operator, NM):
        compressed = [name for group in groups for name in group]
        undivided = operator.undivided(move.weights(weights, compressed))
        patterns.append(([name for name in compressed if name not in undivided], operator.sizes))
    elif isinstance(operator, Magnitude):
        if operator.scope == "layerwise":
            groups = [[name] for group in groups for name in group]
        for group in groups:
            rank = published_rank(sum(weights[name].numel() for name in group), operator.sparsity)
            found = kernels.thresholds(part(group), [] if rank is None else [rank])
            if not found.finite:
                return None
            patterns.append((group, found.values[0] if found.values else None))
    masked = {name for names, _ in patterns for name in names}
    patterns.append(([name for name in first if name not in masked], None))
    return [(names, part(names), pattern) for names, pattern in patterns]


def _oriented(tensors: Mapping[str, Tensor], names: Sequence[str], move: Move) -> list[Any]:
    """Return views in which dimension 1 are the inputs, as N:M counts them; None for what is not there."""
    found = [(name, tensors.get(name)) for name in names]
    if not isinstance(move.operator, NM) or not move.layouts:
        return [tensor for _, tensor in found]
    return [t if t is None or name not in move.layouts else move.layouts[name].inputs_second(t) for name, t in found]


def _compress(weights: Mapping[str, Tensor], move: Move) -> dict[str, Tensor]:
    """Compress moved weights by an operator without a kernel; return its masks."""
    masks: dict[str, Tensor] = {}
    for group in move.groups:
        masks.update(apply_operator(move.weights(weights, group), move.operator))
    return masks


def _unfused(
    weights: Mapping[str, Tensor],
    first: Mapping[str, Tensor],
    second_pass: Callable[[], Mapping[str, Tensor]],
    move: Move,
    scale: float,
    saved: dict[str, Tensor],
) -> Gradients:
    """Do the same out of plain operations, for gradients that the kernels do not know: sparse or complex ones."""
    reached = {name: weights[name] for name in first}
    saved.update({name: weight.detach().clone() for name, weight in reached.items()})
    perturb(reached, first, scale)
    masks = _compress(reached, move)
    return combine(first, second_pass(), masks, plus=move.plus, sparse_grad=move.sparse_grad)


def perturb(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], rho: float) -> None:
    """Set ``w <- w + rho * g`` for every weight. The product is rounded before the sum, as in the published code."""
    for name, weight in weights.items():
        weight.add_(grads[name] * rho)


def combine(
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    plus: bool,
    sparse_grad: bool,
) -> dict[str, Tensor]:
    """Return the step's gradient from that of the model and that of the compressed model.

    ``sparse_grad`` keeps only the entries of the second gradient that the compressed model had; ``plus`` adds the
    first gradient. A weight that the second pass did not reach counts as having gradient zero there.

    Example:
        >>> first, second = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([2.0, 2.0])}
        >>> masks = {"w": torch.tensor([True, False])}
        >>> combine(first, second, masks, plus=True, sparse_grad=True)["w"]
        tensor([3., 1.])
    """
    result = {}
    for name, one in first.items():
        two = second.get(name)
        if two is None:
            two = torch.zeros_like(one)
        elif sparse_grad and name in masks:
            two = two * masks[name] if two.is_sparse else two.masked_fill(~masks[name], 0)
        result[name] = two + one if plus else two
    return result


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Context manager that delivers SIGINT (Ctrl-C) when it ends.

    A kernel that stops half-way through the weights leaves some that could not be restored. Only the main thread gets
    the signal, so in others there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        # None stands for a handler that was not set from Python, which cannot be put back through this module.
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
        if waiting and callable(before):
            before(*waiting[0])
