"""Solving with the Hessian of many problems at once: exactly, or from what was learned on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groundwire_flea.problems import Problems


class Newton:
    """Solves with the Hessian of the Lagrangian; with that of the convex part where it is not positive definite."""

    def solve(
        self, problems: Problems, p: Sequence[Tensor], multiplier: Tensor, convex: Tensor, right: Tensor
    ) -> Tensor:
        """H^-1 ``right`` for right-hand sides (P, D, 2)."""
        factor, info = torch.linalg.cholesky_ex(_lifted(problems.hessian(p, multiplier.masked_fill(convex, 0))))
        failed = (info > 0).nonzero().squeeze(-1)
        if len(failed):
            factor[failed] = torch.linalg.cholesky_ex(_lifted(problems.convex_hessian(p, failed), 1e-6))[0]
        return torch.cholesky_solve(right, factor)

    def take(self, index: Tensor) -> None:
        """Nothing is remembered."""

    def remember(self, before: Tensor, theta: Tensor, old: Tensor, new: Tensor, multiplier: Tensor) -> None:
        """Nothing is remembered."""


class LBFGS:
    """Solves with a limited-memory approximation of the inverse Hessian, for many columns.

    The Hessian at zero, one for each problem, is what the updates begin with.
    """

    def __init__(self, problems: Problems, memory: int = 10) -> None:
        self._factor = torch.linalg.cholesky_ex(_lifted(problems.start_hessian(), 1e-6))[0]
        self._memory = memory
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def solve(
        self, problems: Problems, p: Sequence[Tensor], multiplier: Tensor, convex: Tensor, right: Tensor
    ) -> Tensor:
        """The two-loop recursion for both right-hand sides."""
        result, shares = right, []
        for step, change, scale in reversed(self._pairs):
            share = scale * (step.unsqueeze(1) @ result)
            result = result - change.unsqueeze(-1) * share
            shares.append(share)
        result = torch.cholesky_solve(result, self._factor)
        for (step, change, scale), share in zip(self._pairs, reversed(shares), strict=True):
            result = result + step.unsqueeze(-1) * (share - scale * (change.unsqueeze(1) @ result))
        return result

    def take(self, index: Tensor) -> None:
        """Keep the memory of the problems ``index``."""
        self._factor = self._factor[index]
        self._pairs = [(step[index], change[index], scale[index]) for step, change, scale in self._pairs]

    def remember(self, before: Tensor, theta: Tensor, old: Tensor, new: Tensor, multiplier: Tensor) -> None:
        """Add a step and how the gradients (P, D, 2) changed; a step of negative curvature counts for nothing."""
        step, change = theta - before, new - old
        change = change[..., 0] + multiplier.unsqueeze(-1) * change[..., 1]
        inner = (step * change).sum(-1)
        usable = inner > 1e-10 * step.norm(dim=-1) * change.norm(dim=-1)
        scale = torch.where(usable, 1 / inner.where(usable, torch.ones_like(inner)), torch.zeros_like(inner))
        self._pairs = [*self._pairs, (step, change, scale.view(-1, 1, 1))][-self._memory :]


def _lifted(gram: Tensor, relative: float = 1e-10) -> Tensor:
    """``gram`` with a little added to its diagonal: constant and duplicate columns make it singular."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(relative * diagonal.abs().mean(-1, keepdim=True) + 1e-14)
    return gram
