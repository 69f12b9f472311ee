"""Demographic parity as a term of a loss, for any training loop in torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def demographic_parity_penalty(
    probabilities: Tensor, groups: Tensor, sample_weight: Tensor | None = None, smooth: float = 1e-8
) -> Tensor:
    r"""The largest difference between two groups in mean probability, differentiable.

    .. math:: \max_{g,h} s(\bar p_g - \bar p_h), \quad s(r) = r^2 / \sqrt{r^2 + \epsilon} \approx |r|

    Args:
        probabilities: (B,) probability of the positive label, or (B, K) of K labels: the largest gap of any label.
        groups: (B,) integers of any values.
        sample_weight: (B,) weights of the rows in the means.
        smooth: epsilon; keeps the gradient finite where the gap is 0.

    Returns:
        A scalar in [0, 1]; 0 (with zero gradient) if the batch has fewer than two groups.

    Raises:
        ValueError: Shapes do not fit.

    Example:
        >>> demographic_parity_penalty(torch.tensor([0.9, 0.7, 0.3]), torch.tensor([0, 0, 1])).round(decimals=3)
        tensor(0.5000)
    """
    if groups.shape != probabilities.shape[:1] or (sample_weight is not None and sample_weight.shape != groups.shape):
        raise ValueError(f"probabilities {tuple(probabilities.shape)} and groups {tuple(groups.shape)} do not fit")
    scores = probabilities.unsqueeze(-1) if probabilities.dim() == 1 else probabilities
    weight = torch.ones_like(scores[:, 0]) if sample_weight is None else sample_weight.to(scores.dtype)
    weight = weight * _members(groups).to(scores.dtype)
    total = weight.sum(1, keepdim=True)
    means = ((weight @ scores) / total.clamp(min=torch.finfo(scores.dtype).tiny))[total[:, 0] > 0]
    if len(means) < 2:
        return scores.sum() * 0
    gap = means.amax(0) - means.amin(0)
    return (gap.square() / (gap.square() + smooth).sqrt()).amax()


class DemographicParityLoss(nn.Module):
    """Cross-entropy plus ``strength`` times :func:`demographic_parity_penalty`.

    Args:
        strength: Weight of the penalty, at least 0; the published experiments use 0.5.
        class_balanced: Weight the classes of a batch equally, as the published learner does. It costs accuracy.
        smooth: See the penalty.

    Raises:
        ValueError: ``strength`` is negative.

    Example:
        >>> loss = DemographicParityLoss(strength=0.5)
        >>> loss(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]), groups=torch.tensor([0, 1])).round(decimals=3)
        tensor(0.5260)
    """

    def __init__(self, strength: float = 0.5, *, class_balanced: bool = False, smooth: float = 1e-8) -> None:
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"strength must be at least 0, got {strength}")
        self.strength, self.class_balanced, self.smooth = strength, class_balanced, smooth

    def forward(
        self, logits: Tensor, targets: Tensor, *, groups: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (B,) or (B, 1) of the label 1, or (B, K) of K labels.
            targets: (B,) integer labels.
            groups: (B,) integer groups.
            sample_weight: (B,) weights of the rows, in both terms.
        """
        logits = logits.squeeze(-1) if logits.dim() == 2 and logits.shape[1] == 1 else logits
        weight = torch.ones_like(logits.flatten(1)[:, 0] if logits.dim() > 1 else logits)
        weight = weight if sample_weight is None else weight * sample_weight
        if logits.dim() == 1:
            losses = nn.functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
            probabilities = logits.sigmoid()
        else:
            losses = nn.functional.cross_entropy(logits, targets.long(), reduction="none")
            probabilities = logits.softmax(-1)
        entropy = (
            _class_means(losses, targets, weight) if self.class_balanced else (losses * weight).sum() / weight.sum()
        )
        return entropy + self.strength * demographic_parity_penalty(probabilities, groups, weight, self.smooth)


def _members(values: Tensor) -> Tensor:
    """(V, B) bool: which rows have each of the V different values."""
    different: Tensor = torch.unique(values)
    return different.unsqueeze(1) == values.unsqueeze(0)


def _class_means(losses: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean over classes of the weighted mean loss of each."""
    members = _members(targets)
    means = [(losses * weight * here).sum() / (weight * here).sum().clamp(min=1e-12) for here in members]
    return torch.stack(means).mean()
