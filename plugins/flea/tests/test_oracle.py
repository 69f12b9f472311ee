"""The batched solvers against one pair at a time: SciPy, numerical gradients, the published definitions."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from sklearn.linear_model import LogisticRegression

from groundwire_flea.distances.pairwise import DistanceOptions, distances, q_scores
from groundwire_flea.distances.sources import Sources
from groundwire_flea.selection import select

pytestmark = pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")


def standard(x):
    scale = x.std(0)
    return (x - x.mean(0)) / np.where(scale > 0, scale, 1)


def entropy(scores, t):
    return -np.where(t == 1, log_expit(scores), log_expit(-scores))


def best(objective, start):
    return minimize(objective, start, method="BFGS", options={"maxiter": 500}).x


def slow_disc(xi, yi, xj, yj):
    x = standard(np.concatenate([xi, xj]))
    i = np.arange(len(x)) < len(xi)
    y = np.concatenate([yi, yj])
    t = np.where(i, y, 1 - y)

    def objective(theta):
        loss = entropy(x @ theta[1:] + theta[0], t)
        return loss[i].mean() + loss[~i].mean()

    theta = best(objective, np.zeros(x.shape[1] + 1))
    wrong = (x @ theta[1:] + theta[0] >= 0) != (y == 1)
    return abs(wrong[i].mean() - wrong[~i].mean())


def slow_disp(xi, ai, xj, aj):
    x = standard(np.concatenate([xi, xj]))
    xi, xj = x[: len(xi)], x[len(xi) :]

    def gap(scores, a):
        return scores[a == 0].mean() - scores[a == 1].mean()

    def objective(theta):
        loss = entropy(xi @ theta[1:] + theta[0], (ai == 0).astype(int))
        r = gap(expit(xj @ theta[1:] + theta[0]), aj)
        return (loss[ai == 0].mean() + loss[ai == 1].mean()) / 2 + r**2 / np.sqrt(r**2 + 1e-8)

    start = LogisticRegression(tol=1e-8, max_iter=1000).fit(xi, ai == 0)
    theta = best(objective, np.append(start.intercept_, start.coef_[0]))
    hard_i, hard_j = (xi @ theta[1:] + theta[0] >= 0), (xj @ theta[1:] + theta[0] >= 0)
    return abs(abs(gap(hard_i, ai)) - abs(gap(hard_j, aj)))


def split(data):
    names = list(dict.fromkeys(data.source))
    return [(data.X[data.source == s], data.y[data.source == s], data.a[data.source == s]) for s in names]


def rows_of(data):
    parts = split(data)
    x, y, a = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Sources(standard(x), y, a, np.array([len(p[1]) for p in parts]), 2, 2)


@pytest.mark.parametrize(("n", "bad"), [(3, ()), (5, (1, 3)), (7, (0, 2, 4))])
def test_discrepancies_are_those_of_a_slow_oracle(table, n, bad):
    data = table(n, bad, how="label")
    parts, found = split(data), distances(rows_of(data), DistanceOptions())
    for i, (xi, yi, _) in enumerate(parts):
        for j, (xj, yj, _) in enumerate(parts):
            expected = slow_disc(xi, yi, xj, yj) if i < j else found.disc[j, i] if j < i else 0
            # One row on the other side of the threshold moves the value by 1 / m.
            assert found.disc[i, j] == pytest.approx(expected, abs=2.5 / min(len(yi), len(yj)))


@pytest.mark.parametrize(("n", "bad"), [(3, (1,)), (5, (1, 3))])
def test_disparities_are_those_of_a_slow_oracle(table, n, bad):
    data = table(n, bad)
    parts, found = split(data), distances(rows_of(data), DistanceOptions())
    expected = np.zeros((n, n))
    for i, (xi, _, ai) in enumerate(parts):
        for j, (xj, _, aj) in enumerate(parts):
            expected[i, j] = slow_disp(xi, ai, xj, aj) if i != j else 0
    expected = np.maximum(expected, expected.T)
    difference = np.abs(found.disp - expected)
    # The optimum lies where predictions of clean pairs are nearly constant, so a few values differ by a few rows.
    assert np.median(difference) <= 1.5 / 113
    assert difference.max() <= 0.12


def test_disbalance_is_the_difference_of_group_frequencies(table):
    data = table(5, (1, 3))
    shares = np.array([a.mean() for _, _, a in split(data)])
    np.testing.assert_allclose(
        distances(rows_of(data), DistanceOptions()).disb, np.abs(shares[:, None] - shares[None]), atol=1e-12
    )


def test_the_reference_mode_is_the_slow_oracle_too(table):
    data = table(3, (1,))
    parts, found = split(data), distances(rows_of(data), DistanceOptions(compat="reference"))
    (x0, y0, a0), (x1, y1, a1), _ = parts
    assert found.disc[0, 1] == pytest.approx(slow_disc(x0, y0, x1, y1), abs=2.5 / 189)
    expected = max(slow_disp(x0, a0, x1, a1), slow_disp(x1, a1, x0, a0))
    assert found.disp[0, 1] == pytest.approx(expected, abs=0.06)


@pytest.mark.slow
def test_batched_and_reference_choose_the_same_sources(table):
    for seed in range(4):
        data = table(5, (seed, (seed + 2) % 5), seed=seed)
        q = [q_scores(distances(rows_of(data), DistanceOptions(compat=c)).total(), 3) for c in (None, "reference")]
        assert select(q[0], 3).tolist() == select(q[1], 3).tolist()


def test_many_columns_give_the_distances_of_the_reference():
    """Beyond 30 columns L-BFGS takes over from Newton."""
    rng = np.random.default_rng(0)
    sizes, d = [400, 400, 380], 40
    x = rng.normal(size=(sum(sizes), d))
    y = (x[:, 0] + rng.normal(size=len(x)) > 0).astype(int)
    a = (x[:, 1] + rng.normal(size=len(x)) > 0).astype(int)
    y[:400], a[400:800] = 1 - y[:400], 1 - a[400:800]
    data = Sources(x, y, a, np.array(sizes), 2, 2)
    fast, slow = distances(data, DistanceOptions()), distances(data, DistanceOptions(compat="reference"))
    np.testing.assert_allclose(fast.disc, slow.disc, atol=0.015)
    np.testing.assert_allclose(fast.disp, slow.disp, atol=0.08)
