"""One pass over evaluation data with certificates, inside a run."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MaxMetric

from groundwire import Fields, Finding
from groundwire.modules import shift_hooks
from groundwire_aol.certify.bound import Bound, lipschitz_bound
from groundwire_aol.certify.certificates import (
    half_dtype,
    half_precision,
    smallest_std,
    some_rows,
    total_lipschitz,
)
from groundwire_aol.certify.metrics import CertifiedAccuracy
from groundwire_aol.certify.plain_copy import is_shifted
from groundwire_aol.certify.rounding import not_standard
from groundwire_aol.certify.score_module import score_module
from groundwire_aol.errors import UnsoundError

#: Points of the curve over the radius.
POINTS = 60


@dataclass(frozen=True)
class Result:
    """Certified accuracy of one pass.

    Attributes:
        clean: Accuracy without ties.
        certified: Accuracy by radius.
        curve: (radius, accuracy) pairs for drawing.
        lipschitz: The bound that was proved, from pixels to scores.
        samples: Number of samples.
        rounding: Largest part of a radius that the rounding of the scores took; NaN where certificates are of exact
            arithmetic.
    """

    clean: float
    certified: dict[float, float]
    curve: tuple[tuple[float, float], ...]
    lipschitz: float
    samples: int
    rounding: float = math.nan

    @property
    def arithmetic(self) -> str:
        """Arithmetic of the certificates: "floating" if they cover the rounding of the scores, "exact" otherwise."""
        return "exact" if math.isnan(self.rounding) else "floating"

    @property
    def metrics(self) -> dict[str, float]:
        """Values to log, by name."""
        named = {f"certified@{eps:.3g}": value for eps, value in self.certified.items()}
        rounding = {} if math.isnan(self.rounding) else {"rounding": self.rounding}
        return {"clean": self.clean, **named, "lipschitz": self.lipschitz, **rounding}

    def findings(self, plugin: str) -> list[Finding]:
        """Return the findings for the report. A mapping, so that the numbers do not reach the loggers twice."""
        certified = ", ".join(f"{100 * v:.1f} % at {eps:.3g}" for eps, v in self.certified.items())
        message = (
            f"Accuracy {100 * self.clean:.1f} %, certified in L2: {certified} ({self.samples} samples), in "
            f"{self.arithmetic} arithmetic."
        )
        found = [Finding(plugin, "certified_accuracy", "info", self.metrics, message)]
        if self.rounding > 0.1 * min(e for e in (*self.certified, math.inf) if e > 0):
            message = (
                f"The proved bound of rounding takes up to {self.rounding:.3g} of each radius. Certify the model in "
                "float64, or exact arithmetic as papers do, with AOL(rounding=False)."
            )
            found.append(Finding(plugin, "rounding", "warn", self.rounding, message))
        return found


class CertifiedPass:
    """Adds batches up. Bounds are proved once per pass and shape, as weights do not change in between."""

    def __init__(
        self, eps: tuple[float, ...], input_std: Any = None, rounding: bool = True, half: torch.dtype | None = None
    ) -> None:
        #: ``half``: of the autocast in which the step computes.
        self.eps, self.input_std, self.rounding, self.half = eps, input_std, rounding, half
        top = 1.5 * max(*eps, 0.1)
        self.grid = tuple(top * i / POINTS for i in range(POINTS + 1))
        self.metric = CertifiedAccuracy((*eps, *self.grid[1:]), 1.0, input_std)
        self.metric.verify = False  # Scores are compared with the model's before they get there.
        self.clean = CertifiedAccuracy((0.0,), 1.0)
        self.largest = MaxMetric(nan_strategy="disable")
        self.bounds: dict[tuple[int, ...], Bound] = {}
        self.warned = False

    def to(self, device: Any) -> CertifiedPass:
        """Keep counts on ``device``."""
        for metric in (self.metric, self.clean, self.largest):
            metric.to(device)
        return self

    def bound(self, module: nn.Module, inputs: Any) -> Bound:
        """Return the model's bound for inputs of this shape."""
        if not isinstance(inputs, Tensor):
            raise UnsoundError(f"the model's input is {type(inputs).__name__}, not one tensor -> give it one")
        shape = tuple(inputs.shape[1:])
        if shape not in self.bounds:
            self.bounds[shape] = lipschitz_bound(score_module(module)[1], inputs[:1])
        return self.bounds[shape]

    def update(self, module: nn.Module, scores: Tensor, fields: Fields, head: nn.Module | None = None) -> None:
        """Certify one batch; targets other than classes are left out, with a warning.

        Args:
            module: The model.
            scores: That the evaluation step computed.
            fields: Of the batch.
            head: The layer that gave the scores; None if they are the model's output.

        Raises:
            UnsoundError: The scores are not those of the model, of which the bound is, for these inputs.
        """
        target = classes_of(fields)
        if target is None:
            if not self.warned:
                warnings.warn(
                    "aol certifies classes, but the targets are no class numbers: nothing is certified", stacklevel=2
                )
            self.warned = True
            return
        bound = self.metric.lipschitz = self.bound(module, fields.inputs)
        scores = self._scores(bound, module, scores, fields.inputs, head)
        self.clean.update(scores, target)
        covered = fields.inputs if self._covers(bound, module, scores, fields.inputs) else None
        with torch.autocast(scores.device.type, enabled=False):
            self.metric.update(scores, target, covered)
        if covered is not None:
            norms = covered.detach().double().flatten(1).norm(dim=1)
            constant = total_lipschitz(bound if bound.head is None else bound.head.body, self.input_std)
            self.largest.update(2 * bound.rounding.error(norms) / constant)

    def _covers(self, bound: Bound, module: nn.Module, scores: Tensor, inputs: Tensor) -> bool:
        """Tell whether rounding is in the certificates of this batch; a warning where it should be and cannot."""
        with torch.autocast(scores.device.type, enabled=False):
            reason = bound.rounding.unknown or not_standard(scores.device) or half_precision(scores)
        if not reason and is_shifted(module, scores):
            reason = "a correction is added to them"
        if not reason and not scores.dtype == inputs.dtype == bound.rounding.dtype:
            reason = f"inputs are {inputs.dtype} and scores {scores.dtype}"
        if reason and self.rounding:
            self.rounding = False
            warnings.warn(
                f"aol certifies exact arithmetic, as the rounding of the scores has no bound ({reason})", stacklevel=2
            )
        return self.rounding

    def _scores(
        self, bound: Bound, module: nn.Module, scores: Tensor, inputs: Tensor, head: nn.Module | None
    ) -> Tensor:
        """Return what the bound is about: the model's output in the weights' precision.

        These are the captured scores, if they are the same. Those are float32, also of a float64 model.
        """
        double = any(p.dtype == torch.float64 for p in module.parameters())
        half, kind = self.half or half_dtype(scores), inputs.device.type
        model = score_module(module)[1]
        with torch.autocast(kind, dtype=half, enabled=half is not None):
            apart = _distance(model, scores, inputs, head, 1e-4 if half is None else 2e-2)
        norm = inputs.detach().double().flatten(1).norm(dim=1).max()
        explained = 1e-6 if bound.rounding.unknown else 2 * float(bound.rounding.error(norm))
        if apart <= explained and half is None and not double:
            return scores
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            output: Tensor = model(inputs.double() if double else inputs.float())
        return output if double else output.float()

    def compute(self) -> Result | None:
        """Return the result of all ranks; None if there was nothing to certify."""
        with warnings.catch_warnings():
            # A rank without batches, or targets that are no classes: told elsewhere, and the others wait for this one.
            warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
            values, clean = self.metric.compute().tolist(), float(self.clean.compute())
            largest = float(self.largest.compute())
            with self.metric.sync_context():
                samples = int(self.metric.total)
        if not samples or any(map(math.isnan, values)):
            return None
        curve = tuple(zip(self.grid, (clean, *values[len(self.eps) :]), strict=True))
        constant = max(map(float, self.bounds.values()), default=math.nan) / smallest_std(self.input_std)
        certified = dict(zip(self.eps, values, strict=False))
        return Result(clean, certified, curve, constant, samples, largest if math.isfinite(largest) else math.nan)


