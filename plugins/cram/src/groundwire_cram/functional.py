r"""The update rule of CrAM in pure torch.

CrAM minimises the loss of the compressed model, in a neighbourhood of radius rho:
``min_w max_{|d| <= rho} L(C(w + d))``. One step of CrAM+ with learning rate eta is

.. math:: w \leftarrow w - \eta\,[\nabla L(w) + \nabla L(C(w + \rho \nabla L(w)))]

and CrAM is the same without the first gradient. ``C`` keeps the entries of largest magnitude; in the Multi variant its
sparsity is drawn anew for every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_sparsity(sparsity: Any) -> float:
    """``sparsity`` as a float, if it is a number in [0, 1).

    Raises:
        ValueError: It is not; for a percentage, the fraction is suggested.

    Example:
        >>> check_sparsity(0.9)
        0.9
    """
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity < 1:
        hint = f"; did you mean {sparsity / 100:g}?" if number and 1 < sparsity < 100 else ""
        raise ValueError(f"sparsity must be a fraction in [0, 1), got {sparsity!r}{hint}")
    return float(sparsity)


def published_rank(n: int, sparsity: float) -> int | None:
    """Which smallest of ``n`` magnitudes is the published threshold, counted from 1; None if nothing is pruned.

    Example:
        >>> published_rank(10, 0.9), published_rank(10, 0.0)
        (10, None)
    """
    if check_sparsity(sparsity) == 0 or n == 0:
        return None
    return n - math.ceil(n * (1 - sparsity)) + 1


def published_threshold(tensors: Iterable[Tensor], sparsity: float) -> Tensor | None:
    """The magnitude below or at which the published rule prunes: the m-th largest, m = ceil(n * (1 - sparsity)).

    Args:
        tensors: All tensors that are pruned together, n entries in all.
        sparsity: Fraction in [0, 1).

    Returns:
        A scalar, or None if nothing is pruned (sparsity 0 or no entry).

    Example:
        >>> published_threshold([torch.tensor([1.0, -2.0, 3.0, -4.0])], 0.5)
        tensor(3.)
    """
    magnitudes = torch.cat([t.detach().abs().flatten() for t in tensors] or [torch.empty(0)])
    rank = published_rank(len(magnitudes), sparsity)
    return None if rank is None else magnitudes.kthvalue(rank).values


def published_masks(tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """What the published rule keeps: entries strictly above the common threshold. bool, shapes of ``tensors``.

    Without ties it keeps one entry fewer than ``n * (1 - sparsity)``, as the authors' code does.

    Example:
        >>> published_masks({"w": torch.tensor([[1.0, -2.0], [3.0, -4.0]])}, 0.5)["w"].tolist()
        [[False, False], [False, True]]
    """
    threshold = published_threshold(tensors.values(), sparsity)
    if threshold is None:
        return {name: torch.ones_like(t, dtype=torch.bool) for name, t in tensors.items()}
    return {name: t.detach().abs() > threshold for name, t in tensors.items()}


def exact_masks(tensors: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks with exactly floor(sparsity * n) False entries over all tensors; of equal magnitudes the first go first.

    Example:
        >>> exact_masks({"w": torch.ones(1, 4)}, 0.5)["w"].tolist()
        [[False, False, True, True]]
    """
    sizes = [t.numel() for t in tensors.values()]
    zeros = math.floor(check_sparsity(sparsity) * sum(sizes))
    magnitudes = torch.cat([t.detach().abs().flatten() for t in tensors.values()] or [torch.empty(0)])
    keep = torch.ones_like(magnitudes, dtype=torch.bool)
    if zeros:
        threshold = magnitudes.kthvalue(zeros).values
        ties = magnitudes == threshold
        below = magnitudes < threshold
        keep = ~(below | (ties & (ties.cumsum(0) <= zeros - below.sum())))
    parts = torch.split(keep, sizes)
    return {name: part.view_as(t) for part, (name, t) in zip(parts, tensors.items(), strict=True)}


def perturb(weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], rho: float) -> None:
    """``w + rho * g`` in place for every weight. The product is rounded before the sum, as in the published code."""
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
    """The step's gradient from that of the model and that of the compressed model.

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
