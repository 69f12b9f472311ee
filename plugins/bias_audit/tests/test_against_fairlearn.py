"""Numbers equal to fairlearn's, scikit-learn's and torchmetrics', and undefined where theirs are made up."""

import fairlearn.metrics as fl
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_score, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error

from groundwire_bias_audit import audit
from groundwire_bias_audit.audit.intervals import bootstrap
from groundwire_bias_audit.audit.rates import confusion_counts, disaggregate

METRICS = {
    "accuracy": accuracy_score,
    "selection_rate": fl.selection_rate,
    "true_positive_rate": fl.true_positive_rate,
    "true_negative_rate": fl.true_negative_rate,
    "false_positive_rate": fl.false_positive_rate,
    "false_negative_rate": fl.false_negative_rate,
}
AGGREGATES = {
    "overall": lambda frame: frame.overall,
    "group_min": lambda frame: frame.group_min(),
    "group_max": lambda frame: frame.group_max(),
    "difference": lambda frame: frame.difference(),
    "difference_to_overall": lambda frame: frame.difference(method="to_overall"),
    "ratio": lambda frame: frame.ratio(),
    "ratio_to_overall": lambda frame: frame.ratio(method="to_overall"),
}


def rows(n=400, groups=4, seed=0):
    rng = np.random.default_rng(seed)
    y, p = rng.integers(0, 2, n), rng.integers(0, 2, n)
    return y, p, rng.integers(0, groups, n), np.array(["b", "a", "c"])[rng.integers(0, 3, n)]


def frame_of(y, p, **features):
    return fl.MetricFrame(metrics=METRICS, y_true=y, y_pred=p, **features)


@pytest.mark.parametrize("seed", range(5))
def test_every_aggregate_equals_metricframe_exactly(seed):
    y, p, g, _ = rows(seed=seed)
    theirs, ours = frame_of(y, p, sensitive_features=g), audit(y, y_pred=p, sensitive_features=g)
    names = list(METRICS)
    pd.testing.assert_frame_equal(
        ours.to_frame()[names], theirs.by_group, check_exact=True, check_names=False, check_index_type=False
    )
    for aggregate, value in AGGREGATES.items():
        difference = ours.summary()[aggregate][names] - value(theirs)
        assert difference.abs().max() == 0.0, aggregate


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=200))
@settings(max_examples=40, deadline=None)
def test_rates_equal_metricframe_wherever_they_are_defined(table):
    g, y, p = map(np.array, zip(*table, strict=True))
    ours = audit(y, y_pred=p, sensitive_features=g).to_frame()
    theirs = frame_of(y, p, sensitive_features=g).by_group
    for name in METRICS:
        defined = ours[name].notna()
        assert (ours[name][defined] == theirs[name][defined]).all()
        assert (theirs[name][~defined] == 0).all()  # fairlearn's silent 0


def test_intersections_and_control_features_have_metricframes_index():
    y, p, g, h = rows()
    crossed = pd.DataFrame({"g": g, "h": h})
    keep = ~((g == 0) & (h == "a"))  # one combination without rows
    y, p, crossed = y[keep], p[keep], crossed[keep].reset_index(drop=True)
    ours, theirs = audit(y, y_pred=p, sensitive_features=crossed), frame_of(y, p, sensitive_features=crossed)
    pd.testing.assert_frame_equal(ours.to_frame()[list(METRICS)], theirs.by_group, check_exact=True)
    assert ours.dropped == [(0, "a")]
    assert ours.to_frame().loc[(0, "a"), "count"] == 0
    marginal = frame_of(y, p, sensitive_features=crossed["h"])
    pd.testing.assert_frame_equal(ours.to_frame("h")[list(METRICS)], marginal.by_group, check_exact=True)

    ours = audit(y, y_pred=p, sensitive_features=crossed["g"], control_features=crossed["h"])
    theirs = frame_of(y, p, sensitive_features=crossed["g"], control_features=crossed["h"])
    pd.testing.assert_frame_equal(ours.to_frame()[list(METRICS)], theirs.by_group, check_exact=True, check_like=True)
    difference = ours.summary()["difference"].unstack("metric")[list(METRICS)]
    pd.testing.assert_frame_equal(difference, theirs.difference(), check_exact=True, check_names=False)


def test_sample_weights_agree_to_rounding():
    y, p, g, _ = rows()
    w = np.random.default_rng(1).random(len(y))
    params = {name: {"sample_weight": w} for name in METRICS}
    theirs = frame_of(y, p, sensitive_features=g, sample_params=params)
    ours = audit(y, y_pred=p, sensitive_features=g, sample_weight=w)
    assert (ours.to_frame()[list(METRICS)] - theirs.by_group).abs().to_numpy().max() < 1e-14
    assert (ours.to_frame()["count"] == np.bincount(g)).all()


