"""From the labels of a batch to counts, on the device that they are on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundwire.errors import PluginError


def class_scores(scores: Tensor, conv: bool) -> Tensor:
    """Scores with classes last and one row for each prediction: (N, K), in the order of the batch's rows.

    Args:
        scores: (B, ..., K) of a Linear, or (B, K, ...) of a convolution.
        conv: Which of the two.

    Example:
        >>> class_scores(torch.zeros(2, 3, 4, 4), conv=True).shape
        torch.Size([32, 3])
    """
    last = scores.movedim(1, -1) if conv else scores
    return last.reshape(-1, last.shape[-1])


def two_columns(scores: Tensor) -> Tensor:
    """The single logit z of a binary head as the two logits (0, z).

    Example:
        >>> two_columns(torch.tensor([[2.0]]))
        tensor([[0., 2.]])
    """
    return torch.cat([torch.zeros_like(scores), scores], dim=-1) if scores.shape[-1] == 1 else scores


@dataclass(frozen=True)
class Labels:
    """Labels of N predictions.

    Attributes:
        hard: The class of each, or the one with the largest share; (N,), int64, in 0..K-1.
        shares: Class shares (N, K) in float32 where a label is not one class; None where each is.
        known: Which predictions have a label, (N,), bool.
        classes: K.
    """

    hard: Tensor
    shares: Tensor | None
    known: Tensor
    classes: int

    def rows(self, which: Tensor) -> Labels:
        """Those of some predictions."""
        shares = None if self.shares is None else self.shares[which]
        return Labels(self.hard[which], shares, self.known[which], self.classes)

    def counts(self, weights: Tensor) -> Tensor:
        """Weighted sums by class, shape (K,), in the dtype of ``weights`` (N,)."""
        if self.shares is not None:
            return weights @ self.shares.to(weights.dtype)
        zeros = torch.zeros(self.classes, dtype=weights.dtype, device=weights.device)
        return zeros.scatter_add_(0, self.hard, weights)

    def losses(self, scores: Tensor) -> Tensor:
        """Cross-entropy of each prediction, shape (N,)."""
        targets = self.hard if self.shares is None else self.shares
        return nn.functional.cross_entropy(scores, targets, reduction="none")


def labels_of(targets: Any, classes: int, predictions: int, conv: bool = False) -> Labels:
    """The labels that ``targets`` hold.

    Args:
        targets: Class indices (negative ones and NaN are masked), a single binary column of 0 and 1, or class shares
            that sum to one (mixup, label smoothing), one for each prediction.
        classes: K.
        predictions: N, the number of predictions of the batch.
        conv: Whether class shares have their classes in dimension 1.

    Raises:
        PluginError: The targets fit neither; or they are several independent labels for each row (multi-label).

    Example:
        >>> labels_of(torch.tensor([1, -100]), 2, 2).known.tolist()
        [True, False]
    """
    if not isinstance(targets, Tensor):
        targets = torch.as_tensor(targets)
    if targets.numel() == predictions:
        return _indices(targets.reshape(-1), classes)
    shares = class_scores(targets, conv).to(torch.float32, copy=True)  # a loader may use its tensors again
    if targets.is_floating_point() and shares.shape == (predictions, classes):
        if not bool(torch.allclose(shares.sum(dim=1), torch.ones(1, device=shares.device), atol=1e-3)):
            raise PluginError(
                "the targets are several independent labels for each row, and LIMES corrects one class of K -> "
                "give class indices, or class shares that sum to 1"
            )
        known = torch.ones(predictions, dtype=torch.bool, device=shares.device)
        return Labels(shares.argmax(dim=1), shares, known, classes)
    raise PluginError(
        f"targets of shape {tuple(targets.shape)} do not fit {predictions} predictions of {classes} classes -> "
        "tell which part of the batch they are: Plugins(fields=lambda batch: Fields(inputs, targets=...))"
    )


def _indices(flat: Tensor, classes: int) -> Labels:
    """Whole numbers, or a binary column, of which a smoothed target such as 0.9 counts for both classes."""
    if flat.is_floating_point():
        flat = flat.nan_to_num(nan=-1.0)
    whole = flat.round().long() if flat.is_floating_point() else flat.long()
    hard = whole.clamp(0, classes - 1)
    # Only where reading a value would wait for the device is a class of K or more not refused before.
    known = whole == hard
    if not flat.is_floating_point() or classes != 2:
        return Labels(hard, None, known, classes)
    positive = flat.float().clamp(0, 1)
    return Labels(hard, torch.stack([1 - positive, positive], dim=1), known, classes)


def refuse_unknown_labels(targets: Any, classes: int) -> None:
    """Raise for a class index that the head has no score for.

    Raises:
        PluginError: It names the label and the head's number of classes; or the targets are of a regression.

    Example:
        >>> refuse_unknown_labels(torch.tensor([0, 1]), 2)
    """
    if not isinstance(targets, Tensor) or targets.device.type != "cpu" or not targets.numel():
        return
    if targets.dim() == 1 and targets.is_floating_point() and bool((targets.frac().abs() > 0).any()):
        raise PluginError("the targets have fractions, so they are no classes -> LIMES is for classification")
    if (largest := float(targets.max())) >= classes:
        raise PluginError(
            f"label {largest:.0f} is in a training batch, and the head has {classes} classes (0 to "
            f"{classes - 1}) -> give the head a score for it, or mask such rows with a negative label"
        )
