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

from groundwire_flea.curvature import LBFGS, Newton
from groundwire_flea.problems import Point, Problems

ARMIJO = 1e-4
#: Lengths that are tried where the whole step is too long.
HALVINGS = 0.5 ** torch.arange(1, 9)
#: A promised decrease of less is none.
NOTHING = 1e-8
#: The batch shrinks when at most this share of it is not done: to copy what remains has its price.
LEAVE = 0.75


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
    here = problems.at(start, problems.scores(start))
    multiplier, quiet = torch.zeros_like(here.value), torch.zeros_like(here.value, dtype=torch.long)
    convex = quiet.bool()
    sides = problems.gradients(here)
    for _ in range(max_steps):
        multiplier, step, model = _direction(
            curve.solve(problems, here.p, multiplier, convex, sides), sides, here.gap, multiplier
        )
        before = here
        length, here = _line_search(problems, here, step, model)
        # A step that promises nothing starts from a stationary point.
        done = (quiet >= patience) | (model > -tolerance)
        quiet = torch.where(done, patience, torch.where(before.value - here.value < tolerance, quiet + 1, 0))
        convex = length == 0
        after = problems.gradients(here)
        curve.remember(before.theta, here.theta, sides, after, multiplier)
        sides = after
        keep = (quiet < patience).nonzero().squeeze(-1)
        if len(keep) > LEAVE * len(live):
            continue
        result[live] = here.theta
        if not len(keep):
            break
        live, here, sides, problems = live[keep], here.take(keep), sides[keep], problems.take(keep)
        multiplier, quiet, convex = multiplier[keep], quiet[keep], convex[keep]
        curve.take(keep)
    result[live] = here.theta
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


def _line_search(problems: Problems, here: Point, step: Tensor, model: Tensor) -> tuple[Tensor, Point]:
    """Halve each step until F has decreased enough; length 0 where it never does. Also the point that is reached."""
    moved, length = problems.scores(step), torch.ones_like(here.value)
    there = problems.at(here.theta + step, [old + change for old, change in zip(here.scores, moved, strict=True)])
    # One half is often enough. The other halvings are tried together: few problems need them, and some of those all.
    for halvings in (HALVINGS[:1], HALVINGS[1:]):
        # A step that promises nothing is not worth a search.
        short = ~(there.value <= here.value + ARMIJO * length * model) & (model < -NOTHING)
        index = short.nonzero().squeeze(-1)
        if not len(index):
            break
        many, tried = index.repeat_interleave(len(halvings)), halvings.to(length).repeat(len(index))
        trial = _moved(problems, here, step, moved, many, tried.unsqueeze(-1))
        best = _first(trial.value <= here.value[many] + ARMIJO * tried * model[many], len(halvings))
        length[index] = tried[best]
        there.put(index, trial.take(best))
    failed = (~(there.value <= here.value)).nonzero().squeeze(-1)
    if len(failed):
        length[failed] = 0
        there.put(failed, here.take(failed))
    return length, there


def _moved(
    problems: Problems, here: Point, step: Tensor, moved: Sequence[Tensor], index: Tensor, length: Tensor
) -> Point:
    """Where steps of these lengths (T, 1) lead the problems ``index`` (T,)."""
    scores = [torch.addcmul(old[index], change[index], length) for old, change in zip(here.scores, moved, strict=True)]
    return problems.at(here.theta[index] + length * step[index], scores, index)


def _first(enough: Tensor, many: int) -> Tensor:
    """The place of the first True among each ``many`` of (P * many,); of the last one where there is none."""
    enough = enough.view(-1, many).clone()
    enough[:, -1] = True
    return enough.int().argmax(1) + many * torch.arange(len(enough), device=enough.device)
