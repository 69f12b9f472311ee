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
from torch.nn.functional import softplus

from groundwire_flea.sides import Side

#: The published code smooths |r| as r^2 / sqrt(r^2 + SMOOTH).
SMOOTH = 1e-8
ARMIJO = 1e-4
HALVINGS = 8
#: A promised decrease of less is none.
NOTHING = 1e-8
#: The batch shrinks when at most this share of it is not done: to copy what remains has its price.
LEAVE = 0.75


class Problems:
    """A batch of P problems with D columns and M rows (padded with weight 0), float64.

    Args:
        sides: Where the rows are; the rows of all sides together are the M rows of a problem.
        t: (P, M), labels 0 or 1.
        u: (P, M), weights of the cross-entropy.
        v: (P, M), weights of the gap.
        ridge: (P, D), weights of the squares.
    """

    def __init__(self, sides: Sequence[Side], t: Tensor, u: Tensor, v: Tensor, ridge: Tensor) -> None:
        self.sides, self.t, self.u, self.v, self.ridge = list(sides), t, u, v, ridge
        self.widths = [side.x.shape[1] for side in sides]
        # Of a disparity's two sources one has the entropy and the other the gap: half of the products are zero.
        self.entropic, self.gapped = ([bool(part.any()) for part in self.parts(w)] for w in (u, v))

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """(P, M) by sides."""
        return rows.split(self.widths, dim=1)

    def take(self, index: Tensor) -> Problems:
        """The problems ``index``."""
        rows = (self.t[index], self.u[index], self.v[index], self.ridge[index])
        return Problems([side.take(index) for side in self.sides], *rows)

    def scores(self, theta: Tensor) -> Tensor:
        """x theta: (P, M)."""
        return torch.cat([side.scores(theta) for side in self.sides], dim=1)

    def objective(self, scores: Tensor, theta: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """F (P,), with the published smoothing of |r|, and the sigmoid of the scores. ``index`` says whose they are."""
        rows = (self.t, self.u, self.v, self.ridge)
        t, u, v, ridge = rows if index is None else (part[index] for part in rows)
        p = scores.sigmoid()
        value = (u * (softplus(scores) - t * scores)).sum(-1) + (ridge * theta.square()).sum(-1) / 2
        if any(self.gapped):
            square = (v * p).sum(-1).square()
            value = value + square / (square + SMOOTH).sqrt()
        return value, p

    def gradients(self, p: Tensor, theta: Tensor) -> Tensor:
        """Gradients of the convex part and of r, next to each other: (P, D, 2)."""
        smooth = self._pull(self.u * (p - self.t), self.entropic) + self.ridge * theta
        return torch.stack([smooth, self._pull(self.v * p * (1 - p), self.gapped)], dim=-1)

    def gram(self, weights: Tensor) -> Tensor:
        """x' diag(weights) x + diag(ridge): (P, D, D)."""
        gram = torch.diag_embed(self.ridge)
        for side, part in zip(self.sides, self.parts(weights), strict=True):
            gram = gram + side.gram(part)
        return gram

    def start_gram(self) -> Tensor:
        """The Hessian of the entropy at zero, (P, D, D), from one product for each source."""
        gram = torch.diag_embed(self.ridge)
        for side, part in zip(self.sides, self.parts(self.u), strict=True):
            gram = gram + side.shared_gram(part / 4)
        return gram

    def _pull(self, weights: Tensor, used: Sequence[bool]) -> Tensor:
        """x' weights: (P, D)."""
        result = torch.zeros_like(self.ridge)
        for side, part, wanted in zip(self.sides, self.parts(weights), used, strict=True):
            if wanted:
                result = result + side.pull(part)
        return result


class Newton:
    """Solves with the Hessian of the Lagrangian; with that of the convex part where it is not positive definite."""

    def solve(self, problems: Problems, p: Tensor, multiplier: Tensor, convex: Tensor, right: Tensor) -> Tensor:
        """H^-1 ``right`` for right-hand sides (P, D, 2)."""
        slope = p * (1 - p)
        weights = problems.u * slope
        bent = weights + multiplier.masked_fill(convex, 0).unsqueeze(-1) * problems.v * slope * (1 - 2 * p)
        factor, info = torch.linalg.cholesky_ex(_lifted(problems.gram(bent)))
        failed = (info > 0).nonzero().squeeze(-1)
        if len(failed):
            gram = problems.take(failed).gram(weights[failed])
            factor[failed] = torch.linalg.cholesky_ex(_lifted(gram, 1e-6))[0]
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
        self._factor = torch.linalg.cholesky_ex(_lifted(problems.start_gram(), 1e-6))[0]
        self._memory = memory
        self._pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def solve(self, problems: Problems, p: Tensor, multiplier: Tensor, convex: Tensor, right: Tensor) -> Tensor:
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
        gap = (problems.v * p).sum(-1)
        multiplier, step, model = _direction(
            curve.solve(problems, p, multiplier, convex, sides), sides, gap, multiplier
        )
        moved = problems.scores(step)
        length, new, p = _line_search(problems, theta, scores, step, moved, value, model)
        before = theta
        theta, scores = theta + length.unsqueeze(-1) * step, scores + length.unsqueeze(-1) * moved
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
        live, theta, scores, value, sides, p = (part[keep] for part in (live, theta, scores, value, sides, p))
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


def _line_search(
    problems: Problems, theta: Tensor, scores: Tensor, step: Tensor, moved: Tensor, value: Tensor, model: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve each step until F has decreased enough; length 0 where it never does. Also F and the sigmoid there."""
    length = torch.ones_like(value)
    new, p = problems.objective(scores + moved, theta + step)
    for halving in range(1, HALVINGS + 1):
        # A step that promises nothing is not worth a search.
        short = ~(new <= value + ARMIJO * length * model) & (model < -NOTHING)
        index = short.nonzero().squeeze(-1)
        if not len(index):
            break
        size = 0.5**halving
        length[index] = size
        trial = scores[index] + size * moved[index], theta[index] + size * step[index]
        new[index], p[index] = problems.objective(*trial, index)
    failed = (~(new <= value)).nonzero().squeeze(-1)
    if len(failed):
        length[failed], new[failed], p[failed] = 0, value[failed], scores[failed].sigmoid()
    return length, new, p
