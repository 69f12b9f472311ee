"""Certificates as torchmetrics: they add up over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from groundwire_aol.certify.certificates import RADII, certified_radius, check_radii, smallest_std, total_lipschitz


class CertifiedAccuracy(Metric):
    """Fraction of samples that are predicted right and certified at each radius, see ``certified_accuracy``.

    Args:
        eps: Radii in L2, in units of undivided pixels; 0 gives the clean accuracy.
        lipschitz: Bound of the model, a number or a :class:`groundwire_aol.Bound`; it may change between updates.
        input_std: Deviations that the data was divided by, outside the model.
        kwargs: Of :class:`torchmetrics.Metric`.

    Shape:
        ``update(logits, target, inputs=None)`` takes (B, K), (B,) and (B, ...); ``compute()`` gives (len(eps),).

    Example:
        >>> metric = CertifiedAccuracy(eps=(0.0, 1.0))
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor([1.0000, 0.5000])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    certified: Tensor
    total: Tensor

    def __init__(
        self, eps: Sequence[float] = RADII, lipschitz: Any = 1.0, input_std: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.eps = tuple(check_radii(eps).tolist())
        self.input_std = input_std
        smallest_std(input_std)
        self.lipschitz = lipschitz
        total_lipschitz(lipschitz, input_std)
        self.add_state("certified", torch.zeros(len(self.eps), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, inputs: Tensor | None = None) -> None:
        """Add a batch; with ``inputs``, radii cover the rounding of the scores (``lipschitz`` must be a Bound)."""
        radii = certified_radius(logits, target, self.lipschitz, input_std=self.input_std, inputs=inputs)
        limits = torch.tensor(self.eps, dtype=torch.float64, device=radii.device)
        self.certified += (radii[:, None] > limits).sum(0).to(self.certified.device)
        self.total += len(radii)

    def compute(self) -> Tensor:
        """One accuracy per radius, float32; NaN before any sample."""
        return self.certified / self.total


class CertifiedRadius(Metric):
    """Mean certified radius in L2 (0 for wrong predictions), see :func:`groundwire_aol.certified_radius`.

    Args:
        lipschitz: Bound of the model.
        input_std: Deviations that the data was divided by, outside the model.
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = CertifiedRadius()
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.7071)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    radii: Tensor
    total: Tensor

    def __init__(self, lipschitz: Any = 1.0, input_std: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lipschitz, self.input_std = lipschitz, input_std
        total_lipschitz(lipschitz, input_std)
        self.add_state("radii", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, inputs: Tensor | None = None) -> None:
        """Add a batch; with ``inputs``, radii cover the rounding of the scores (``lipschitz`` must be a Bound)."""
        radii = certified_radius(logits, target, self.lipschitz, input_std=self.input_std, inputs=inputs)
        self.radii += radii.sum().to(self.radii)
        self.total += len(radii)

    def compute(self) -> Tensor:
        """The mean, float32; NaN before any sample."""
        return (self.radii / self.total).float()
