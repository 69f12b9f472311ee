"""The gate: what it lets through, what it stops, and when it refuses to say."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2_contingency

from groundwire_bias_audit import AuditResult, Gate, Verdict, audit
from groundwire_bias_audit.audit.change import Comparison
from groundwire_bias_audit.audit.counts import GroupCounts
from groundwire_bias_audit.audit.gate import conclusion, not_gated
from groundwire_bias_audit.audit.groups import Groups
from groundwire_bias_audit.audit.hypothesis_tests import adjust, homogeneity, mcnemar, sequential
from groundwire_bias_audit.audit.rate_differences import difference_p_value


def simulated(rates, size, seed, base=0.5):
    """Rows of groups with the given accuracies."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(len(rates)), size)
    y = (rng.random(len(g)) < base).astype(int)
    right = rng.random(len(g)) < np.asarray(rates)[g]
    return y, np.where(right, y, 1 - y), g


def verdict(rates, size, seed, **options):
    y, p, g = simulated(rates, size, seed)
    return audit(y, y_pred=p, sensitive_features=g, **options).verdict


@pytest.mark.parametrize(("groups", "size"), [(2, 100), (10, 100), (40, 100), (2, 500), (10, 500), (40, 500)])
def test_a_fair_model_is_rarely_accused(groups, size):
    gate = Gate(min_count=10)
    alarms = sum(verdict([0.8] * groups, size, seed, gate=gate) is Verdict.DISPARITY for seed in range(100))
    assert alarms <= 11  # P(more | 5 %) < 1 %


def test_a_large_gap_is_found_and_the_group_named():
    y, p, g = simulated([0.9, 0.9, 0.6, 0.9], 400, 0)
    result = audit(y, y_pred=p, sensitive_features=g)
    assert result.verdict is Verdict.DISPARITY
    assert {test.outliers for test in result.disparities} == {(2,)}
    assert "stands out: 2" in str(result)


def test_of_two_groups_the_worse_one_is_named():
    y, p, g = simulated([0.9, 0.7], 500, 0)
    named = {test.metric: test.outliers for test in audit(y, y_pred=p, sensitive_features=g).disparities}
    assert named == {"accuracy": (1,), "true_positive_rate": (1,), "false_positive_rate": (1,)}


def test_a_gap_that_is_real_and_within_the_tolerance_passes():
    y, p, g = simulated([0.83, 0.80], 50_000, 0)
    result = audit(y, y_pred=p, sensitive_features=g)
    low, high = result.tests[0].bounds
    assert 0.01 < low < result.tests[0].gap < high < 0.05
    assert result.tests[0].p_adjusted == 1.0
    assert result.verdict is Verdict.PASS


def test_a_large_gap_by_chance_passes():
    y, p, g = simulated([0.8] * 20, 70, 3)
    result = audit(y, y_pred=p, sensitive_features=g, gate=Gate(min_count=10))
    assert result.tests[0].gap > 0.1
    assert result.verdict is Verdict.PASS


def test_a_small_group_is_named_and_the_others_are_judged():
    y, p, g = simulated([0.8, 0.8], 500, 0)
    g[:5] = 2
    result = audit(y, y_pred=p, sensitive_features=g)
    assert result.verdict is Verdict.PASS
    assert {test.small for test in result.tests} == {(2,)}
    assert "fewer than 30 rows: 2 (sensitive_feature_0)" in result.conclusion


def test_too_few_rows_never_pass():
    y, p, g = simulated([0.8, 0.8, 0.8], 200, 0)
    g[400:] = np.repeat(np.arange(2, 10), 25)  # a third of the rows in groups too small to judge
    result = audit(y, y_pred=p, sensitive_features=g)
    assert result.verdict is Verdict.INSUFFICIENT
    assert "hold 66.7% of the rows for accuracy" in result.conclusion
    assert verdict([0.9, 0.9], 20, 0) is Verdict.INSUFFICIENT


