"""The distances as the published code computes them: one pair at a time, with scikit-learn and SciPy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from groundwire_flea.distances.sources import Sources


def reference_discrepancies(data: Sources, pairs: NDArray[Any]) -> NDArray[Any]:
    """Disc of each pair (P,) by scikit-learn's unpenalised logistic regression."""
    return np.array([_discrepancy(*_pair(data, *pair)) for pair in pairs])


def reference_disparities(data: Sources, pairs: NDArray[Any]) -> NDArray[Any]:
    """Disp of each ordered pair (P,) by SciPy's BFGS."""
    return np.array([_disparity(*_pair(data, *pair)) for pair in pairs])


def _pair(data: Sources, i: int, j: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], int]:
    """Standardised rows of both sources, their labels, their groups, and how many rows are the first source's."""
    index = np.concatenate([data.starts[s] + np.arange(data.sizes[s]) for s in (i, j)])
    return StandardScaler().fit_transform(data.x[index]), data.y[index], data.a[index], int(data.sizes[i])


def _logistic(x: NDArray[Any], t: NDArray[Any], weights: NDArray[Any] | None, c: float) -> NDArray[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it stops at max_iter on separable data, as it did in the published runs
        model = LogisticRegression(C=c, max_iter=700, tol=1e-4).fit(x, t, sample_weight=weights)
    return np.append(model.coef_[0], model.intercept_)


def _discrepancy(x: NDArray[Any], y: NDArray[Any], a: NDArray[Any], m: int) -> float:
    second = np.arange(len(y)) >= m
    theta = _logistic(x, np.where(second, 1 - y, y), np.where(second, 1 / (len(y) - m), 1 / m), np.inf)
    wrong = (x @ theta[:-1] + theta[-1] >= 0) != (y == 1)
    return float(min(1, abs(wrong[:m].mean() - wrong[m:].mean())))


def _disparity(x: NDArray[Any], y: NDArray[Any], a: NDArray[Any], m: int) -> float:
    x = np.column_stack([x, np.ones(len(x))])
    z = a == 0
    own, other, target = x[:m], x[m:], z[:m].astype(float)
    weights = np.where(z[:m], 0.5 / max(z[:m].sum(), 1), 0.5 / max((~z[:m]).sum(), 1))
    signs = np.where(z[m:], 1 / max(z[m:].sum(), 1), -1 / max((~z[m:]).sum(), 1))

    def objective(theta: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        scores, p = own @ theta, expit(other @ theta)
        gap = signs @ p
        root = np.sqrt(gap**2 + 1e-8)
        value = weights @ (np.logaddexp(0, scores) - target * scores) + gap**2 / root
        slope = (gap / root) * (2 - gap**2 / root**2)
        gradient = own.T @ (weights * (expit(scores) - target)) + slope * (other.T @ (signs * p * (1 - p)))
        return value, gradient

    start = _logistic(x[:m, :-1], target, None, 1.0)
    theta = minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-4, "maxiter": 500}).x
    predicted = x @ theta >= 0
    gaps = [abs(predicted[s][z[s]].mean() - predicted[s][~z[s]].mean()) for s in (slice(m), slice(m, None))]
    return float(abs(gaps[0] - gaps[1]))
