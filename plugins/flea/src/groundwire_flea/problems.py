"""A batch of small fitting problems, and the products that a solver needs of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from groundwire_flea.sides import Side

#: The published code smooths |r| as r^2 / sqrt(r^2 + SMOOTH).
SMOOTH = 1e-8


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

    def objective(
        self, scores: Sequence[Tensor], theta: Tensor, index: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """F (P,), and the sigmoids of the scores.

        Args:
            scores: Of each side.
            theta: (P, D).
            index: Whose scores they are; of all problems when left out.
        """
        u, v, ridge, toward = self.u, self.v, self.ridge, self.toward
        if index is not None:
            u, v, ridge, toward = _taken(u, index), _taken(v, index), ridge[index], toward[index]
        p = [score.sigmoid() for score in scores]
        value = dot(theta, ridge * theta) / 2 - dot(theta, toward)
        for part, score in zip(u, scores, strict=True):
            if part is not None:
                value = value + dot(part, softplus(score))
        square = _gap(v, p, value).square()
        return value + square / (square + SMOOTH).sqrt(), p

    def gap(self, p: Sequence[Tensor]) -> Tensor:
        """R (P,)."""
        return _gap(self.v, p, self.ridge[:, 0])

    def gradients(self, p: Sequence[Tensor], theta: Tensor) -> Tensor:
        """Gradients of the convex part and of r, next to each other: (P, D, 2)."""
        smooth, gap = self.ridge * theta - self.toward, torch.zeros_like(theta)
        for side, u, v, rate in zip(self.sides, self.u, self.v, p, strict=True):
            smooth = smooth if u is None else smooth + side.pull(u * rate)
            gap = gap if v is None else gap + side.pull(v * rate * (1 - rate))
        return torch.stack([smooth, gap], dim=-1)

    def hessian(self, p: Sequence[Tensor], multiplier: Tensor) -> Tensor:
        """Of the convex part plus ``multiplier`` (P,) times r: (P, D, D)."""
        gram = torch.diag_embed(self.ridge)
        for side, u, v, rate in zip(self.sides, self.u, self.v, p, strict=True):
            slope = rate * (1 - rate)
            weights = None if u is None else u * slope
            if v is not None and bool(multiplier.any()):
                bent = multiplier.unsqueeze(-1) * v * slope * (1 - 2 * rate)
                weights = bent if weights is None else weights + bent
            gram = gram if weights is None else gram + side.gram(weights)
        return gram

    def convex_hessian(self, p: Sequence[Tensor], index: Tensor) -> Tensor:
        """Of the convex part, for the problems ``index``."""
        gram = torch.diag_embed(self.ridge[index])
        for side, u, rate in zip(self.sides, _taken(self.u, index), p, strict=True):
            if u is not None:
                slope = rate[index] * (1 - rate[index])
                gram = gram + side.take(index).gram(u * slope)
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
    return [None if part is None else part[index] for part in parts]


def _gap(v: Sequence[Tensor | None], p: Sequence[Tensor], like: Tensor) -> Tensor:
    gap = torch.zeros_like(like)
    for part, rate in zip(v, p, strict=True):
        gap = gap if part is None else gap + dot(part, rate)
    return gap
