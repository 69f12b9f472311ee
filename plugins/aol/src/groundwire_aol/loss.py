"""The loss of the AOL paper: cross-entropy that asks for a margin."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class OffsetCrossEntropy(nn.Module):
    r"""``T * CE((s - o * p) / T, p)``: the right score must lead by about ``o`` (section 5 of the paper).

    A larger offset trades clean accuracy for certified accuracy at larger radii: ``sqrt(2) * 2 * eps`` aims at radius
    eps.

    Args:
        offset: o, at least 0. The paper's is sqrt(2); sqrt(2) / 4 keeps more clean accuracy.
        temperature: T, positive.
        reduction: "mean", "sum" or "none".

    Shape:
        Scores (B, K), targets (B,) as classes or (B, K) as probabilities p.

    Raises:
        ValueError: An argument is out of range, or a target has the wrong shape or class.

    Example:
        >>> loss = OffsetCrossEntropy(offset=1.0, temperature=0.25)
        >>> round(loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).item(), 4)
        0.1733
    """

    def __init__(self, offset: float = math.sqrt(2), temperature: float = 0.25, reduction: str = "mean") -> None:
        super().__init__()
        if not (math.isfinite(offset) and offset >= 0):
            raise ValueError(f"offset must be at least 0, got {offset}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be positive, got {temperature}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        self.offset, self.temperature, self.reduction = offset, temperature, reduction

    def extra_repr(self) -> str:
        """The settings."""
        return f"offset={self.offset:g}, temperature={self.temperature:g}"

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """The loss; a scalar unless ``reduction="none"``."""
        if target.is_floating_point():
            if target.shape != scores.shape:
                raise ValueError(f"soft targets must have shape {tuple(scores.shape)}, got {tuple(target.shape)}")
            shares = target
        else:
            _refuse_classes(scores, target)
            shares = nn.functional.one_hot(target.long(), scores.shape[1])
        shifted = (scores - self.offset * shares.to(scores.dtype)) / self.temperature
        loss = nn.functional.cross_entropy(
            shifted, target if target.is_floating_point() else target.long(), reduction=self.reduction
        )
        return self.temperature * loss


def _refuse_classes(scores: Tensor, target: Tensor) -> None:
    if target.shape != scores.shape[:1]:
        raise ValueError(f"target must have shape ({len(scores)},) or {tuple(scores.shape)}, got {tuple(target.shape)}")
    if (
        not torch.compiler.is_compiling()
        and len(target)
        and not 0 <= int(target.min()) <= int(target.max()) < scores.shape[1]
    ):
        raise ValueError(
            f"target has classes {int(target.min())} to {int(target.max())}, but there are {scores.shape[1]} scores"
        )
