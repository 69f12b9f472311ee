"""Certificates as torchmetrics: they add up over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from groundwire_aol.certify.certificates import RADII, REQUIRED, check_radii, radii_of, total_lipschitz


class _Certificates(Metric):
    """Counts of samples, and of those whose certificate is one of exact arithmetic."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    exact: Tensor

    def __init__(self, lipschitz: Any, input_std: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lipschitz, self.input_std, self.verify = lipschitz, input_std, True
        total_lipschitz(lipschitz, input_std)
        for name in ("total", "exact"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def add(self, logits: Tensor, target: Tensor, inputs: Tensor | None) -> Tensor:
        """Count a batch, and return its radii."""
        radii = radii_of(logits, target, self.lipschitz, input_std=self.input_std, inputs=inputs, verify=self.verify)
        self.total += len(radii)
        self.exact += len(radii) if inputs is None else 0
        return radii

    @property
    def arithmetic(self) -> str:
        """Arithmetic of the certificates so far: "floating" if all cover the rounding of the scores, else "exact"."""
        return "floating" if int(self.total) and not int(self.exact) else "exact"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(arithmetic={self.arithmetic!r})"


class CertifiedAccuracy(_Certificates):
    """Fraction of samples that are predicted right and certified at each radius, see ``certified_accuracy``.

    Args:
        eps: Radii in L2, in units of undivided pixels; 0 gives the clean accuracy.
        lipschitz: Bound of the model, a :class:`groundwire_aol.Bound` or a number that you vouch for; it may change
            between updates.
        input_std: Deviations that the data was divided by, outside the model.
        kwargs: Of :class:`torchmetrics.Metric`.

    Attributes:
        arithmetic: "floating" where all certificates cover the rounding of the scores, "exact" otherwise.

    Shape:
        ``update(logits, target, inputs=None)`` takes (B, K), (B,) and (B, ...); ``compute()`` gives (len(eps),).

    Example:
        >>> metric = CertifiedAccuracy(eps=(0.0, 1.0), lipschitz=1.0)
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor([1.0000, 0.5000])
    """

    certified: Tensor

    def __init__(
        self, eps: Sequence[float] = RADII, lipschitz: Any = REQUIRED, input_std: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(lipschitz, input_std, **kwargs)
        self.eps = tuple(check_radii(eps).tolist())
        self.add_state("certified", torch.zeros(len(self.eps), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, inputs: Tensor | None = None) -> None:
        """Add a batch; with ``inputs``, radii cover the rounding of the scores (``lipschitz`` must be a Bound)."""
        radii = self.add(logits, target, inputs)
        limits = torch.tensor(self.eps, dtype=torch.float64, device=radii.device)
        self.certified += (radii[:, None] > limits).sum(0).to(self.certified.device)

    def compute(self) -> Tensor:
        """One accuracy per radius, float32; NaN before any sample."""
        return self.certified / self.total


class CertifiedRadius(_Certificates):
    """Mean certified radius in L2 (0 for wrong predictions), see :func:`groundwire_aol.certified_radius`.

    Args:
        lipschitz: Bound of the model.
        input_std: Deviations that the data was divided by, outside the model.
        kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = CertifiedRadius(lipschitz=1.0)
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.7071)
    """

    radii: Tensor

    def __init__(self, lipschitz: Any = REQUIRED, input_std: Any = None, **kwargs: Any) -> None:
        super().__init__(lipschitz, input_std, **kwargs)
        self.add_state("radii", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, inputs: Tensor | None = None) -> None:
        """Add a batch; with ``inputs``, radii cover the rounding of the scores (``lipschitz`` must be a Bound)."""
        radii = self.add(logits, target, inputs)
        self.radii += radii.sum().to(self.radii)

    def compute(self) -> Tensor:
        """The mean, float32; NaN before any sample."""
        return (self.radii / self.total).float()
