"""How alike two maps of a row are: rank correlation, overlap of the top 10 %, and mass in a region."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from groundwire_bias_audit.maps import Maps


def likeness(first: Maps, second: Maps, mask: NDArray[np.bool_] | None) -> dict[str, NDArray[np.float64]]:
    """Each measure of each pair of rows of two sets of maps ``(n, positions)``; NaN where a map is constant.

    Example:
        >>> a = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
        >>> likeness(a, 2 * a, None)["spearman"].tolist()
        [1.0, nan]
    """
    pairs = list(zip(first, second, strict=True))
    found = {
        "spearman": np.array([_spearman(a, b) for a, b in pairs]),
        "top_overlap": np.array([_overlap(a, b) for a, b in pairs]),
    }
    if mask is not None:
        found["region_mass"] = _mass(second, mask) - _mass(first, mask)
    return found


def _spearman(a: Maps, b: Maps) -> float:
    return float("nan") if np.ptp(a) == 0 or np.ptp(b) == 0 else float(spearmanr(a, b).statistic)


def _overlap(a: Maps, b: Maps) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    k = max(1, round(0.1 * len(a)))
    top = [set(np.argsort(-m, kind="stable")[:k].tolist()) for m in (a, b)]
    return len(top[0] & top[1]) / len(top[0] | top[1])


def _mass(maps: Maps, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    total = np.abs(maps).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, np.abs(maps[:, mask]).sum(axis=1) / total, np.nan)
