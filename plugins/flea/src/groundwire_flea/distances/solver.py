r"""Solver for many small classifiers at once: a batched exact-penalty Newton method.

Every problem of a batch minimises, over theta (D,),

.. math:: F(\theta) = \sum_k u_k\,CE(x_k\theta, t_k) + \tfrac12\sum_l \rho_l\theta_l^2 + |r(\theta)|,
          \quad r(\theta) = \sum_k v_k\,\sigma(x_k\theta)

With v = 0 it is logistic regression. Otherwise ``|r|`` is the demographic-parity gap of another source, an exact
penalty with one scalar multiplier: the quadratic model of F is minimised in closed form by solving with the Hessian
twice. Problems that are done leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from groundwire_flea.distances.pair_batches import Design

#: The published code smooths |r| as r^2 / sqrt(r^2 + SMOOTH).
SMOOTH = 1e-8
ARMIJO = 1e-4
#: Lengths that are tried where the whole step is too long.
HALVINGS = 0.5 ** torch.arange(1, 9)
#: A promised decrease of less is none.
NO_DECREASE = 1e-8
#: The batch shrinks when at most this share of it is not done: to copy what remains has its price.
SHRINK = 0.75
#: Beyond so many columns, without that of ones, Hessians cost more than the steps that they save.
NEWTON_COLUMNS = 30


@dataclass(frozen=True)
class Point:
    """A point of each of P problems.

    Attributes:
        theta: (P, D).
        scores: X theta, (P, m) for each design.
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


class Objective:
    r"""F of P problems over theta (D,), float64, and its derivatives.

    Of a disparity's two designs one has the entropy and the other one the gap, so each has only what it needs. With
    labels t in {0, 1}, the entropy is ``sum u softplus(x theta) - theta . (x' (u t))``, and its second term is linear:
    labels are needed once.

    Args:
        designs: The rows; those of all designs together are the M rows of a problem.
        t: (P, M), labels 0 or 1.
        u: (P, M), weights of the cross-entropy.
        v: (P, M), weights of the gap.
        ridge: (P, D), weights of the squares.
    """

    def __init__(self, designs: Sequence[Design], t: Tensor, u: Tensor, v: Tensor, ridge: Tensor) -> None:
        widths = [design.x.shape[1] for design in designs]
        self.designs, self.ridge = list(designs), ridge
        self.u, self.v = (_split(weights, widths) for weights in (u, v))
        self.linear = torch.zeros_like(ridge)
        for design, part, label in zip(designs, self.u, torch.split(t, widths, dim=1), strict=True):
            if part is not None:
                self.linear = self.linear + design.transposed(part * label)

    def take(self, index: Tensor) -> Objective:
        """The problems ``index``."""
        taken = Objective.__new__(Objective)
        taken.designs = [design.take(index) for design in self.designs]
        taken.u, taken.v = (_taken(parts, index) for parts in (self.u, self.v))
        taken.linear, taken.ridge = self.linear[index], self.ridge[index]
        return taken

    def scores(self, theta: Tensor) -> list[Tensor]:
        """X theta, (P, m) for each design."""
        return [design.scores(theta) for design in self.designs]

    def at(self, theta: Tensor, scores: Sequence[Tensor], index: Tensor | None = None) -> Point:
        """The problems at ``theta`` (P, D).

        Args:
            theta: The points.
            scores: X theta of each design.
            index: Which problems these are; all when left out.
        """
        u, v, ridge, linear = self.u, self.v, self.ridge, self.linear
        if index is not None:
            u, v, ridge, linear = _taken(u, index), _taken(v, index), ridge[index], linear[index]
        p = [score.sigmoid() for score in scores]
        value = _dot(theta, ridge * theta) / 2 - _dot(theta, linear)
        for part, score in zip(u, scores, strict=True):
            value = value if part is None else value + _dot(part, softplus(score))
        gap = torch.zeros_like(value)
        for part, rate in zip(v, p, strict=True):
            gap = gap if part is None else gap + _dot(part, rate)
        square = gap.square()
        return Point(theta, scores, p, value + square / (square + SMOOTH).sqrt(), gap)

    def gradients(self, here: Point) -> Tensor:
        """Gradients of the convex part and of r, next to each other: (P, D, 2)."""
        convex, gap = self.ridge * here.theta - self.linear, torch.zeros_like(here.theta)
        for design, u, v, rate in zip(self.designs, self.u, self.v, here.p, strict=True):
            convex = convex if u is None else convex + design.transposed(u * rate)
            gap = gap if v is None else gap + design.transposed((v * rate).mul_(1 - rate))
        return torch.stack([convex, gap], dim=-1)

    def hessian(self, p: Sequence[Tensor], multiplier: Tensor) -> Tensor:
        """Of the convex part plus ``multiplier`` (P,) times r: (P, D, D)."""
        gram = torch.diag_embed(self.ridge)
        for design, u, v, rate in zip(self.designs, self.u, self.v, p, strict=True):
            slope = rate * (1 - rate)
            weights = None if u is None else u * slope
            if v is not None and bool(multiplier.any()):
                bent = (multiplier.unsqueeze(-1) * v).mul_(slope).mul_(1 - 2 * rate)
                weights = bent if weights is None else weights + bent
            gram = gram if weights is None else gram + design.gram(weights)
        return gram

    def convex_hessian(self, p: Sequence[Tensor], index: Tensor) -> Tensor:
        """Of the convex part, for the problems ``index``."""
        gram = torch.diag_embed(self.ridge.index_select(0, index))
        for design, u, rate in zip(self.designs, _taken(self.u, index), p, strict=True):
            if u is not None:
                rate = rate.index_select(0, index)
                gram = gram + design.take(index).gram(u * (rate * (1 - rate)))
        return gram

    def start_hessian(self) -> Tensor:
        """Of the convex part at zero, from one product for each source: (P, D, D)."""
        gram = torch.diag_embed(self.ridge)
        for design, u in zip(self.designs, self.u, strict=True):
            gram = gram if u is None else gram + design.shared_gram(u / 4)
        return gram