def _distance(model: nn.Module, scores: Tensor, inputs: Tensor, head: nn.Module | None, tolerance: float) -> float:
    """Return how far ``scores`` are from the output of ``model``; infinite if they are what its ``head`` gives inside.

    Raises:
        UnsoundError: They are neither: the step computes another function than the model does.
    """
    shifted = any(map(shift_hooks, model.modules()))
    # Offsets may differ from row to row, so all rows have to be there.
    rows = torch.arange(len(inputs)) if shifted else some_rows(len(inputs))
    captured: list[Any] = []
    handle = head.register_forward_hook(lambda *given: captured.append(given[2])) if head is not None else None
    try:
        with torch.no_grad():
            output = model(inputs[rows])
    finally:
        if handle is not None:
            handle.remove()
    if not isinstance(output, Tensor):
        raise UnsoundError(f"the model returns {type(output).__name__}, not one tensor of scores -> return the scores")
    wanted = scores[rows].float()
    limit = tolerance * float(wanted.flatten(1).norm(dim=1).amax())
    distances = [_difference(found, wanted) for found in (output, *captured)]
    if min(distances) > limit:
        raise UnsoundError(
            "the scores of the step are not those of the model for the batch's inputs (they differ by "
            f"{min(distances):.3g}), so its certificate would be about something else -> if the step changes the "
            "inputs, as self(standardise(x)) does, do it inside forward, or in the data set with AOL(input_std=...); "
            "or certify nothing, with AOL(log=False)"
        )
    return distances[0]


def _difference(found: Any, wanted: Tensor) -> float:
    """Return the largest distance of a row of scores; infinite where shapes differ."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return math.inf
    return float((found.float() - wanted).flatten(1).norm(dim=1).amax())


def classes_of(fields: Fields) -> Tensor | None:
    """Return the targets, if they are class numbers: one integer for each row.

    Example:
        >>> classes_of(Fields(torch.rand(2, 3), targets=torch.rand(2))) is None
        True
    """
    target = fields.targets
    return target if isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point() else None


def warn_of_range(inputs: Any, input_std: Any = None) -> None:
    """Warn of images that are not in [0, 1]: radii are in the units of the input.

    Example:
        >>> warn_of_range(torch.rand(4, 3))
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or input_std is not None or not inputs.numel():
        return
    low, high = float(inputs.min()), float(inputs.max())
    if low < -1e-3 or high > 1 + 1e-3:
        warnings.warn(
            f"inputs range from {low:.3g} to {high:.3g}, not in [0, 1]: certified radii are in these units. If the "
            "data is divided by a standard deviation, pass AOL(input_std=...); if pixels are 0 to 255, divide by 255",
            stacklevel=2,
        )
