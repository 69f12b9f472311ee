"""A batch of small fitting problems, and the products that a solver needs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from groundwire_flea.sides import Side

#: The published code smooths |r| as r^2 / sqrt(r^2 + SMOOTH).
SMOOTH = 1e-8


@dataclass(frozen=True)
class Point:
    """Where P problems are.

    Attributes:
        theta: (P, D).
        scores: X theta, (P, m) for each side.
        p: Their sigmoids.
        value: F (P,).
        gap: r (P,).
    """

    theta: Tensor
    scores: Sequence[Tensor]
    p: Sequence[Tensor]
    value: Tensor
    gap: Tensor

    def take(self, index: Tensor) -> Point:
        """The problems ``index``."""
        scores, p = ([part[index] for part in parts] for parts in (self.scores, self.p))
        return Point(self.theta[index], scores, p, self.value[index], self.gap[index])

    def put(self, index: Tensor, other: Point) -> None:
        """Move the problems ``index`` to another point."""
        mine, new = ((*point.scores, *point.p, point.theta, point.value, point.gap) for point in (self, other))
        for old, part in zip(mine, new, strict=True):
            old[index] = part


class Problems:
    r"""P problems over theta (D,), float64; see :func:`groundwire_flea.minimise.minimise` for the objective.

    Of a disparity's two sides one has the entropy and the other one the gap, so each side has only what it needs.
    With labels t in {0, 1}, the entropy is ``sum u softplus(x theta) - theta . (x' (u t))``, and its second term is
    linear: labels are needed once.

    Args:
        sides: Where the rows are; the rows of all sides together are the M rows of a problem.
        t: (P, M), labels 0 or 1.
        u: (P, M), weights of the cross-entropy.
        v: (P, M), weights of the gap.
        ridge: (P, D), weights of the squares.
    """

    def __init__(self, sides: Sequence[Side], t: Tensor, u: Tensor, v: Tensor, ridge: Tensor) -> None:
        widths = [side.x.shape[1] for side in sides]
        self.sides, self.ridge = list(sides), ridge
        self.u, self.v = (_split(weights, widths) for weights in (u, v))
        self.toward = torch.zeros_like(ridge)
        for side, part, label in zip(sides, self.u, torch.split(t, widths, dim=1), strict=True):
            if part is not None:
                self.toward = self.toward + side.pull(part * label)

    def take(self, index: Tensor) -> Problems:
        """The problems ``index``."""
        taken = Problems.__new__(Problems)
        taken.sides = [side.take(index) for side in self.sides]
        taken.u, taken.v = (_taken(parts, index) for parts in (self.u, self.v))
        taken.toward, taken.ridge = self.toward[index], self.ridge[index]
        return taken

    def scores(self, theta: Tensor) -> list[Tensor]:
        """X theta, (P, m) for each side."""
        return [side.scores(theta) for side in self.sides]

    def at(self, theta: Tensor, scores: Sequence[Tensor], index: Tensor | None = None) -> Point:
        """The problems at ``theta`` (P, D).

        Args:
            theta: Where.
            scores: X theta of each side.
            index: Which problems these are; all when left out.
        """
        u, v, ridge, toward = self.u, self.v, self.ridge, self.toward
        if index is not None:
            u, v, ridge, toward = _taken(u, index), _taken(v, index), ridge[index], toward[index]
        p = [score.sigmoid() for score in scores]
        value = dot(theta, ridge * theta) / 2 - dot(theta, toward)
        for part, score in zip(u, scores, strict=True):
            value = value if part is None else value + dot(part, softplus(score))
        gap = torch.zeros_like(value)
        for part, rate in zip(v, p, strict=True):
            gap = gap if part is None else gap + dot(part, rate)
        square = gap.square()
        return Point(theta, scores, p, value + square / (square + SMOOTH).sqrt(), gap)

    def gradients(self, here: Point) -> Tensor:
        """Gradients of the convex part and of r, next to each other: (P, D, 2)."""
        smooth, gap = self.ridge * here.theta - self.toward, torch.zeros_like(here.theta)
        for side, u, v, rate in zip(self.sides, self.u, self.v, here.p, strict=True):
            smooth = smooth if u is None else smooth + side.pull(u * rate)
            gap = gap if v is None else gap + side.pull((v * rate).mul_(1 - rate))
        return torch.stack([smooth, gap], dim=-1)

    def hessian(self, p: Sequence[Tensor], multiplier: Tensor) -> Tensor:
        """Of the convex part plus ``multiplier`` (P,) times r: (P, D, D)."""
        gram = torch.diag_embed(self.ridge)
        for side, u, v, rate in zip(self.sides, self.u, self.v, p, strict=True):
            slope = rate * (1 - rate)
            weights = None if u is None else u * slope
            if v is not None and bool(multiplier.any()):
                bent = (multiplier.unsqueeze(-1) * v).mul_(slope).mul_(1 - 2 * rate)
                weights = bent if weights is None else weights + bent
            gram = gram if weights is None else gram + side.gram(weights)
        return gram

    def convex_hessian(self, p: Sequence[Tensor], index: Tensor) -> Tensor:
        """Of the convex part, for the problems ``index``."""
        gram = torch.diag_embed(self.ridge.index_select(0, index))
        for side, u, rate in zip(self.sides, _taken(self.u, index), p, strict=True):
            if u is not None:
                rate = rate.index_select(0, index)
                gram = gram + side.take(index).gram(u * (rate * (1 - rate)))
        return gram

    def start_hessian(self) -> Tensor:
        """That of the convex part at zero, from one product for each source: (P, D, D)."""
        gram = torch.diag_embed(self.ridge)
        for side, u in zip(self.sides, self.u, strict=True):
            gram = gram if u is None else gram + side.shared_gram(u / 4)
        return gram


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the rows of two (P, M): (P,).

    Example:
        >>> dot(torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]]))
        tensor([6., 1.])
    """
    return torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).flatten()


def _split(weights: Tensor, widths: Sequence[int]) -> list[Tensor | None]:
    """(P, M) by sides; None where all weights are 0."""
    return [part.contiguous() if bool(part.any()) else None for part in torch.split(weights, list(widths), dim=1)]


def _taken(parts: Sequence[Tensor | None], index: Tensor) -> list[Tensor | None]:
    return [None if part is None else part.index_select(0, index) for part in parts]
