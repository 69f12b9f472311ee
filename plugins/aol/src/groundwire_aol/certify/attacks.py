"""Trying to break a certificate: Jacobian norms in float64, and attacks inside certified radii."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from groundwire_aol.certify.bound import Bound, lipschitz_bound
from groundwire_aol.certify.certificates import certified_radius
from groundwire_aol.certify.plain_copy import plain_copy
from groundwire_aol.certify.rounding import not_standard

#: The attack stays this much inside the radius, so that rounding the input does not carry it out.
_INSIDE = 1 - 1e-5


@dataclass(frozen=True)
class Audit:
    """Outcome of trying to break a bound.

    Attributes:
        bound: The audited bound.
        jacobian: Largest spectral norm of the float64 Jacobian on the samples; never above the bound if that is sound.
        attacked: Number of certified samples that were attacked.
        successes: How many attacks changed the prediction inside the certified radius.
        counterexamples: File with inputs, perturbations, radii and targets of the successes, or None.
        rounding: Largest distance between computed scores and those in float64, on the samples.
        rounding_bound: What was proved of it, for the largest of these inputs; NaN if ``bound`` was a number, infinite
            if nothing could be proved.
    """

    bound: float
    jacobian: float
    attacked: int
    successes: int
    counterexamples: Path | None = None
    rounding: float = math.nan
    rounding_bound: float = math.nan

    @property
    def sound(self) -> bool:
        """True where nothing contradicts the bound. Not a proof: the proof is the bound itself."""
        return self.jacobian <= self.bound and self.successes == 0 and not self.rounding > self.rounding_bound


def audit_bound(
    module: nn.Module,
    loader: Iterable[Any],
    attack: bool = True,
    *,
    bound: float | Bound | None = None,
    samples: int = 500,
    jacobians: int = 20,
    steps: int = 40,
    seed: int = 0,
    directory: str | Path = ".",
) -> Audit:
    """Search for a contradiction to a Lipschitz bound: too large a Jacobian, or a successful attack inside a radius.

    The attack is projected gradient descent in L2 on the margin, with one start at the sample and one at random, inside
    the certified radius of each rightly predicted sample. Pixel ranges are ignored, as the certificate ignores them.

    Args:
        module: The model, in any mode; a baked copy in evaluation is audited.
        loader: Batches (inputs, targets, ...).
        attack: Whether to attack as well; needs targets.
        bound: What to audit; :func:`lipschitz_bound` of the model when left out.
        samples: Samples to attack at most.
        jacobians: Samples whose Jacobian is written out.
        steps: Of each attack.
        seed: Of the random starts.
        directory: Where ``aol_counterexamples.pt`` is saved, if there is one.

    Raises:
        ValueError: The loader is empty.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> _ = model[0].weight.data.copy_(torch.eye(2))
        >>> data = [(torch.tensor([[0.9, 0.1]]), torch.tensor([0]))]
        >>> audit_bound(model, data).sound, audit_bound(model, data, bound=0.5, attack=False).sound
        (True, False)
    """
    batches = _batches(loader, samples)
    claimed = lipschitz_bound(module, batches[0][0]) if bound is None else bound
    twin = plain_copy(module)
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    inputs = torch.cat([x for x, _ in batches]).to(device)
    largest, rounding = max_jacobian_norm(twin, inputs[:jacobians]), _rounding(twin, inputs, claimed)
    seen = Audit(float(claimed), largest, 0, 0, None, *rounding)
    if not attack:
        return seen
    generator = torch.Generator().manual_seed(seed)
    found, attacked = [], 0
    for x, y in track(batches, "Attacking", transient=True):
        tried, successes = _attack(twin, x.to(device), y.to(device), claimed, steps, generator)
        attacked += tried
        found += successes
    path = _save(found, Path(directory)) if found else None
    return replace(seen, attacked=attacked, successes=len(found), counterexamples=path)


def max_jacobian_norm(module: nn.Module, inputs: Tensor) -> float:
    """Largest spectral norm of the Jacobian of ``module`` at ``inputs``, in float64: a lower bound of its constant.

    Example:
        >>> max_jacobian_norm(nn.Flatten(), torch.zeros(1, 2, 2))
        1.0
    """
    twin = plain_copy(module).double()
    worst = 0.0
    for x in inputs.detach().double():
        jacobian = torch.autograd.functional.jacobian(lambda v: twin(v[None])[0], x)  # type: ignore[no-untyped-call]
        matrix = jacobian.reshape(-1, x.numel())
        worst = max(worst, float(torch.linalg.matrix_norm(matrix, 2)))
    return worst


def _rounding(twin: nn.Module, inputs: Tensor, bound: float | Bound) -> tuple[float, float]:
    """Return the largest rounding error of the scores that the samples show, and what was proved of it."""
    with torch.no_grad():
        # Not every device has float64.
        exact = copy.deepcopy(twin).cpu().double()(inputs.cpu().double())
        error = (twin(inputs).cpu().double() - exact).flatten(1).norm(dim=1)
    norms = inputs.double().flatten(1).norm(dim=1).cpu()
    proved = bound.rounding.error(norms) if isinstance(bound, Bound) else torch.full_like(norms, math.nan)
    if isinstance(bound, Bound) and not_standard(inputs.device):
        proved = torch.full_like(norms, math.inf)
    worst = int((error / proved).nan_to_num(0).argmax()) if bool(torch.isfinite(proved).all()) else int(error.argmax())
    return float(error[worst]), float(proved[worst])


def _covered(lipschitz: float | Bound, x: Tensor) -> Tensor | None:
    """Return the inputs, if radii can cover their rounding."""
    known = isinstance(lipschitz, Bound) and not lipschitz.rounding.unknown and lipschitz.rounding.dtype == x.dtype
    return x if known and not not_standard(x.device) else None


def _batches(loader: Iterable[Any], samples: int) -> list[tuple[Tensor, Tensor]]:
    kept: list[tuple[Tensor, Tensor]] = []
    for batch in loader:
        x, y = batch[0], batch[1]
        kept.append((x, y))
        if sum(len(x) for x, _ in kept) >= samples:
            break
    if not kept:
        raise ValueError("the loader gave no batch -> give one with samples (inputs, targets)")
    left = samples - sum(len(x) for x, _ in kept[:-1])
    kept[-1] = kept[-1][0][:left], kept[-1][1][:left]
    return kept


def _attack(
    module: nn.Module, x: Tensor, y: Tensor, lipschitz: float | Bound, steps: int, generator: torch.Generator
) -> tuple[int, list[dict[str, Tensor]]]:
    with torch.no_grad():
        radii = certified_radius(module(x), y, lipschitz, inputs=_covered(lipschitz, x))
    sure = radii > 0
    x, y, radii = x[sure], y[sure], radii[sure]
    found: dict[int, dict[str, Tensor]] = {}
    if not len(x):
        return 0, []
    noise = torch.randn(x.shape, generator=generator).to(x)
    for start in (torch.zeros_like(x), noise):
        moved = l2_attack(module, x, y, radii * _INSIDE, steps, start)
        with torch.no_grad():
            wrong = module(x + moved).argmax(1) != y
        for i in wrong.nonzero().flatten().tolist():
            found[i] = {"input": x[i], "perturbation": moved[i], "radius": radii[i], "target": y[i]}
    return len(x), list(found.values())


def l2_attack(module: nn.Module, x: Tensor, y: Tensor, radii: Tensor, steps: int, start: Tensor) -> Tensor:
    """Projected gradient descent on the margin within L2 balls.

    Args:
        module: The model.
        x: Inputs (B, ...).
        y: Targets (B,).
        radii: Of the balls (B,).
        steps: Steps of a quarter of the radius, shrinking.
        start: First perturbations, projected onto the balls.

    Returns:
        Perturbations of norm at most ``radii``, shape of ``x``.
    """
    shape = (-1, *(1 for _ in x.shape[1:]))
    limit = radii.to(x.dtype).view(shape)

    def project(d: Tensor) -> Tensor:
        norm = d.flatten(1).norm(dim=1).view(shape).clamp_min(1e-12)
        return d * (limit / norm).clamp_max(1.0)  # type: ignore[no-any-return]

    best, moved = project(start), project(start)
    lowest = torch.full((len(x),), math.inf, device=x.device)
    for step in range(steps + 1):
        probe = moved.detach().requires_grad_()
        scores = module(x + probe)
        own = scores.gather(1, y[:, None])[:, 0]
        others = scores.scatter(1, y[:, None], -math.inf).amax(1)
        margin = own - others
        better = margin.detach() < lowest
        lowest = torch.where(better, margin.detach(), lowest)
        best = torch.where(better.view(shape), probe.detach(), best)
        (gradient,) = torch.autograd.grad(margin.sum(), probe)
        direction = gradient / gradient.flatten(1).norm(dim=1).view(shape).clamp_min(1e-12)
        moved = project(moved.detach() - limit * direction * 0.5 * (1 - step / (steps + 1)))
    return best


def _save(found: list[dict[str, Tensor]], directory: Path) -> Path | None:
    path = directory / "aol_counterexamples.pt"
    try:
        torch.save({key: torch.stack([f[key].cpu() for f in found]) for key in found[0]}, path)
    except (OSError, RuntimeError):
        import warnings

        warnings.warn(f"counterexamples cannot be saved to {directory}", stacklevel=3)
        return None
    return path
