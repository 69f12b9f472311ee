"""An honest competitor: the same distances one pair at a time, with scikit-learn and SciPy.

Analytic gradients, no compilation, one start for each source shared by all of its pairs.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression


def distances(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> np.ndarray:
    """(n, n), disc + disp + disb of sources (x, y, a), x being standardised."""
    n = len(parts)
    starts = [logistic(x, (a == 0).astype(int), None, 1.0) for x, _, a in parts]
    disc, disp = np.zeros((n, n)), np.zeros((n, n))
    for i, one in enumerate(parts):
        for j, other in enumerate(parts):
            if i < j:
                disc[i, j] = disc[j, i] = discrepancy(*one[:2], *other[:2])
            if i != j:
                disp[i, j] = disparity(one[0], one[2], other[0], other[2], starts[i])
    share = np.array([a.mean() for _, _, a in parts])
    return disc + np.maximum(disp, disp.T) + np.abs(share[:, None] - share[None])


def logistic(x: np.ndarray, t: np.ndarray, weight: np.ndarray | None, c: float) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=c, max_iter=700).fit(x, t, sample_weight=weight)
    return np.append(model.coef_[0], model.intercept_)


def discrepancy(x: np.ndarray, y: np.ndarray, x2: np.ndarray, y2: np.ndarray) -> float:
    weight = np.concatenate([np.full(len(y), 1 / len(y)), np.full(len(y2), 1 / len(y2))])
    theta = logistic(np.concatenate([x, x2]), np.concatenate([y, 1 - y2]), weight, np.inf)
    errors = [((part @ theta[:-1] + theta[-1] >= 0) != labels).mean() for part, labels in ((x, y), (x2, y2))]
    return abs(errors[0] - errors[1])


def disparity(x: np.ndarray, a: np.ndarray, x2: np.ndarray, a2: np.ndarray, start: np.ndarray) -> float:
    one, two = (np.column_stack([part, np.ones(len(part))]) for part in (x, x2))
    z = (a == 0).astype(float)
    weight = np.where(a == 0, 0.5 / (a == 0).sum(), 0.5 / (a == 1).sum())
    sign = np.where(a2 == 0, 1 / (a2 == 0).sum(), -1 / (a2 == 1).sum())

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        scores, p = one @ theta, expit(two @ theta)
        gap = sign @ p
        root = np.sqrt(gap * gap + 1e-8)
        loss = weight @ (np.logaddexp(0, scores) - z * scores)
        slope = gap / root * (2 - gap * gap / root**2)
        return loss + gap * gap / root, one.T @ (weight * (expit(scores) - z)) + slope * (two.T @ (sign * p * (1 - p)))

    theta = minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-4, "maxiter": 500}).x
    gaps = []
    for part, group in ((one, a), (two, a2)):
        predicted = part @ theta >= 0
        gaps.append(abs(predicted[group == 0].mean() - predicted[group == 1].mean()))
    return abs(gaps[0] - gaps[1])