def test_a_disparity_among_large_groups_is_not_hidden_by_a_small_one():
    y, p, g = simulated([0.9, 0.6], 500, 0)
    g[:5] = 2
    assert audit(y, y_pred=p, sensitive_features=g).verdict is Verdict.DISPARITY


def test_one_group_only_is_not_enough_to_compare():
    assert verdict([0.8], 500, 0) is Verdict.INSUFFICIENT


def test_selection_rate_is_gated_only_when_named():
    y = np.array([0, 1] * 400)
    g = np.repeat([0, 1], 400)
    y[:300] = 0  # different base rates, perfect predictions
    for metrics, expected in ((None, Verdict.PASS), (("selection_rate",), Verdict.DISPARITY)):
        assert audit(y, y_pred=y, sensitive_features=g, gate=Gate(metrics=metrics)).verdict is expected


def test_several_attributes_are_corrected_together():
    y, p, g = simulated([0.8, 0.8], 500, 0)
    rng = np.random.default_rng(1)
    features = {f"random{i}": rng.integers(0, 3, 1000) for i in range(8)} | {"planted": g}
    p = np.where((g == 1) & (rng.random(1000) < 0.3), 1 - y, p)
    result = audit(y, y_pred=p, sensitive_features=features)
    assert len(result.tests) == 27
    assert {test.attribute for test in result.disparities} == {"planted"}
    assert all(test.p_adjusted >= test.p_value for test in result.tests)


def test_control_features_are_judged_level_by_level():
    y, p, g = simulated([0.9, 0.6], 400, 0)
    level = np.tile(["calm", "storm"], 400)
    p[level == "calm"] = y[level == "calm"]
    result = audit(y, y_pred=p, sensitive_features=g, control_features=level)
    assert {test.control for test in result.disparities} == {("storm",)}


def test_weights_count_as_their_effective_rows():
    y, p, g = simulated([0.9, 0.6], 400, 0)
    even = audit(y, y_pred=p, sensitive_features=g, sample_weight=np.full(800, 0.01))
    assert even.verdict is Verdict.DISPARITY
    heavy = np.full(800, 1e-9)
    heavy[::100] = 1.0  # eight rows carry everything
    assert audit(y, y_pred=p, sensitive_features=g, sample_weight=heavy).verdict is Verdict.INSUFFICIENT


def test_equal_data_give_equal_verdicts():
    y, p, g = simulated([0.8, 0.75, 0.8], 300, 5)
    first, second = (audit(y, y_pred=p, sensitive_features=g).gaps() for _ in range(2))
    assert first.equals(second)


@pytest.mark.parametrize(("k", "n"), [([80, 50], [100, 100]), ([30, 35, 39], [50, 60, 70]), ([3, 1], [4, 5])])
def test_the_permutation_p_value_is_near_the_chi_squared_one_where_that_holds(k, n):
    table = np.array([k, np.subtract(n, k)])
    exact = homogeneity(k, n, draws=20_000)
    if table.min() > 5:
        assert exact == pytest.approx(chi2_contingency(table, correction=False).pvalue, abs=0.02)
    assert 0 < exact <= 1


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=0, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_p_value_is_one_in_any_case(cells):
    k = [a for a, _ in cells]
    n = [a + b for a, b in cells]
    assert 0 < homogeneity(k, n, draws=100) <= 1


def test_the_exact_test_keeps_its_level_with_tiny_groups():
    rng = np.random.default_rng(0)
    trials = np.array([3, 5, 40, 8])
    rejected = sum(homogeneity(rng.binomial(trials, 0.9), trials, draws=200, rng=rng) <= 0.05 for _ in range(400))
    assert rejected <= 31


@pytest.mark.parametrize("tests", [1, 100, 3000, 20_000])
def test_the_smallest_p_value_survives_the_correction_of_any_number_of_tests(tests):
    assert tests * difference_p_value(9_000, 10_000, 5_000, 10_000, 0.05, 0.05 / tests) < 0.001


