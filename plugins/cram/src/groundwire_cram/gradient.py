"""One step of CrAM: move the weights along their gradient, compress them there, take a second gradient, undo.

Everything happens in place and with one saved copy of the weights. Magnitude and N:M pruning run in a backend's fused
kernels, which store no mask; any other operator compresses the moved weights itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from groundwire_cram.functional import combine, perturb, published_rank
from groundwire_cram.interrupts import uninterrupted
from groundwire_cram.kernels import Kernels, Pattern
from groundwire_cram.memory import Copies
from groundwire_cram.operators import NM, Magnitude, Operator, apply_operator

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Move:
    """How one step moves and compresses.

    Attributes:
        operator: What compresses.
        groups: Names of the tensors that it compresses; those of one group together.
        rho: Length of the move in units of the gradient, or of its norm with ``grad_norm``.
        plus: Add the first gradient.
        sparse_grad: Let pruned entries get no gradient from the compressed model.
        grad_norm: Divide the move by the norm of the whole gradient.
    """

    operator: Operator
    groups: Sequence[Sequence[str]]
    rho: float = 0.05
    plus: bool = True
    sparse_grad: bool = True
    grad_norm: bool = False

    def scale(self, grads: Mapping[str, Tensor]) -> float:
        """What the gradient is multiplied with: rho, or rho / (its norm + 1e-12)."""
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
    buffers: Copies,
) -> Gradients | None:
    """The gradient of CrAM for one step; ``weights`` are afterwards as before.

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
        for names, pattern in parts:
            copies = _pick(spare, names)
            _perturb(kernels, _pick(weights, names), _pick(first, names), scale, pattern, copies)
            saved.update(zip(names, copies, strict=True))
    masks = {} if fused(move.operator) else _compress(weights, move)
    second = dict(second_pass())
    if move.sparse_grad:
        _mask(second, masks)
    with uninterrupted():
        for names, pattern in parts:
            moved, copies, ones = _pick(weights, names), _pick(saved, names), _pick(first, names)
            masking = pattern if move.sparse_grad else None
            kernels.combine(moved, copies, ones, [second.get(n) for n in names], scale, masking, plus=move.plus)
            for name in names:
                del saved[name]
    return {name: _where_unreached(second.get(name), one, move.plus) for name, one in first.items()}


def fused(operator: Operator) -> bool:
    """Whether the kernels can do what ``operator`` does."""
    return isinstance(operator, Magnitude | NM)


def _parts(
    weights: Mapping[str, Tensor], first: Mapping[str, Tensor], move: Move, scale: float, kernels: Kernels
) -> list[tuple[list[str], Pattern]] | None:
    """What each kernel call works on: names, and what it sets to zero. None if a moved weight is not finite."""
    groups = [[name for name in group if name in first] for group in move.groups]
    compressed = {name for group in groups for name in group}
    rest = [name for name in first if name not in compressed]
    parts: list[tuple[list[str], Pattern]] = []
    operator = move.operator
    if isinstance(operator, NM):
        undivided = operator.undivided(_of(weights, compressed))
        parts.append(([name for name in first if name in compressed and name not in undivided], operator.sizes))
        rest = [name for name in first if name in undivided or name not in compressed]
    elif isinstance(operator, Magnitude):
        if operator.scope == "layerwise":
            groups = [[name] for group in groups for name in group]
        for group in groups:
            rank = published_rank(sum(weights[name].numel() for name in group), operator.sparsity)
            ranks = [] if rank is None else [rank]
            selection = kernels.thresholds(_pick(weights, group), _pick(first, group), scale, ranks)
            if not selection.finite:
                return None
            parts.append((group, selection.values[0] if ranks else None))
    else:
        rest = list(first)
    return [*parts, (rest, None)]


def _perturb(
    kernels: Kernels,
    weights: list[Tensor],
    grads: list[Tensor],
    scale: float,
    pattern: Pattern,
    copies: list[Tensor],
) -> None:
    if isinstance(pattern, tuple):
        kernels.perturb_nm(weights, grads, scale, *pattern, copies)
    else:
        kernels.perturb(weights, grads, scale, pattern, copies)


def _compress(weights: Mapping[str, Tensor], move: Move) -> dict[str, Tensor]:
    """Masks of what an operator without a kernel left of the moved weights."""
    masks: dict[str, Tensor] = {}
    for group in move.groups:
        masks.update(apply_operator(_of(weights, group), move.operator))
    return masks


def _unfused(
    weights: Mapping[str, Tensor],
    first: Mapping[str, Tensor],
    second_pass: Callable[[], Mapping[str, Tensor]],
    move: Move,
    scale: float,
    saved: dict[str, Tensor],
) -> Gradients:
    """The same out of plain operations, for gradients that the kernels do not know: sparse or complex ones."""
    saved.update({name: weights[name].detach().clone() for name in first})
    perturb(_of(weights, first), first, scale)
    masks = _compress(_of(weights, first), move)
    second = second_pass()
    return combine(first, second, masks, plus=move.plus, sparse_grad=move.sparse_grad)


def _mask(grads: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        if name in grads:
            grads[name].masked_fill_(~mask, 0)


def _where_unreached(second: Tensor | None, first: Tensor, plus: bool) -> Tensor:
    """A weight that the second pass did not reach counts as having gradient zero there."""
    if second is not None:
        return second
    return first if plus else torch.zeros_like(first)


def _pick(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    return [tensors[name] for name in names]


def _of(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names if name in tensors}
