"""A second witness of a bound: a search for two inputs whose results lie further apart than the bound allows.

It runs the model as it is in evaluation, with its parametrizations and in fresh draws of random numbers, so it shares
nothing with the proof. Finding nothing proves nothing; finding something means that a rule is wrong.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groundwire_aol.certify.consistency import random_states
from groundwire_aol.certify.graph import tensors_of
from groundwire_aol.certify.rounding import Rounding
from groundwire_aol.errors import UnsoundError

#: Ascents that are always made, and at most.
LEAST, MOST = 3, 24
#: An estimate may be above the bound by this share.
TOLERANCE = 1e-6


def search(
    live: nn.Module,
    example: Tensor,
    bound: float,
    rounding: Rounding,
    *,
    seed: int = 0,
    seconds: float = 1.0,
) -> float:
    """Search for a contradiction to a Lipschitz bound, and return the largest ratio of distances that was seen.

    Power iterations on the Jacobian at the example, at zero and at random points of several scales, from directions
    that are random, or the same in every entry; pairs of these points. In float64 where the model can.

    Args:
        live: The model in evaluation mode, with its parametrizations, on the CPU.
        example: Inputs (B, ...) of which the first is a starting point.
        bound: To contradict.
        rounding: Of the results, in the dtype of ``example``.
        seed: Of the points, and of what the model may draw.
        seconds: Time to spend; three iterations are always made.

    Raises:
        UnsoundError: Two inputs contradict the bound; they are its ``counterexample``.

    Example:
        >>> exact = Rounding(0.0, 0.0, (0.0, 1.0), torch.float32)
        >>> round(search(nn.Linear(2, 2, bias=False).requires_grad_(False).eval(), torch.ones(1, 2), 9.0, exact), 3) > 0
        True
    """
    started = time.perf_counter()
    model, dtype = _in_best_precision(live, example)
    generator = torch.Generator().manual_seed(seed)
    points = _points(example[:1].to(dtype), generator)
    directions = _directions(points, generator)
    judge = _Judge(bound, rounding, dtype)
    with torch.enable_grad():
        for iteration in range(MOST):
            if iteration >= LEAST and time.perf_counter() - started > 0.9 * seconds:
                break
            with random_states(seed + iteration):
                directions = _ascend(model, points, directions, judge)
            lost = ~directions.flatten(1).isfinite().all(1) | (directions.flatten(1).norm(dim=1) == 0)
            directions[lost] = _unit(torch.randn(directions.shape, generator=generator, dtype=dtype))[lost]
            if iteration % 6 == 5:
                points = _points(points[:1], generator)
    return judge.largest


def _in_best_precision(live: nn.Module, example: Tensor) -> tuple[nn.Module, torch.dtype]:
    """Return the model in float64 if it runs there, else as it is."""
    double = copy.deepcopy(live).double().requires_grad_(False)
    try:
        with torch.no_grad():
            found = tensors_of(double(example[:1].double()))
        if all(t.dtype == torch.float64 for t in found):
            return double, torch.float64
    except (RuntimeError, ValueError, TypeError):
        pass
    return copy.deepcopy(live).requires_grad_(False), example.dtype


def _points(first: Tensor, generator: torch.Generator) -> Tensor:
    """Return the example, zero, and random inputs of several scales."""
    size = float(first.abs().max()) or 1.0
    noise = torch.randn((3, *first.shape[1:]), generator=generator, dtype=first.dtype)
    scales = torch.tensor([0.1, 1.0, 30.0], dtype=first.dtype).view(-1, *(1 for _ in first.shape[1:]))
    level = size * (1 + 9 * torch.rand((), generator=generator, dtype=first.dtype))
    return torch.cat([first, torch.zeros_like(first), size * scales * noise, level * torch.ones_like(first)])


def _directions(points: Tensor, generator: torch.Generator) -> Tensor:
    """Return first directions: random, and equal in all entries, as what copies entries copies those most."""
    found = torch.randn(points.shape, generator=generator, dtype=points.dtype)
    found[::2] = found[::2].mean(dim=tuple(range(2, points.dim())), keepdim=True) if points.dim() > 2 else 1.0
    return _unit(found)


def _unit(rows: Tensor) -> Tensor:
    norms = rows.flatten(1).norm(dim=1).view(-1, *(1 for _ in rows.shape[1:]))
    found: Tensor = rows / norms
    return found


def _ascend(model: nn.Module, points: Tensor, directions: Tensor, judge: _Judge) -> Tensor:
    """Compare the points with each other and with their neighbours, and return the steeper directions."""
    norms = points.flatten(1).norm(dim=1)
    step = (1e-5 if points.dtype == torch.float64 else 1e-2) * (norms + float(norms.mean()) + 1e-3)
    here = points.clone().requires_grad_()
    there = (points + directions * step.view(-1, *(1 for _ in points.shape[1:]))).detach()
    found = torch.cat([t.flatten(1) for t in tensors_of(model(torch.cat([here, there]))) if t.is_floating_point()], 1)
    one, other = found[: len(points)], found[len(points) :].detach()
    judge.compare(points, there, one.detach(), other)
    for shift in (1, 2):
        judge.compare(points, points.roll(shift, 0), one.detach(), one.detach().roll(shift, 0))
    if not one.requires_grad:
        return torch.full_like(points, math.nan)
    (gradient,) = torch.autograd.grad((one * (other - one.detach())).sum(), here)
    return _unit(gradient)


@dataclass
class _Judge:
    """Comparison of pairs with the bound."""

    bound: float
    rounding: Rounding
    dtype: torch.dtype
    largest: float = 0.0

    def compare(self, x: Tensor, y: Tensor, f: Tensor, g: Tensor) -> None:
        """Compare distances of inputs, row by row, with those of their results.

        Raises:
            UnsoundError: One pair contradicts the bound.
        """
        distance = (x - y).flatten(1).double().norm(dim=1)
        moved = (f - g).double().norm(dim=1)
        slack = self._slack(x, f) + self._slack(y, g)
        allowed = self.bound * (1 + TOLERANCE) * distance + slack
        ratio = ((moved - slack) / distance).nan_to_num(0.0)
        self.largest = max(self.largest, float(ratio.max()))
        broken = (moved > allowed) & moved.isfinite()
        if bool(broken.any()):
            i = int(broken.nonzero()[0])
            raise UnsoundError(
                f"the bound {self.bound:.6g} is contradicted by two inputs at distance {float(distance[i]):.6g}, whose "
                f"results lie {float(moved[i]):.6g} apart, {float(moved[i] / distance[i]):.6g} times as far -> certify "
                "nothing with this model, and report it: a rule is wrong, or the model does not compute what it shows",
                counterexample=(x[i].clone(), y[i].clone()),
            )

    def _slack(self, x: Tensor, f: Tensor) -> Tensor:
        """Return what rounding may have moved the results by."""
        size: Tensor = f.double().norm(dim=1)
        double = self.dtype == torch.float64
        if self.rounding.unknown:
            share = 1e-11 if double else 1e-4
            return size.mul(share)
        # In float64 the errors are 2^-29 of those in float32; weights were rounded to float32 before they were proved.
        finer = double and self.rounding.dtype == torch.float32
        error: Tensor = self.rounding.error(x.flatten(1).double().norm(dim=1))
        return error.mul(2.0**-26 if finer else 1.0).add(size, alpha=1e-13)
