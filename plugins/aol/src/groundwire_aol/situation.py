"""What is known around one step when the error is bounded that its rounding adds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groundwire_aol.step import Step

#: Unit roundoff.
UNITS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
#: Elementwise functions that IEEE 754 does not fix are taken to be right to this many u times max(|x|, 1).
APPROXIMATE = 16


@dataclass(frozen=True)
class Affine:
    """``offset + slope ||x||``, x the model's input."""

    offset: float = 0.0
    slope: float = 0.0

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.offset + other.offset, self.slope + other.slope)

    def __mul__(self, factor: float) -> Affine:
        return Affine(self.offset * factor, self.slope * factor)

    def largest(self, other: Affine) -> Affine:
        """At least both."""
        return Affine(max(self.offset, other.offset), max(self.slope, other.slope))


@dataclass(frozen=True)
class Situation:
    """A step, and bounds of what is around it.

    Attributes:
        step: The step.
        layer: Its layer, None for a function.
        value: What it computed for two rows.
        unit: u of the dtypes in it, the larger one.
        inputs: Bound of the norms of the computed inputs, added up.
        reached: What the step makes of them at most, without constants.
        size: Bound of the norm of the result of exact arithmetic on the computed inputs.
    """

    step: Step
    layer: Any
    value: Any
    unit: float
    inputs: Affine
    reached: Affine
    size: Affine

    @property
    def entries(self) -> int:
        """Of one sample of the result."""
        tensors = [self.value] if isinstance(self.value, Tensor) else [t for t in self.value if isinstance(t, Tensor)]
        return sum(t[0].numel() for t in tensors)

    @property
    def sample(self) -> Tensor:
        """The first argument, a tensor of two rows."""
        found: Tensor = self.step.args[0] if self.step.args else next(iter(self.step.kwargs.values()))
        return found

    @property
    def few(self) -> Affine:
        """A few operations on each entry, none larger than what comes in or out."""
        return (self.size + self.reached) * (4 * self.unit)

    def sums(self, terms: int) -> Affine:
        """Sums of so many nonnegative multiples of entries."""
        return self.reached * gamma(terms + 4, self.unit)

    def approximate(self, scale: float = 1.0) -> Affine:
        """One function of each entry that is not fixed by IEEE 754."""
        whole = self.reached + self.inputs * 2.0 + Affine(math.sqrt(self.entries) * 2 * max(1.0, scale))
        return whole * (APPROXIMATE * self.unit)


def gamma(terms: int, unit: float) -> float:
    """``n u / (1 - n u)``: relative to the sum of absolute values, what a sum of n products is wrong by at most.

    Example:
        >>> gamma(1, 0.25), gamma(4, 0.25)
        (0.3333333333333333, inf)
    """
    return terms * unit / (1 - terms * unit) if terms * unit < 0.5 else math.inf


def smallest_normal(dtype: torch.dtype) -> float:
    """What may be lost below the range of the dtype, also where denormal numbers are flushed to zero."""
    return torch.finfo(dtype).smallest_normal


def expanded_norm(channels: Tensor | None, at: Situation) -> float:
    """Norm of one value per channel, at all positions of the result."""
    if channels is None:
        return 0.0
    return float(channels.detach().double().norm()) * math.sqrt(at.entries / channels.numel())
