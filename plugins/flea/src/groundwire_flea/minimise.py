r"""Many small classifiers at once: a batched exact-penalty Newton method.

Every problem of a batch minimises, over theta (D,),

.. math:: F(\theta) = \sum_k u_k\,CE(x_k\theta, t_k) + \tfrac12\sum_l \rho_l\theta_l^2 + |r(\theta)|,
          \quad r(\theta) = \sum_k v_k\,\sigma(x_k\theta)

With v = 0 it is logistic regression. Otherwise ``|r|`` is the demographic-parity gap of another source, an exact
penalty with one scalar multiplier: the quadratic model of F is minimised in closed form by solving with the Hessian
twice. Problems that are done leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from groundwire_flea.problems import Problems

ARMIJO = 1e-4
HALVINGS = 8
#: A promised decrease of less is none.
NOTHING = 1e-8
#: The batch shrinks when at most this share of it is not done: to copy what remains has its price.
LEAVE = 0.75


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

    def remember(self, step: Tensor, change: Tensor, multiplier: Tensor) -> None:
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

    def remember(self, step: Tensor, change: Tensor, multiplier: Tensor) -> None:
        """Add a step and how the gradients (P, D, 2) changed; a step of negative curvature counts for nothing."""
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


def minimise(
    problems: Problems,
    start: Tensor,
    *,
    curvature: Callable[[Problems], Newton | LBFGS] | None = None,
    patience: int = 3,
    tolerance: float = 1e-7,
    max_steps: int = 200,
) -> Tensor:
    """Minimise every problem of the batch.

    Args:
        problems: P problems.
        start: (P, D), where to begin.
        curvature: Makes what solves with the Hessian; Newton when left out.
        patience: A problem is done after so many steps in turn that gain less than ``tolerance``.
        tolerance: See ``patience``.
        max_steps: A problem is done after so many steps in any case (separable data have no minimum).

    Returns:
        (P, D), the last point of each problem.
    """
    curve = Newton() if curvature is None else curvature(problems)
    result, live = start.clone(), torch.arange(len(start), device=start.device)
    theta, scores = start, problems.scores(start)
    value, p = problems.objective(scores, theta)
    multiplier, quiet = torch.zeros_like(value), torch.zeros_like(value, dtype=torch.long)
    convex = quiet.bool()
    sides = problems.gradients(p, theta)
    for _ in range(max_steps):
        gap = problems.gap(p)
        multiplier, step, model = _direction(
            curve.solve(problems, p, multiplier, convex, sides), sides, gap, multiplier
        )
        moved = problems.scores(step)
        length, new, scores, p = _line_search(problems, theta, scores, step, moved, value, model)
        before = theta
        theta = theta + length.unsqueeze(-1) * step
        # A step that promises nothing starts from a stationary point.
        done = (quiet >= patience) | (model > -tolerance)
        quiet = torch.where(done, patience, torch.where(value - new < tolerance, quiet + 1, 0))
        convex, value = length == 0, new
        after = problems.gradients(p, theta)
        curve.remember(theta - before, after - sides, multiplier)
        sides = after
        keep = (quiet < patience).nonzero().squeeze(-1)
        if len(keep) > LEAVE * len(live):
            continue
        result[live] = theta
        if not len(keep):
            break
        live, theta, value, sides = live[keep], theta[keep], value[keep], sides[keep]
        scores, p = [part[keep] for part in scores], [part[keep] for part in p]
        multiplier, quiet, convex = multiplier[keep], quiet[keep], convex[keep]
        problems = problems.take(keep)
        curve.take(keep)
    result[live] = theta
    return result


def _direction(solved: Tensor, sides: Tensor, gap: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The minimiser of g's + s'Hs/2 + |r + h's|: multiplier in [-1, 1], step, and the decrease of its linear model."""
    g, h = sides.unbind(-1)
    newton, toward = solved.unbind(-1)
    along = (h * toward).sum(-1)
    wanted = (gap - (h * newton).sum(-1)) / along.clamp(min=1e-30)
    multiplier = torch.where(along > 1e-30, wanted.clamp(-1, 1), torch.zeros_like(wanted))
    step = -(newton + multiplier.unsqueeze(-1) * toward)
    model = (g * step).sum(-1) + (gap + (h * step).sum(-1)).abs() - gap.abs()
    return multiplier, step, model


def _moved(scores: Sequence[Tensor], moved: Sequence[Tensor], length: Tensor) -> list[Tensor]:
    """Scores of each side after steps of these lengths (P,)."""
    return [torch.addcmul(old, change, length.unsqueeze(-1)) for old, change in zip(scores, moved, strict=True)]


def _line_search(
    problems: Problems,
    theta: Tensor,
    scores: Sequence[Tensor],
    step: Tensor,
    moved: Sequence[Tensor],
    value: Tensor,
    model: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Halve each step until F has decreased enough; length 0 where it never does. Also F, scores and sigmoids there."""
    length = torch.ones_like(value)
    reached = [old + change for old, change in zip(scores, moved, strict=True)]
    new, p = problems.objective(reached, theta + step)
    for halving in range(1, HALVINGS + 1):
        # A step that promises nothing is not worth a search.
        short = ~(new <= value + ARMIJO * length * model) & (model < -NOTHING)
        index = short.nonzero().squeeze(-1)
        if not len(index):
            break
        length[index] = 0.5**halving
        trial = _moved([old[index] for old in scores], [change[index] for change in moved], length[index])
        new[index], rates = problems.objective(trial, theta[index] + 0.5**halving * step[index], index)
        for part, values in zip([*reached, *p], [*trial, *rates], strict=True):
            part[index] = values
    failed = (~(new <= value)).nonzero().squeeze(-1)
    if len(failed):
        length[failed], new[failed] = 0, value[failed]
        for part, rate, score in zip(reached, p, scores, strict=True):
            part[failed] = score[failed]
            rate[failed] = score[failed].sigmoid()
    return length, new, reached, p
