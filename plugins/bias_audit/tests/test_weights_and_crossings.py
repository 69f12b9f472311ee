"""The gate beyond plain counts: weights, regressions, groups of very unequal sizes, and crossed features."""

import numpy as np
import pytest

from groundwire_bias_audit import Gate, Verdict, audit

SIZES = [2000, 300, 120, 60, 40]
GROUPS = np.repeat(np.arange(len(SIZES)), SIZES)


def alarms(make, draws=200, **gate):
    """Disparities that fair data sets show, by the test alone."""
    gate = Gate(tolerance=0.0, **gate)
    return sum(make(np.random.default_rng(seed), gate).verdict is Verdict.DISPARITY for seed in range(draws))


def predicted(rng):
    y = (rng.random(len(GROUPS)) < 0.15).astype(int)
    return y, np.where(y == 1, rng.random(len(y)) < 0.6, rng.random(len(y)) < 0.05).astype(int)


WEIGHTS = {
    "by class": lambda rng, y: np.where(y == 1, 0.85, 0.15),
    "by group": lambda rng, y: np.array([1.0, 3.0, 9.0, 20.0, 50.0])[GROUPS],
    "of any size": lambda rng, y: rng.lognormal(0, 1, len(y)),
    "all seven": lambda rng, y: np.full(len(y), 7.0),
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_make_no_false_alarms(weights):
    def make(rng, gate):
        y, p = predicted(rng)
        weight = WEIGHTS[weights](rng, y)
        return audit(y, y_pred=p, sensitive_features=GROUPS, sample_weight=weight, gate=gate)

    assert alarms(make) <= 18  # P(more | 5 %) = 1 %


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_of_a_regression_make_no_false_alarms(weights):
    def make(rng, gate):
        y = rng.normal(size=len(GROUPS))
        weight = WEIGHTS[weights](rng, (y > 1).astype(int))
        options = {"sensitive_features": GROUPS, "sample_weight": weight, "task": "regression"}
        return audit(y, y_pred=y + rng.normal(0, 0.5, len(y)), gate=gate, **options)

    assert alarms(make) <= 18


ERRORS = {
    "normal": lambda rng, n: rng.normal(0, 0.5, n),
    "skewed": lambda rng, n: rng.lognormal(0, 1, n),
    "mostly none": lambda rng, n: (rng.random(n) < 0.05) * rng.normal(1, 0.2, n),
}


@pytest.mark.parametrize("errors", ERRORS)
def test_small_groups_of_a_regression_make_no_false_alarms(errors):
    def make(rng, gate):
        y = rng.normal(size=len(GROUPS))
        error = ERRORS[errors](rng, len(y))
        return audit(y, y_pred=y + error, sensitive_features=GROUPS, task="regression", gate=gate)

    assert alarms(make) <= 18


def test_a_weighted_regression_has_the_gaps_of_its_table():
    rng = np.random.default_rng(0)
    y, error, weight = rng.normal(size=(3, len(GROUPS)))
    weight = np.exp(weight)
    options = {"sensitive_features": GROUPS, "sample_weight": weight, "task": "regression"}
    result = audit(y, y_pred=y + error + (GROUPS == 1), **options)
    label_sd = np.sqrt(np.average((y - np.average(y, weights=weight)) ** 2, weights=weight))
    frame = result.to_frame()
    for test in result.tests:
        judged = frame.loc[list(test.groups), test.metric]
        assert test.gap == pytest.approx((judged.max() - judged.min()) / label_sd)
    assert result.verdict is Verdict.DISPARITY


def test_equal_weights_judge_as_no_weights():
    rng = np.random.default_rng(0)
    y, p = predicted(rng)
    for task, true, given in (("binary", y, p), ("regression", rng.normal(size=len(y)), rng.normal(size=len(y)))):
        plain = audit(true, y_pred=given, sensitive_features=GROUPS, task=task)
        weighted = audit(true, y_pred=given, sensitive_features=GROUPS, task=task, sample_weight=np.full(len(y), 0.1))
        assert [t.p_value for t in weighted.tests] == pytest.approx([t.p_value for t in plain.tests])
        assert weighted.verdict is plain.verdict


def test_thirty_rows_of_any_equal_weight_are_thirty():
    y = np.tile([0, 1, 1, 0], 30)
    for weight in (0.1, 0.3, 1 / 7):
        gate, g = Gate(metrics=["accuracy"]), np.repeat(np.arange(4), 30)
        result = audit(y, y_pred=y, sensitive_features=g, sample_weight=np.full(120, weight), gate=gate)
        assert result.verdict is Verdict.PASS


def test_a_group_without_any_error_is_no_proof_against_the_others():
    rng = np.random.default_rng(0)
    error = np.concatenate([np.zeros(40), rng.normal(0.3, 1, 40)])
    y, g = rng.normal(size=80), ["none"] * 40 + ["some"] * 40
    tests = audit(y, y_pred=y + error, sensitive_features=g, task="regression").tests
    assert tests[0].metric == "mean_error"
    assert tests[0].p_value > 0.01


def crossed(rng, n=2400):
    """Two features; only where both are 1 something happens."""
    a, b = rng.integers(0, 2, (2, n))
    return {"a": a, "b": b}, (a == 1) & (b == 1)


def test_a_regression_is_judged_in_the_crossing_too_when_asked():
    rng = np.random.default_rng(0)
    features, hit = crossed(rng)
    y = rng.normal(size=len(hit))
    gate = Gate(intersections=True)
    result = audit(y, y_pred=y + hit, sensitive_features=features, task="regression", gate=gate)
    assert {test.attribute for test in result.tests} == {"a", "b", "a x b"}
    assert "a x b" in {test.attribute for test in result.disparities}


def test_a_change_is_judged_in_the_crossing_too_when_asked():
    rng = np.random.default_rng(0)
    features, hit = crossed(rng)
    y = rng.integers(0, 2, len(hit))
    after = np.where(hit & (rng.random(len(y)) < 0.5), 1 - y, y)
    options = {"y_pred": after, "baseline_pred": y, "sensitive_features": features}
    result = audit(y, gate=Gate(intersections=True), **options)
    found = [test for test in result.comparison.tests if test.attribute == "a x b"]
    assert {test.outliers for test in found if test.disparity} == {((1, 1),)}
    assert {len(test.groups) for test in found} == {4}
    within = audit(y, gate=Gate(intersections=True), control_features={"site": rng.integers(0, 2, len(y))}, **options)
    assert {t.control for t in within.comparison.tests if t.attribute == "a x b"} == {(0,), (1,)}
