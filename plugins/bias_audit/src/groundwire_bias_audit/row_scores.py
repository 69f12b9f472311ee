"""Score metrics from the rows themselves, as scikit-learn and torchmetrics have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.metrics import auc, roc_curve
from torchmetrics.functional.classification import binary_calibration_error

from groundwire_bias_audit.functional import Floats
from groundwire_bias_audit.histogram import BAND
from groundwire_bias_audit.inputs import Outputs


@dataclass(frozen=True)
class Rows:
    """The rows themselves, for what sums cannot tell exactly."""

    outputs: Outputs
    weights: Floats | None = None


def top(outputs: Outputs) -> tuple[NDArray[Any], NDArray[Any]]:
    """Labels and scores ``(n, T)``; of a multiclass task whether the top class is right, and its score."""
    assert outputs.scores is not None
    if outputs.task == "multiclass":
        return outputs.correct[:, None].astype(np.uint8), outputs.scores.max(axis=1)[:, None]
    return outputs.labels, outputs.scores


def exact(rows: Rows, codes: NDArray[Any], groups: int) -> dict[str, Floats]:
    """AUC, calibration error and uncertainty ``[group, target]``; NaN where they are undefined.

    Args:
        rows: Labels, scores and weights.
        codes: Group of each row.
        groups: Number of groups.
    """
    labels, scores = top(rows.outputs)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(groups + 1))
    shape = (groups, scores.shape[1])
    found = {name: np.full(shape, np.nan) for name in ("roc_auc", "calibration_error", "uncertainty")}
    for group in range(groups):
        members = order[bounds[group] : bounds[group + 1]]
        for target in range(shape[1]) if len(members) else ():
            y, p = labels[members, target], scores[members, target]
            w = None if rows.weights is None else rows.weights[members]
            for name, function in (("roc_auc", _auc), ("calibration_error", _ece), ("uncertainty", _unsure)):
                found[name][group, target] = function(y, p, w)
    return found


def _auc(y: NDArray[Any], p: NDArray[Any], w: Floats | None) -> float:
    """As ``roc_auc_score``, which takes thrice as long over a group: it looks again at what was checked before."""
    if not 0 < y.sum() < len(y):
        return float("nan")
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        false_positive, true_positive, _ = roc_curve(y, p, sample_weight=w)
        return float(auc(false_positive, true_positive))


def _ece(y: NDArray[Any], p: NDArray[Any], w: Floats | None) -> float:
    if w is None:
        labels, scores = torch.as_tensor(y.astype(np.int64)), torch.as_tensor(p)
        return float(binary_calibration_error(scores, labels, n_bins=10, validate_args=False))
    bucket = np.searchsorted((np.arange(11) / 10).astype(p.dtype), p, side="right")
    gap = np.bincount(bucket, w * (p - y))
    return float(np.abs(gap).sum() / w.sum())


def _unsure(y: NDArray[Any], p: NDArray[Any], w: Floats | None) -> float:
    low, high = (p.dtype.type(end) for end in BAND)
    inside = (p > low) & (p < high)
    return float(np.average(inside, weights=w))
