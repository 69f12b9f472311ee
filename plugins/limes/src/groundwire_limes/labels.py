"""From the labels of a batch to counts, on the device that they are on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


def soft_labels(targets: Any, classes: int, predictions: int, conv: bool = False) -> tuple[Tensor, Tensor]:
    """Labels as rows of class shares, and which rows count.

    Args:
        targets: Class indices (negative ones are masked), a single binary column of 0 and 1, or class shares that sum
            to one (mixup, label smoothing), one for each prediction.
        classes: K.
        predictions: N, the number of predictions of the batch.
        conv: Whether class shares have their classes in dimension 1.

    Returns:
        Shares (N, K) in float32, and a mask (N,). A label of K or more has shares 0.

    Raises:
        PluginError: The labels fit neither; or they are several independent ones for each row (multi-label).

    Example:
        >>> soft_labels(torch.tensor([1, -100]), 2, 2)[0].tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    if not isinstance(targets, Tensor):
        targets = torch.as_tensor(targets)
    if targets.numel() == predictions:
        flat = targets.reshape(-1)
        hard = flat.round().long() if targets.is_floating_point() else flat.long()
        inside = hard.clamp(0, classes - 1)
        shares = torch.nn.functional.one_hot(inside, classes).float() * (hard < classes)[:, None]
        return _fractions(flat, shares, classes), hard >= 0
    shares = class_scores(targets, conv).float()
    if targets.is_floating_point() and shares.shape == (predictions, classes):
        if not bool(torch.allclose(shares.sum(dim=1), torch.ones(1, device=shares.device), atol=1e-3)):
            raise PluginError(
                "the targets are several independent labels for each row, and LIMES corrects one class of K -> "
                "give class indices, or class shares that sum to 1"
            )
        return shares, torch.ones(predictions, dtype=torch.bool, device=shares.device)
    raise PluginError(
        f"targets of shape {tuple(targets.shape)} do not fit {predictions} predictions of {classes} classes -> "
        "tell which part of the batch they are: Plugins(fields=lambda batch: Fields(inputs, targets=...))"
    )


def _fractions(flat: Tensor, shares: Tensor, classes: int) -> Tensor:
    """A smoothed binary target such as 0.9 counts for both classes."""
    if not flat.is_floating_point() or classes != 2:
        return shares
    positive = flat.float().clamp(0, 1)
    return torch.stack([1 - positive, positive], dim=1)


def refuse_unknown_labels(targets: Any, classes: int) -> None:
    """Raise for a class index that the head has no score for.

    Raises:
        PluginError: It names the label and the head's number of classes.

    Example:
        >>> refuse_unknown_labels(torch.tensor([0, 1]), 2)
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or not targets.numel():
        return
    if targets.device.type == "cpu" and int(targets.max()) >= classes:
        raise PluginError(
            f"label {int(targets.max())} is in a training batch, and the head has {classes} classes (0 to "
            f"{classes - 1}) -> give the head a score for it, or mask such rows with a negative label"
        )
