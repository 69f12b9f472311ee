"""The paper's metrics: amplification, interdependence, rare values, exemplars, susceptibility, countermeasures."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from torch import nn

from groundwire_bias_audit import (
    GroupThresholds,
    attribution_shift,
    audit,
    bias_amplification,
    bias_risk,
    cie,
    compare_override,
    evaluate_susceptibility,
    flip_rate,
    interdependence,
    rank_susceptible,
    rare_value_ratio,
    recalibrate_thresholds,
)
from groundwire_bias_audit.audit.association import gram


def amplification_by_rows(y, p, s, y_train, s_train):
    """The definition, row by row."""
    if min((y[s == 1] == 1).sum(), (y[s == 0] == 1).sum()) < 10:
        return np.nan
    f = [y_train[s_train == v].mean() for v in (0, 1)]
    if min(f) == 0 or abs(f[1] - f[0]) / min(f) < 0.1 or p.sum() == 0:
        return np.nan
    k = int(f[1] > f[0])
    return p[s == k].sum() / p.sum() - y[s == k].sum() / y.sum()


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_bias_amplification_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    s, s_train = rng.integers(0, 2, 120), rng.integers(0, 2, 90)
    rate = rng.random(2)
    y, p = (rng.random(120) < rate[s]).astype(int), (rng.random(120) < rng.random()).astype(int)
    y_train = (rng.random(90) < rate[s_train]).astype(int)
    counts, training = np.zeros((2, 2, 2), int), np.zeros((2, 2), int)
    np.add.at(counts, (s, y, p), 1)
    np.add.at(training, (s_train, y_train), 1)
    ours, expected = bias_amplification(counts, training), amplification_by_rows(y, p, s, y_train, s_train)
    assert ours.value == pytest.approx(expected, nan_ok=True)
    assert bool(ours.reason) == np.isnan(expected)


def test_amplification_without_predicted_positives_is_undefined_not_a_warning():
    found = bias_amplification([[[80, 0], [20, 0]], [[60, 0], [40, 0]]])
    assert np.isnan(found.value)
    assert found.reason == "nothing is predicted positive"


def test_interdependence_is_the_r2_of_least_squares():
    rng = np.random.default_rng(0)
    hidden = rng.random((500, 1))
    yhat = (rng.random((500, 6)) < 0.2 + 0.6 * hidden).astype(int)
    yhat[:, 5] = yhat[:, 0]  # a repeated output
    found = interdependence(gram(yhat))
    for j in range(6):
        others = np.delete(yhat, j, axis=1)
        assert found[j] == pytest.approx(LinearRegression().fit(others, yhat[:, j]).score(others, yhat[:, j]), abs=1e-9)
    constant = yhat.copy()
    constant[:, 2] = 1
    assert np.isnan(interdependence(gram(constant))[2])


def test_rare_values_under_predicted_are_below_one():
    assert rare_value_ratio([[80, 0], [10, 10]]) == 0.5
    assert rare_value_ratio([[10, 10], [0, 80]], training_rate=0.9) == 0.5
    assert np.isnan(rare_value_ratio([[10, 5], [0, 0]]))


def test_exemplars_need_populations_and_pairs_have_flips():
    rng = np.random.default_rng(0)
    dense, compressed = rng.integers(0, 3, (7, 50)), rng.integers(0, 3, (5, 50))
    found = cie(dense, compressed)
    for i in range(50):
        a, b = np.bincount(dense[:, i], minlength=3), np.bincount(compressed[:, i], minlength=3)
        assert found.exemplars[i] == (a.argmax() != b.argmax())
        assert found.taxicab[i] == pytest.approx(np.abs(a / 7 - b / 5).sum())
    assert found.by_group(np.arange(50) % 2)["count"].tolist() == [25, 25]
    assert flip_rate(dense[0], compressed[0]) == (dense[0] != compressed[0]).mean()
    with pytest.raises(ValueError, match="at least two models"):
        cie(dense[:1], compressed)


def test_susceptible_samples_are_the_unsure_ones_first():
    rng = np.random.default_rng(0)
    z, g = rng.normal(0, 3, 2000), rng.integers(0, 2, 2000)
    p = 1 / (1 + np.exp(-z))
    flipped = np.sign(z + rng.normal(0, 1, 2000)) != np.sign(z)
    found = evaluate_susceptibility(flipped, p, g)
    assert found["confidence"] > 0.85
    assert 0.4 < found["random"] < 0.6
    ranked = rank_susceptible(p, g, top=100)
    assert flipped[ranked["id"]].mean() > 3 * flipped.mean()
    # Flips towards what is usual in the group: there the shortcut ranking is the better one.
    prior = np.where(g == 1, 3.0, -3.0)
    leaning = np.sign(0.6 * z + 0.4 * prior) != np.sign(z)
    found = evaluate_susceptibility(leaning, p, g)
    both = np.concatenate([p, np.where(g == 1, 0.95, 0.05)])  # the group usually decides
    assert found["shortcut"] > 0.5
    better = evaluate_susceptibility(np.concatenate([leaning, np.zeros(2000, bool)]), both, np.concatenate([g, g]))
    assert better["shortcut"] > better["confidence"]


def test_the_exposed_group_is_the_one_that_is_unsure():
    rng = np.random.default_rng(0)
    g = rng.integers(0, 3, 3000)
    p = np.where(rng.random(3000) < np.where(g == 2, 0.2, 0.05), 0.5, 0.99)
    risk = bias_risk(p, g)
    assert risk.index[0] == 2
    assert risk["exposed"].to_dict() == {2: True, 0: False, 1: False}


@given(st.lists(st.integers(0, 1), min_size=1, max_size=40), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_recalibrated_thresholds_predict_as_many_as_there_are(y, seed):
    scores = np.random.default_rng(seed).permutation(len(y)) / len(y)
    threshold = recalibrate_thresholds(y, scores)
    assert (scores >= threshold).sum() == sum(y)


def test_recalibration_of_ties_takes_the_nearest_count():
    assert (np.array([0.5, 0.5, 0.5, 0.1]) >= recalibrate_thresholds([1, 1, 0, 0], [0.5, 0.5, 0.5, 0.1])).sum() == 3
    several = recalibrate_thresholds(np.eye(3, dtype=int), np.random.default_rng(0).random((3, 3)))
    assert several.shape == (3,)


def test_group_thresholds_close_the_gap_they_are_asked_to():
    rng = np.random.default_rng(0)
    y, g = rng.integers(0, 2, 4000), np.where(rng.random(4000) < 0.5, "f", None)
    p = np.clip(0.3 + 0.3 * y - 0.15 * (g == None) + rng.normal(0, 0.15, 4000), 0, 1)  # noqa: E711
    before = audit(y, p, sensitive_features=g).summary()["difference"]["true_positive_rate"]
    moved = GroupThresholds("true_positive_rate_parity").fit(y, p, g).predict(p, g)
    after = audit(y, y_pred=moved, sensitive_features=g).summary()["difference"]["true_positive_rate"]
    assert before > 0.2
    assert after < 0.05


def test_labelling_the_unsure_beats_labelling_at_random():
    rng = np.random.default_rng(0)
    y, g = rng.integers(0, 2, 2000), rng.integers(0, 2, 2000)
    p = np.clip(0.5 + 0.35 * (2 * y - 1) + rng.normal(0, 0.1 + 0.25 * g), 0.001, 0.999)
    table = compare_override(y, p, g, budgets=[0.05, 0.1], draws=30)
    assert table.loc[0.0, "accuracy_gap"] == pytest.approx(table.loc[0.0, "random_accuracy_gap"])
    assert (
        table.loc[0.1, "worst_group"]
        > table.loc[0.1, "random_worst_group"] + 3 * table.loc[0.1, "random_std_worst_group"]
    )


def cnn(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


@pytest.mark.parametrize("method", ["auto", "input_x_gradient", "integrated_gradients", "occlusion"])
def test_a_shift_is_judged_against_its_null_band(method):
    dense, g = cnn(0), np.arange(12) % 2
    x, y = torch.randn(12, 1, 8, 8), torch.arange(12) % 2
    region = np.zeros((8, 8), bool)
    region[:2, :2] = True
    same = attribution_shift(dense, dense, x, y, g, null=[cnn(1), cnn(2)], method=method, region=region)
    assert same.interpretable
    assert same.table["spearman"].dropna().tolist() == pytest.approx([1.0] * same.table["spearman"].notna().sum())
    assert same.table["region_mass"].tolist() == pytest.approx([0.0, 0.0])
    assert (same.table["spearman_null_low"] <= same.table["spearman_null_high"]).all()
    assert same.table["spearman_outside"].all()  # more alike than two seeds are
    alone = attribution_shift(dense, cnn(1), x, y, g, method=method)
    assert "uninterpretable" in str(alone)
    assert alone.table["spearman_outside"].isna().all()


def test_attribution_leaves_the_models_as_they_were():
    dense, other = cnn(0).train(), cnn(1)
    weights = [p.clone() for p in dense.parameters()]
    attribution_shift(dense, other, torch.randn(4, 1, 8, 8), [0, 1, 0, 1], [0, 0, 1, 1], per_group=1)
    assert dense.training
    assert all(p.grad is None for p in dense.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, dense.parameters(), strict=True))


def test_constant_maps_are_undefined():
    dead = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(dead[1].weight)
    found = attribution_shift(dead, dead, torch.randn(4, 1, 4, 4), [0, 1, 0, 1], [0, 0, 1, 1])
    assert found.table["spearman"].isna().all()
    with pytest.raises(ValueError, match="method must be one of"):
        attribution_shift(dead, dead, torch.randn(4, 1, 4, 4), [0, 1, 0, 1], [0, 0, 1, 1], method="gradcamm")


@pytest.mark.parametrize("score", [np.nan, -2.0, 1.5])
def test_what_is_no_probability_is_not_ranked(score):
    scores, g = [0.2, 0.9, score], ["f", "m", "f"]
    for ask in (rank_susceptible, bias_risk, lambda p, g: evaluate_susceptibility([True, False, False], p, g)):
        with pytest.raises(ValueError, match="outside or NaN"):
            ask(scores, g)
    with pytest.raises(ValueError, match="align them row by row"):
        evaluate_susceptibility([True, False], scores[:1] * 3)
