"""Scores as probabilities, and the thresholds that make predictions of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax


def probabilities(values: NDArray[Any], from_logits: bool, axis: bool = False) -> NDArray[Any]:
    """Scores in [0, 1]; logits are refused unless announced.

    Raises:
        ValueError: A score is outside [0, 1].
    """
    if values.dtype.kind not in "biuf":
        raise ValueError(f"scores must be numbers, got type {values.dtype}")
    values = values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
    if from_logits:
        return np.asarray(softmax(values, axis=-1) if axis else expit(values))
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        outside = int(((values < 0) | (values > 1)).sum())
        raise ValueError(
            f"{outside} of {values.size} scores are outside [0, 1] (from {low:.4g} to {high:.4g}), as logits are "
            "-> pass from_logits=True if they are, or probabilities P(y=1)"
        )
    return values


def checked_threshold(threshold: float | Sequence[float], targets: int) -> Any:
    """One number, or one for each target.

    Raises:
        ValueError: A threshold is outside [0, 1], or there are not as many as targets.
    """
    values = np.asarray(threshold, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"threshold must be in [0, 1], got {threshold!r}")
    if values.ndim and values.shape != (targets,):
        raise ValueError(f"threshold must be one number or one for each of {targets} targets, got {threshold!r}")
    return float(values) if values.ndim == 0 else values


def sum_to_one(scores: NDArray[Any]) -> None:
    """Class probabilities, up to rounding.

    Raises:
        ValueError: A row does not sum to 1.
    """
    off = float(np.abs(scores.sum(axis=1) - 1).max())
    if off > 1e-3:
        raise ValueError(f"scores of a row must sum to 1, they are off by up to {off:.3g} -> pass probabilities")