def test_draws_are_spent_where_the_first_ones_leave_the_p_value_small():
    asked = []

    def exceeding(share):
        return lambda count: asked.append(count) or round(share * count)

    assert sequential(exceeding(0.5), 100_000) == 1001 / 2001
    assert sequential(exceeding(0.01), 100_000) == 1001 / 100_001
    assert sequential(exceeding(0.5), 500) == 251 / 501
    assert sequential(exceeding(0.0), 250_000) == 1 / 250_001
    assert asked == [2000, 2000, 98_000, 500, 2000, 100_000, 100_000, 48_000]


def test_a_p_value_keeps_its_level_whenever_drawing_stops():
    rng = np.random.default_rng(0)
    n = np.array([60, 90, 150])
    p = [homogeneity(rng.binomial(n, 0.3), n, draws=4000, rng=rng) for _ in range(1000)]
    for level, most in ((0.02, 31), (0.05, 67), (0.2, 230)):  # the 99 % points of a binomial
        assert sum(value <= level for value in p) <= most


def test_holm_by_hand_and_benjamini_hochberg_by_scipy():
    assert adjust([0.01, 0.02, 0.03, np.nan]).tolist()[:3] == pytest.approx([0.03, 0.04, 0.04])
    assert np.isnan(adjust([np.nan])).all()
    assert adjust([0.01, 0.02, 0.03], "bh").tolist() == pytest.approx([0.03, 0.03, 0.03])
    assert adjust([0.6, 0.9]).max() <= 1


def test_mcnemar_is_the_binomial_test_of_flips():
    assert mcnemar(15, 5) == binomtest(15, 20).pvalue
    assert mcnemar(0, 0) == 1.0


def test_a_regression_is_gated_in_standard_deviations_of_the_label():
    rng = np.random.default_rng(0)
    g, y = np.repeat(["a", "b", "c"], 300), 100 * rng.normal(size=900)
    fair = y + 20 * rng.normal(size=900)
    for shift, expected in ((0, Verdict.PASS), (30, Verdict.DISPARITY)):
        result = audit(y, y_pred=fair + shift * (g == "c"), sensitive_features=g)
        assert result.verdict is expected
    assert result.task == "regression"
    assert max(test.gap for test in result.tests) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("arguments", [{"tolerance": None}, {"tolerance": "0.1"}, {"alpha": None}, {"tolerance": True}])
def test_a_gate_without_a_number_is_refused(arguments):
    with pytest.raises(TypeError, match="Gate needs"):
        Gate(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"tolerance": -0.1}, {"tolerance": 5}, {"alpha": 0}, {"alpha": 1.0}, {"min_count": 0},
        {"correction": "bonferoni"}, {"metrics": ()}, {"metrics": "accuracy"}, {"tolerance": float("nan")},
    ],
)  # fmt: skip
def test_a_gate_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError):
        Gate(**arguments)


def test_an_unknown_gated_metric_shows_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'true_positive_rate'"):
        Gate(metrics=("true_positive_rat",))


def test_verdicts_print_as_their_words():
    assert [str(v) for v in Verdict] == ["pass", "disparity", "insufficient data"]


def counted(confusion, metrics=None, **options):
    """The audit of confusion counts ``[group, label, prediction]``."""
    confusion = np.asarray(confusion)
    groups = Groups(("g",), (tuple(range(len(confusion))),))
    counts = GroupCounts("binary", ("",), groups, confusion.sum(axis=(1, 2)), confusion[:, None])
    return AuditResult(counts, Gate(metrics=metrics, **options))


def drawn(sizes, rates, rng):
    """Confusion counts of groups that are predicted right at the given rates."""
    positive = rng.binomial(sizes, 0.5)
    right = rng.binomial([np.array(sizes) - positive, positive], rates)
    wrong = np.stack([np.array(sizes) - positive, positive]) - right
    return np.stack([np.stack([right[0], wrong[0]], -1), np.stack([wrong[1], right[1]], -1)], axis=1)


LARGE = [20_000, 20_000]