class Newton:
    """Solves with the Hessian of the Lagrangian; with that of the convex part where it is not positive definite."""

    def solve(
        self, objective: Objective, p: Sequence[Tensor], multiplier: Tensor, convex: Tensor, right: Tensor
    ) -> Tensor:
        """H^-1 ``right`` for right-hand sides (P, D, 2); where ``convex`` (P,), H without the multiplier's part."""
        factor, info = torch.linalg.cholesky_ex(_regularized(objective.hessian(p, multiplier.masked_fill(convex, 0))))
        failed = (info > 0).nonzero().squeeze(-1)
        if len(failed):
            factor[failed] = torch.linalg.cholesky_ex(_regularized(objective.convex_hessian(p, failed), 1e-6))[0]
        return torch.cholesky_solve(right, factor)

    def take(self, index: Tensor) -> None:
        """Nothing is remembered."""

    def remember(self, before: Tensor, theta: Tensor, old: Tensor, new: Tensor, multiplier: Tensor) -> None:
        """Nothing is remembered."""


class LBFGS:
    """Solves with a limited-memory approximation of the inverse Hessian, for many columns.

    The Hessian at zero, one for each problem, is what the updates begin with.
    """

    def __init__(self, objective: Objective, memory: int = 10) -> None:
        self._factor = torch.linalg.cholesky_ex(_regularized(objective.start_hessian(), 1e-6))[0]
        self._memory = memory
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def solve(
        self, objective: Objective, p: Sequence[Tensor], multiplier: Tensor, convex: Tensor, right: Tensor
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


def minimize(
    objective: Objective, start: Tensor, *, patience: int = 3, tolerance: float = 1e-7, max_steps: int = 200
) -> Tensor:
    """Minimise every problem of the batch, by Newton's method or, with more than 30 columns, by L-BFGS.

    Args:
        objective: P problems.
        start: (P, D), where to begin.
        patience: A problem is done after so many steps in turn that gain less than ``tolerance``.
        tolerance: See ``patience``.
        max_steps: A problem is done after so many steps in any case (separable data have no minimum).

    Returns:
        (P, D), the last point of each problem.
    """
    hessian = Newton() if start.shape[1] <= NEWTON_COLUMNS + 1 else LBFGS(objective)
    result, active = start.clone(), torch.arange(len(start), device=start.device)
    here = objective.at(start, objective.scores(start))
    multiplier, stalled = torch.zeros_like(here.value), torch.zeros_like(here.value, dtype=torch.long)
    convex = stalled.bool()
    gradients = objective.gradients(here)
    for _ in range(max_steps):
        solved = hessian.solve(objective, here.p, multiplier, convex, gradients)
        multiplier, step, decrease = _direction(solved, gradients, here.gap, multiplier)
        before = here
        length, here = _line_search(objective, here, step, decrease)
        # A step that promises nothing starts from a stationary point.
        done = (stalled >= patience) | (decrease > -tolerance)
        stalled = torch.where(done, patience, torch.where(before.value - here.value < tolerance, stalled + 1, 0))
        convex = length == 0
        after = objective.gradients(here)
        hessian.remember(before.theta, here.theta, gradients, after, multiplier)
        gradients = after
        keep = (stalled < patience).nonzero().squeeze(-1)
        if len(keep) > SHRINK * len(active):
            continue
        result[active] = here.theta
        if not len(keep):
            break
        active, here, gradients, objective = active[keep], here.take(keep), gradients[keep], objective.take(keep)
        multiplier, stalled, convex = multiplier[keep], stalled[keep], convex[keep]
        hessian.take(keep)
    result[active] = here.theta
    return result


def _direction(solved: Tensor, gradients: Tensor, gap: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The minimiser of g's + s'Hs/2 + |r + h's|: multiplier in [-1, 1], step, and the decrease of its linear model."""
    g, h = gradients.unbind(-1)
    newton, along_gap = solved.unbind(-1)
    curvature = (h * along_gap).sum(-1)
    wanted = (gap - (h * newton).sum(-1)) / curvature.clamp(min=1e-30)
    multiplier = torch.where(curvature > 1e-30, wanted.clamp(-1, 1), torch.zeros_like(wanted))
    step = -(newton + multiplier.unsqueeze(-1) * along_gap)
    decrease = (g * step).sum(-1) + (gap + (h * step).sum(-1)).abs() - gap.abs()
    return multiplier, step, decrease


def _line_search(objective: Objective, here: Point, step: Tensor, decrease: Tensor) -> tuple[Tensor, Point]:
    """Halve each step until F has decreased enough; length 0 where it never does. Also the point that is reached."""
    moved, length = objective.scores(step), torch.ones_like(here.value)
    there = objective.at(here.theta + step, [old + change for old, change in zip(here.scores, moved, strict=True)])
    # One half is often enough. The other halvings are tried together: few problems need them, and some of those all.
    for halvings in (HALVINGS[:1], HALVINGS[1:]):
        # A step that promises nothing is not worth a search.
        short = ~(there.value <= here.value + ARMIJO * length * decrease) & (decrease < -NO_DECREASE)
        index = short.nonzero().squeeze(-1)
        if not len(index):
            break
        many, tried = index.repeat_interleave(len(halvings)), halvings.to(length).repeat(len(index))
        theta = here.theta[many] + tried.unsqueeze(-1) * step[many]
        scores = [
            torch.addcmul(old[many], change[many], tried.unsqueeze(-1))
            for old, change in zip(here.scores, moved, strict=True)
        ]
        trial = objective.at(theta, scores, many)
        best = _first(trial.value <= here.value[many] + ARMIJO * tried * decrease[many], len(halvings))
        length[index] = tried[best]
        there.put(index, trial.take(best))
    failed = (~(there.value <= here.value)).nonzero().squeeze(-1)
    if len(failed):
        length[failed] = 0
        there.put(failed, here.take(failed))
    return length, there


def _first(enough: Tensor, many: int) -> Tensor:
    """The place of the first True among each ``many`` of (P * many,); of the last one where there is none."""
    enough = enough.view(-1, many).clone()
    enough[:, -1] = True
    return enough.int().argmax(1) + many * torch.arange(len(enough), device=enough.device)


def _regularized(gram: Tensor, relative: float = 1e-10) -> Tensor:
    """``gram`` with a little added to its diagonal: constant and duplicate columns make it singular."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(relative * diagonal.abs().mean(-1, keepdim=True) + 1e-14)
    return gram


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the rows of two (P, M): (P,)."""
    return torch.bmm(left.unsqueeze(1), right.unsqueeze(2)).flatten()


def _split(weights: Tensor, widths: Sequence[int]) -> list[Tensor | None]:
    """(P, M) by designs; None where all weights are 0."""
    return [part.contiguous() if bool(part.any()) else None for part in torch.split(weights, list(widths), dim=1)]


def _taken(parts: Sequence[Tensor | None], index: Tensor) -> list[Tensor | None]:
    return [None if part is None else part.index_select(0, index) for part in parts]
