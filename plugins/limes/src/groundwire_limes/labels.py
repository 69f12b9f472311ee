"""Labels of a batch: hard, soft, binary or masked; on the device that they are on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from groundwire.errors import PluginError


def class_scores(scores: Tensor, conv: bool) -> Tensor:
    """Return scores with classes last and one row for each prediction: (N, K), in the order of the batch's rows.

    Args:
        scores: (B, ..., K) of a Linear, or (B, K, ...) of a convolution.
        conv: Which of the two.

    Example:
        >>> class_scores(torch.zeros(2, 3, 4, 4), conv=True).shape
        torch.Size([32, 3])
    """
    last = scores.movedim(1, -1) if conv else scores
    return last.reshape(-1, last.shape[-1])


def as_two_logits(scores: Tensor) -> Tensor:
    """Return the single logit z of a binary head as the two logits (0, z), and other scores as they are.

    Example:
        >>> as_two_logits(torch.tensor([[2.0]]))
        tensor([[0., 2.]])
    """
    return torch.cat([torch.zeros_like(scores), scores], dim=-1) if scores.shape[-1] == 1 else scores


@dataclass(frozen=True)
class Labels:
    """Labels of N predictions.

    Attributes:
        hard: The class of each, or the one with the largest share; (N,), int64, in 0..K-1.
        shares: Class shares (N, K) in float32 where a label is not one class; None where each is.
        known: Which predictions have a label, (N,), bool; None if each does.
        classes: K.
    """

    hard: Tensor
    shares: Tensor | None
    known: Tensor | None
    classes: int

    def rows(self, which: Tensor) -> Labels:
        """Return those of some predictions."""
        shares, known = (None if part is None else part[which] for part in (self.shares, self.known))
        return Labels(self.hard[which], shares, known, self.classes)

    def weights(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return 1 for each prediction that has a label and 0 for the others, shape (N,); not to be written to."""
        return _ones(len(self.hard), dtype, self.hard.device) if self.known is None else self.known.to(dtype)

    def counts(self, weights: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return weighted sums by class, (K,), in the dtype of ``weights`` (N,), added to ``onto`` in place."""
        if onto is None:
            onto = torch.zeros(self.classes, dtype=weights.dtype, device=weights.device)
        if self.shares is not None:
            return onto.add_(weights @ self.shares.to(weights.dtype))
        return onto.scatter_add_(0, self.hard, weights)

    def pick(self, scores: Tensor) -> Tensor:
        """Return the labels' own ``scores``, of (N, K) or (K,), or their mean where a label has shares; shape (N,)."""
        if self.shares is not None:
            return (self.shares * scores).sum(dim=1)
        return scores[self.hard] if scores.dim() == 1 else scores.gather(1, self.hard[:, None]).squeeze(1)

    @classmethod
    def concatenated(cls, parts: Sequence[Labels]) -> Labels:
        """Return those of several batches, one after the other; all of one kind."""
        first = parts[0]
        shares = None if first.shares is None else torch.cat([p.shares for p in parts if p.shares is not None])
        known = None if first.known is None else torch.cat([p.known for p in parts if p.known is not None])
        return cls(torch.cat([p.hard for p in parts]), shares, known, first.classes)

    @property
    def kind(self) -> tuple[bool, bool]:
        """Kind of labels that can be concatenated: with shares or without, some masked or none."""
        return self.shares is None, self.known is None


@lru_cache(maxsize=4)
def _ones(predictions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(predictions, dtype=dtype, device=device)


def labels_of(targets: Any, classes: int, predictions: int, conv: bool = False, indices: bool = False) -> Labels:
    """Return the labels that ``targets`` hold.

    Args:
        targets: Class indices (negative ones and NaN are masked), a single binary column of 0 and 1, or class shares
            that sum to one (mixup, label smoothing), one for each prediction.
        classes: K.
        predictions: N, the number of predictions of the batch.
        conv: Whether class shares have their classes in dimension 1.
        indices: Whether :func:`check_class_indices` found nothing else in the targets.

    Raises:
        PluginError: The targets fit neither; or they are several independent labels for each row (multi-label).

    Example:
        >>> labels_of(torch.tensor([1, -100]), 2, 2).known.tolist()
        [True, False]
    """
    if not isinstance(targets, Tensor):
        targets = torch.as_tensor(targets)
    if indices and targets.numel() == predictions:
        return Labels(targets.reshape(-1).clone(), None, None, classes)
    if targets.numel() == predictions:
        return _indices(targets.reshape(-1), classes)
    if targets.is_floating_point() and targets.dim() > 1:
        shares = class_scores(targets, conv).to(torch.float32, copy=True)  # a loader may use its tensors again
        if shares.shape == (predictions, classes):
            return _shares(shares)
    raise PluginError(
        f"targets of shape {tuple(targets.shape)} do not fit {predictions} predictions of {classes} classes -> "
        "tell which part of the batch they are: Plugins(fields=lambda batch: Fields(inputs, targets=...)); if the "
        "model pools the scores of several places, let it pool features before the head"
    )


def _shares(shares: Tensor) -> Labels:
    if not bool(torch.allclose(shares.sum(dim=1), torch.ones(1, device=shares.device), atol=1e-3)):
        raise PluginError(
            "the targets are several independent labels for each row, and LIMES corrects one class of K -> "
            "give class indices, or class shares that sum to 1"
        )
    known = torch.ones(len(shares), dtype=torch.bool, device=shares.device)
    return Labels(shares.argmax(dim=1), shares, known, shares.shape[1])


def _indices(flat: Tensor, classes: int) -> Labels:
    """Return labels from whole numbers, or from a binary column, whose 0.9 counts for both classes."""
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


def check_class_indices(targets: Any, classes: int) -> bool:
    """Tell whether ``targets`` are nothing but whole numbers from 0 to K-1, where a look does not wait for a device.

    Raises:
        PluginError: There is a class index that the head has no score for; it names it and the number of classes. Or
            the targets are of a regression.

    Example:
        >>> check_class_indices(torch.tensor([0, 1]), 2), check_class_indices(torch.tensor([0, -100]), 2)
        (True, False)
    """
    if not isinstance(targets, Tensor) or targets.device.type != "cpu" or not targets.numel():
        return False
    least, largest = (float(t) for t in targets.aminmax())
    may_be_classes = targets.dim() > 1 or not targets.is_floating_point() or (classes == 2 and largest <= 1)
    if not may_be_classes and bool((targets.frac().abs() > 0).any()):
        raise PluginError("the targets have fractions, so they are no classes -> LIMES is for classification")
    if largest >= classes:
        raise PluginError(
            f"label {largest:.0f} is in a training batch, and the head has {classes} classes (0 to "
            f"{classes - 1}) -> give the head a score for it, or mask such rows with a negative label"
        )
    return targets.dtype == torch.int64 and least >= 0