@pytest.mark.parametrize(
    ("sizes", "rates", "min_count"),
    [
        ([*LARGE, 60], [0.79, 0.81, 0.8], 30),
        ([*LARGE, 60, 60, 60, 60], [0.79, 0.81, 0.8, 0.8, 0.8, 0.8], 30),
        ([*LARGE, 60, 60, 60, 60], [0.775, 0.825, 0.8, 0.8, 0.8, 0.8], 30),
        ([*LARGE, *[70] * 10], [0.95, 1.0, *[0.97] * 10], 30),
        ([10, 30, 90, 270, 810, 2430, 7290, 20_000], [0.9, 0.95] * 4, 10),
        ([10] * 10, [0.95, 1.0] * 5, 1),
        ([200] * 10, [0.8, 0.85] * 5, 30),
        ([100] * 40, [0.95, 1.0] * 20, 30),
    ],
)
def test_gaps_within_the_tolerance_are_no_disparity(sizes, rates, min_count):
    rng = np.random.default_rng(0)
    alarms = sum(
        counted(drawn(sizes, rates, rng), min_count=min_count).verdict is Verdict.DISPARITY for _ in range(100)
    )
    assert alarms <= 11  # P(more | 5 %) < 1 %


@pytest.mark.parametrize(
    ("sizes", "rates", "least"),
    [
        ([3000] * 3, [0.68, 0.8, 0.8], 0.9),
        ([1000] * 2, [0.65, 0.8], 0.95),
        ([1000] * 10, [0.65, *[0.8] * 9], 0.9),
        ([3000] * 40, [0.7, *[0.8] * 39], 0.9),
    ],
)
def test_gaps_of_two_tolerances_and_more_are_found_in_enough_rows(sizes, rates, least):
    rng = np.random.default_rng(0)
    found = [counted(drawn(sizes, rates, rng)) for _ in range(20)]
    assert np.mean([result.verdict is Verdict.DISPARITY for result in found]) >= least - 0.1
    named = [test.outliers for result in found for test in result.disparities]
    assert np.mean([groups[0] == 0 for groups in named]) > 0.95


@pytest.mark.parametrize("groups", [2, 10, 40])
def test_a_fair_model_passes_whatever_the_number_of_groups(groups):
    rng, verdicts = np.random.default_rng(0), []
    for _ in range(20):
        sizes = rng.integers(100, 400, groups)
        sizes[-1] = 20 if groups > 2 else sizes[-1]
        verdicts.append(counted(drawn(sizes, [0.8] * groups, rng)).verdict)
    assert verdicts.count(Verdict.PASS) >= 18


def test_a_pass_says_which_gap_is_ruled_out():
    rng = np.random.default_rng(0)
    few, many = (counted(drawn([size] * 3, [0.8, 0.81, 0.8], rng)) for size in (200, 20_000))
    assert few.verdict is many.verdict is Verdict.PASS
    worst = [max(test.at_most for test in result.tests) for result in (few, many)]
    assert worst[0] > 0.1 > worst[1] > 0.01
    for result, value in zip((few, many), worst, strict=True):
        stated = re.search(r"rule out gaps above ([\d.]+) \((\w+) by g\)", str(result))
        assert 0 <= float(stated[1]) - value <= 0.001
    assert many.gaps()["gap_high"].max() == worst[1]


@pytest.mark.parametrize(
    ("confusion", "reason"),
    [
        ([[[400, 0], [400, 0]], [[400, 0], [400, 0]]], "all predictions are the same"),
        ([[[0, 400], [0, 400]], [[0, 400], [0, 400]]], "all predictions are the same"),
        ([[[300, 100], [0, 0]], [[300, 100], [0, 0]]], "all labels are the same"),
        ([[[300, 100], [100, 300]]], "only one group of g"),
        ([[[300, 100], [100, 300]], [[0, 0], [0, 0]]], "only one group of g"),
        ([[[300, 100], [100, 300]], [[9, 1], [1, 9]]], "fewer than two groups have 30 rows for accuracy by g"),
        ([[[9, 1], [1, 9]], [[9, 1], [1, 9]]], "fewer than two groups"),
        ([[[300, 100], [2, 3]], [[300, 100], [2, 3]]], "fewer than two groups have 30 rows for true_positive_rate"),
    ],
)
def test_what_leaves_nothing_to_compare_is_no_pass_and_says_why(confusion, reason):
    result = counted(confusion)
    assert result.verdict is Verdict.INSUFFICIENT
    assert reason in result.conclusion