def test_a_group_without_positives_has_no_true_positive_rate():
    y, p, g = [0, 0, 1, 1], [0, 1, 1, 0], ["x", "x", "y", "y"]
    assert fl.true_positive_rate(y[:2], p[:2]) == 0.0
    result = audit(y, y_pred=p, sensitive_features=g)
    assert np.isnan(result.to_frame().loc["x", "true_positive_rate"])
    assert result.summary().loc["true_positive_rate", "difference"] == 0.0  # one group is left to compare
    assert str(result.verdict) == "insufficient data"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_score_metrics_are_those_of_sklearn_and_torchmetrics(dtype):
    rng = np.random.default_rng(0)
    y, g = rng.integers(0, 2, 500), rng.integers(0, 3, 500)
    p = np.clip(0.3 * y + rng.random(500) * 0.7, 0, 1).round(2).astype(dtype)
    found = audit(y, p, sensitive_features=g).to_frame()
    for group in range(3):
        held = g == group
        assert found.loc[group, "roc_auc"] == roc_auc_score(y[held], p[held])
        ece = binary_calibration_error(torch.tensor(p[held]), torch.tensor(y[held]), n_bins=10)
        assert found.loc[group, "calibration_error"] == float(ece)
        band = ((p[held] > dtype(0.1)) & (p[held] < dtype(0.9))).mean()
        assert found.loc[group, "uncertainty"] == band
        assert found.loc[group, "accuracy"] == ((p[held] >= 0.5) == y[held]).mean()
        assert found.loc[group, "precision"] == precision_score(y[held], p[held] >= 0.5)


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, pd.Series, lambda v: pd.Categorical(v)])
def test_groups_may_come_in_any_form(form):
    y, p, g, _ = rows()
    expected = frame_of(y, p, sensitive_features=g).by_group["accuracy"]
    found = audit(y, y_pred=torch.tensor(p), sensitive_features=form(g.tolist())).to_frame()["accuracy"]
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("labels", [{0: -1, 1: 1}, {0: False, 1: True}, {0: 0.0, 1: 1.0}])
def test_labels_may_be_written_in_any_way(labels):
    y, p, g, _ = rows()
    expected = audit(y, y_pred=p, sensitive_features=g).to_frame()
    written = [np.array([labels[v] for v in values]) for values in (y, p)]
    pd.testing.assert_frame_equal(audit(written[0], y_pred=written[1], sensitive_features=g).to_frame(), expected)
    words = [np.array(["no", "yes"])[values] for values in (y, p)]
    pd.testing.assert_frame_equal(
        audit(words[0], y_pred=words[1], sensitive_features=g, pos_label="yes").to_frame(), expected
    )


def test_fast_counting_equals_counting_one_by_one():
    rng = np.random.default_rng(0)
    for n, groups in ((65_537, 64), (70_000, 3), (100_001, 200), (10, 2)):
        g, y, p = rng.integers(0, groups, n), rng.integers(0, 2, n), rng.integers(0, 2, n)
        expected = np.zeros((groups, 2, 2), int)
        np.add.at(expected, (g, y, p), 1)
        assert (confusion_counts(g, y, p, groups) == expected).all()


def test_bootstrap_intervals_are_fairlearns_within_monte_carlo_noise():
    y, p, g, _ = rows(1000)
    metrics = {"accuracy": accuracy_score}
    theirs = [
        fl.MetricFrame(
            metrics=metrics, y_true=y, y_pred=p, sensitive_features=g, n_boot=100, ci_quantiles=[0.05, 0.95],
            random_state=seed,
        )
        for seed in range(2)
    ]  # fmt: skip
    counts = confusion_counts(g, y, p, 4)
    ours = [bootstrap(counts, ["accuracy"], n_boot=100, ci_quantiles=[0.05, 0.95], random_state=s) for s in range(2)]
    between = [np.abs(np.array(a.by_group_ci) - np.array(b.by_group_ci)).mean() for a, b in [theirs]]
    for mine, other in zip(ours, theirs, strict=True):
        other_ci = np.array([frame["accuracy"].to_numpy() for frame in other.by_group_ci])
        distance = np.abs(mine["accuracy"]["by_group"] - other_ci).mean()
        assert distance < 5 * max(between)
        assert np.abs(mine["accuracy"]["difference"] - [d["accuracy"] for d in other.difference_ci()]).mean() < 0.05


def test_disaggregate_gives_each_aggregate_by_name():
    y, p, g, _ = rows()
    found = disaggregate(confusion_counts(g, y, p, 4), tuple(METRICS))
    theirs = frame_of(y, p, sensitive_features=g)
    for name in METRICS:
        assert found[name]["by_group"].tolist() == theirs.by_group[name].tolist()
        for aggregate, value in AGGREGATES.items():
            assert float(found[name][aggregate]) == float(value(theirs)[name])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=2), st.sampled_from([np.float32, np.float64]))
@settings(max_examples=100, deadline=None)
def test_the_area_under_the_roc_curve_is_sklearns_to_the_last_bit(rows, dtype):
    y, p = np.array([y for y, _ in rows], np.uint8), np.array([p for _, p in rows], dtype) / dtype(12)
    assume(0 < y.sum() < len(y))
    found = audit(y, p, sensitive_features=np.zeros(len(y), int)).to_frame()
    assert found["roc_auc"].iloc[0] == roc_auc_score(y, p)
