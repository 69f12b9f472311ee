"""The learners and baselines of the protocol: linear classifiers on what a filter leaves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from groundwire_flea import reweighing
from groundwire_flea.distances.pair_batches import Design, PaddedRows
from groundwire_flea.distances.solver import Objective, minimize

#: Probabilities of label 1 for rows.
Model = Callable[[np.ndarray], np.ndarray]
STRENGTH = 0.5


def linear(x: np.ndarray, y: np.ndarray, weight: np.ndarray, gap: np.ndarray, ridge: float = 0.0) -> Model:
    """The minimum of weighted cross-entropy + |gap . probabilities|, which has no other penalty."""
    shift, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)

    def design(rows: np.ndarray) -> np.ndarray:
        return np.column_stack([(rows - shift) / scale, np.ones(len(rows))])

    padded = PaddedRows(torch.from_numpy(design(x))[None])
    rows = [torch.from_numpy(np.asarray(v, dtype=float))[None] for v in (y, weight, gap)]
    zero = torch.zeros(1, x.shape[1] + 1, dtype=torch.float64)
    designs = [Design(padded, torch.zeros(1, dtype=torch.long))]
    start = minimize(Objective(designs, *rows[:2], torch.zeros_like(rows[2]), zero + ridge), zero)
    theta = minimize(Objective(designs, *rows, zero + ridge), start)[0].numpy()
    return lambda new: 1 / (1 + np.exp(-np.clip(design(new) @ theta, -30, 30)))


def unaware(x: np.ndarray, y: np.ndarray, a: np.ndarray) -> Model:
    return linear(x, y, np.full(len(y), 1 / len(y)), np.zeros(len(y)))


def group_gap(a: np.ndarray) -> np.ndarray:
    return (a == 1) / max((a == 1).sum(), 1) - (a == 0) / max((a == 0).sum(), 1)


def fair_reg(x: np.ndarray, y: np.ndarray, a: np.ndarray) -> Model:
    """The published regulariser: cross-entropy with balanced classes, and half the demographic-parity gap."""
    balanced = (y == 1) / max((y == 1).sum(), 1) / 2 + (y == 0) / max((y == 0).sum(), 1) / 2
    return linear(x, y, balanced, STRENGTH * group_gap(a))


def fair_reg_plain(x: np.ndarray, y: np.ndarray, a: np.ndarray) -> Model:
    """The same without balancing the classes."""
    return linear(x, y, np.full(len(y), 1 / len(y)), STRENGTH * group_gap(a))


def reweighed(x: np.ndarray, y: np.ndarray, a: np.ndarray) -> Model:
    """Exact Kamiran-Calders weights in place of the published resampling."""
    return linear(x, y, reweighing(y, sensitive_features=a) / len(y), np.zeros(len(y)))


LEARNERS: dict[str, Callable[..., Model]] = {
    "fair-reg": fair_reg,
    "fair-reg, classes not balanced": fair_reg_plain,
    "resample": reweighed,
    "unaware": unaware,
}


def vote(models: list[Model]) -> Model:
    """The robust ensemble: one model for each source, the median of their probabilities."""
    return lambda new: np.median([model(new) for model in models], axis=0)


def konstantinov(disc: np.ndarray, sizes: np.ndarray, d: int, malicious: int) -> np.ndarray:
    """Konstantinov et al. (2020): keep sources whose discrepancy to more than ``malicious`` others is small."""
    m = (sizes[:, None] + sizes[None]) / 2
    threshold = np.sqrt((8 * d * (1 + np.log(2 * m / d)) + 8 * np.log(8 * len(sizes) / 0.1)) / m)
    np.fill_diagonal(threshold, 2)
    kept = (disc <= threshold).sum(1) > malicious
    return kept if kept.any() else np.ones_like(kept)


def quality(model: Model, x: np.ndarray, y: np.ndarray, a: np.ndarray) -> tuple[float, float]:
    """Accuracy and fairness in percent: 100 (1 - demographic-parity gap)."""
    predicted = model(x) >= 0.5
    gap = abs(predicted[a == 0].mean() - predicted[a == 1].mean())
    return 100 * float((predicted == y).mean()), 100 * float(1 - gap)