def test_constant_columns_of_any_task_are_no_pass():
    rng = np.random.default_rng(0)
    g, y3, real = rng.integers(0, 2, 600), rng.integers(0, 3, 600), rng.normal(size=600)
    two = rng.integers(0, 2, (600, 2))
    never = two.copy()
    never[:, 1] = 0
    for task, y, p in (
        ("multiclass", y3, np.ones(600, int)), ("multiclass", np.ones(600, int), y3), ("multilabel", two, never),
        ("multilabel", never, two), ("regression", real, np.full(600, 0.3)), ("regression", np.full(600, 0.3), real),
    ):  # fmt: skip
        result = audit(y, y_pred=p, sensitive_features=g, task=task)
        assert result.verdict is not Verdict.PASS
        assert "are the same" in result.conclusion or result.verdict is Verdict.DISPARITY


def test_a_control_group_that_cannot_be_judged_counts_among_the_rows():
    y, p, g = simulated([0.8, 0.8], 500, 0)
    for odd, expected in ((20, Verdict.PASS), (200, Verdict.INSUFFICIENT)):
        control = np.where(np.arange(1000) < odd, "alone", "both")  # there, only the first group has rows
        assert audit(y, y_pred=p, sensitive_features=g, control_features=control).verdict is expected


@pytest.mark.parametrize("metric", ["accuracy", "true_positive_rate", "false_positive_rate"])
def test_a_change_fails_only_where_a_group_lost(metric):
    rng = np.random.default_rng(0)
    g, y = np.repeat(["f", "m"], 4000), np.tile([0, 1], 4000)
    good = np.where(rng.random(8000) < 0.95, y, 1 - y)
    bad = np.where((g == "f") & (rng.random(8000) < 0.15), 1 - y, good)
    gate = Gate(metrics=[metric])
    mended = audit(y, y_pred=good, baseline_pred=bad, sensitive_features=g, gate=gate).comparison
    broken = audit(y, y_pred=bad, baseline_pred=good, sensitive_features=g, gate=gate).comparison
    assert (mended.verdict, broken.verdict) == (Verdict.PASS, Verdict.DISPARITY)
    assert broken.tests[0].outliers == ("f",)
    assert broken.tests[0].at_least > 0.1 > 0.05 > mended.tests[0].at_most
    assert "rule out losses above" in conclusion(mended.tests, gate)


def test_losses_within_the_tolerance_are_no_disparity():
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(100):
        n = np.array([40, 100, 400, 3000])
        worse = rng.binomial(n, 0.1)
        better = rng.binomial(n - worse, 0.05 / 0.9)  # the true loss is 0.05, the tolerance
        pairs = np.zeros((4, 1, 2, 2, 2), np.int64)
        pairs[:, 0, 1, 1, 0], pairs[:, 0, 1, 0, 1], pairs[:, 0, 1, 1, 1] = worse, better, n - worse - better
        groups = Groups(("g",), ((0, 1, 2, 3),))
        change = Comparison(groups, ("",), pairs, (worse + better)[:, None], Gate(metrics=["accuracy"]))
        alarms += change.verdict is Verdict.DISPARITY
    assert alarms <= 11


def test_what_is_not_judged_is_said():
    assert not_gated("binary", Gate()).startswith("Not judged: selection_rate, ")
    result = counted([[[300, 100], [100, 300]]] * 2)
    assert "Not judged: selection_rate" in result.to_html()


def test_draws_are_deprecated():
    with pytest.warns(DeprecationWarning, match="no effect"):
        Gate(draws=2000)
