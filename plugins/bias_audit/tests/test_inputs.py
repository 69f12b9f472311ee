"""Bad input: every refusal says what was found and what to do."""

import numpy as np
import pandas as pd
import pytest
import torch

from groundwire_bias_audit import Gate, audit

Y, P, G = [0, 1, 0, 1], [0.1, 0.9, 0.4, 0.6], ["f", "f", "m", "m"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": [0.1, 0.9, 1.4, 0.6]}, r"1 of 4 scores are outside \[0, 1\].*from_logits=True"),
        ({"scores": [-3.0, 2.0, 1.4, 0.6]}, "as logits are"),
        ({"scores": [0.1, np.nan, 0.4, 0.6]}, "1 missing values .* the first in row 1"),
        ({"y_true": [0, 1, np.nan, 1]}, "y_true has 1 missing"),
        ({"scores": P[:3]}, "y_true has 4 rows and scores 3"),
        ({"sensitive_features": G[:3]}, "has 3 rows, and y_true has 4"),
        ({"y_pred": [0, 1, 0, 1]}, "exactly one of scores and y_pred, got both"),
        ({"scores": None}, "exactly one of scores and y_pred, got neither"),
        ({"metrics": ["acuracy"]}, "did you mean 'accuracy'"),
        ({"y_true": ["no", "yes", "no", "yes"]}, "pass pos_label"),
        ({"y_true": ["no", "yes", "no", "yes"], "pos_label": "maybe"}, "pos_label is 'maybe'"),
        ({"y_true": [], "scores": []}, "empty"),
        ({"threshold": 1.5}, "threshold"),
        ({"task": "ranking"}, "task must be one of"),
        ({"sample_weight": [1, 1, -1, 1]}, "not negative"),
        ({"sample_weight": [1, 1]}, "shape"),
        ({"n_boot": 0}, "n_boot"),
        ({"sensitive_features": pd.DataFrame({"a": G, "b": G}).rename(columns={"b": "a"})}, "must differ"),
        ({"sensitive_features": {}}, "at least one feature"),
        ({"baseline_scores": P[:2]}, "2"),
        ({"scores": np.array([[0.5, 0.2]] * 4)}, "sum to 1"),
        ({"task": "multiclass"}, r"shape \(n, C\)"),
        ({"y_true": [1, 2, 1, 2]}, r"got \[1, 2\] -> pass pos_label"),
        ({"threshold": [0.2, 0.3]}, "one for each of 1 targets"),
        ({"metrics": ["recall"]}, "did you mean 'true_positive_rate'"),
        ({"sensitive_features": None}, "sensitive_features is None"),
        ({"ci_quantiles": [2, 3]}, "ci_quantiles must be ascending"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments, message):
    given = {"y_true": Y, "scores": P, "sensitive_features": G, **arguments}
    if "y_pred" in arguments:
        given["y_pred"] = arguments["y_pred"]
    with pytest.raises(ValueError, match=message):
        audit(given.pop("y_true"), given.pop("scores"), **given)


def test_many_whole_numbers_may_be_amounts_or_classes_and_it_is_asked_which():
    amounts = np.arange(100.0)
    with pytest.raises(ValueError, match=r"100 different whole numbers.*task='regression' or 'multiclass'"):
        audit(amounts, y_pred=amounts, sensitive_features=["a", "b"] * 50)
    assert audit(amounts, y_pred=amounts, sensitive_features=["a", "b"] * 50, task="regression").task == "regression"
    assert audit(amounts % 10, y_pred=amounts % 7, sensitive_features=["a", "b"] * 50).task == "multiclass"


@pytest.mark.parametrize("threshold", [0.7, [0.7, 0.7]])
def test_a_score_at_the_threshold_is_predicted_1_whatever_its_type(threshold):
    scores = np.full((4, 2), 0.7, np.float32)
    result = audit(np.eye(2, dtype=int)[[0, 1, 0, 1]], scores, sensitive_features=G, threshold=threshold)
    assert (result.to_frame()["selection_rate"] == 1).all()


def test_an_attribute_with_hundreds_of_values_is_refused():
    y = np.tile([0, 1], 300)
    with pytest.raises(ValueError, match="feature 'zip' has 600 different values, more than max_groups=100"):
        audit(y, y_pred=y, sensitive_features={"zip": np.arange(600)})
    assert len(audit(y, y_pred=y, sensitive_features={"zip": np.arange(600)}, max_groups=600).to_frame()) == 600


def test_logits_are_taken_when_announced():
    logits = np.array([-2.0, 3.0, -0.1, 0.4])
    result = audit(Y, logits, sensitive_features=G, from_logits=True)
    same = audit(Y, 1 / (1 + np.exp(-logits)), sensitive_features=G)
    pd.testing.assert_frame_equal(result.to_frame(), same.to_frame())
    two = audit(Y, np.stack([0 * logits, logits], 1), sensitive_features=G, from_logits=True)
    assert two.to_frame()["accuracy"].equals(same.to_frame()["accuracy"])


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, float("nan")])
def test_missing_attributes_are_a_group_of_their_own(missing):
    frame = audit(Y, P, sensitive_features=["f", missing, "m", "m"]).to_frame()
    assert frame.index.tolist() == ["f", "m", "unknown"]
    assert frame["count"].tolist() == [1, 2, 1]


def test_missing_is_not_mixed_with_a_group_called_unknown():
    frame = audit(Y, P, sensitive_features=["unknown", None, "m", "m"]).to_frame()
    assert frame.index.tolist() == ["m", "unknown", "unknown (missing)"]


def test_hard_predictions_have_no_score_metrics():
    frame = audit(Y, y_pred=[0, 1, 0, 0], sensitive_features=G).to_frame()
    assert frame[["roc_auc", "calibration_error", "uncertainty"]].isna().all().all()
    with pytest.raises(ValueError, match="needs scores"):
        audit(Y, y_pred=[0, 1, 0, 0], sensitive_features=G).confidence()


def test_multiclass_multilabel_and_regression_by_hand():
    rng = np.random.default_rng(0)
    g, y = rng.integers(0, 2, 300), rng.integers(0, 3, 300)
    p = rng.dirichlet([1, 1, 1], 300)
    multi = audit(y, p, sensitive_features=g)
    assert multi.task == "multiclass"
    right = p.argmax(1) == y
    assert multi.to_frame()["accuracy"].tolist() == [right[g == 0].mean(), right[g == 1].mean()]
    one = multi.to_frame(target=2)
    assert one.loc[0, "true_positive_rate"] == (p.argmax(1) == 2)[(g == 0) & (y == 2)].mean()
    assert multi.to_frame()["count"].sum() == 300
    with pytest.raises(ValueError, match="no target 7"):
        multi.to_frame(target=7)

    labels = pd.DataFrame(rng.integers(0, 2, (300, 2)), columns=["hat", "beard"])
    scores = rng.random((300, 2))
    several = audit(labels, scores, sensitive_features=g)
    assert several.task == "multilabel"
    assert several.to_frame().index.names == ["sensitive_feature_0", "target"]
    assert several.to_frame().loc[(1, "beard"), "selection_rate"] == (scores[g == 1, 1] >= 0.5).mean()
    assert len(several.tests) == 6

    target = rng.normal(size=300)
    real = audit(target, y_pred=target + 0.5, sensitive_features=g)
    assert real.task == "regression"
    assert real.to_frame()["mean_absolute_error"].tolist() == pytest.approx([0.5, 0.5])
    assert str(real.verdict) == "pass"


def test_words_as_classes():
    y, p = np.array(["cat", "dog", "cow", "dog"]), np.array(["cat", "cow", "cow", "dog"])
    frame = audit(y, y_pred=p, sensitive_features=G).to_frame()
    assert frame["accuracy"].to_dict() == {"f": 0.5, "m": 1.0}


def test_only_the_metrics_asked_for_are_shown():
    result = audit(Y, P, sensitive_features=G, metrics=["accuracy", "uncertainty"])
    assert result.to_frame().columns.tolist() == ["count", "accuracy", "uncertainty"]
    assert result.summary().index.tolist() == ["accuracy", "uncertainty"]


def test_bfloat16_scores_are_read():
    scores = torch.tensor(P, dtype=torch.bfloat16)
    assert audit(torch.tensor(Y), scores, sensitive_features=G).to_frame()["accuracy"].tolist() == [1.0, 1.0]


def test_impact_ratio_and_worst_group_by_hand():
    y, p = [1, 1, 0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0]
    result = audit(y, y_pred=p, sensitive_features=["f"] * 4 + ["m"] * 4)
    ratios = result.impact_ratios()
    assert ratios["impact_ratio"].tolist() == pytest.approx([1.0, 1 / 3])
    assert ratios["four_fifths"].tolist() == [True, False]
    assert result.worst_group in [(("f", "", 0), 0.5), (("m", "", 1), 0.5)]


def test_confidence_splits_the_confusion_matrix():
    y, p = np.array([1, 1, 0, 0, 1]), np.array([0.95, 0.6, 0.05, 0.7, 0.1])
    found = audit(y, p, sensitive_features=["f"] * 5).confidence()
    row = {key: int(value) for key, value in found.iloc[0].items() if value}
    assert row == {
        ("TP", "certain"): 1,
        ("TP", "uncertain"): 1,
        ("TN", "certain"): 1,
        ("FP", "uncertain"): 1,
        ("FN", "certain"): 1,
    }


def test_confidence_counts_the_predictions_of_the_threshold():
    rng = np.random.default_rng(0)
    labels, scores, g = rng.integers(0, 2, (300, 2)), rng.random((300, 2)), rng.integers(0, 2, 300)
    found = audit(labels, scores, sensitive_features=g, threshold=[0.2, 0.7])
    for target, threshold in enumerate((0.2, 0.7)):
        cells = found.confidence(target=target)
        predicted = cells[["TP", "FP"]].sum(axis=1).tolist()
        assert predicted == [(scores[g == group, target] >= threshold).sum() for group in (0, 1)]
        unsure = cells.xs("uncertain", axis=1, level=1).sum(axis=1).tolist()
        assert unsure == [(abs(scores[g == group, target] - 0.5) < 0.4).sum() for group in (0, 1)]


def test_columns_of_objects_and_nullable_types_are_what_they_hold():
    expected = audit(Y, P, sensitive_features=[1, 2, 2, 1]).to_frame()
    labels = [pd.Series([False, True, False, True], dtype=object), pd.array([0, 1, 0, 1], dtype="Int64")]
    for y in labels:
        found = audit(y, pd.array(P, dtype="Float64"), sensitive_features=pd.array([1, 2, 2, 1], dtype="Int64"))
        pd.testing.assert_frame_equal(found.to_frame(), expected)
    groups = pd.array([1, None, 2, 2], dtype="Int64")
    assert audit(Y, P, sensitive_features=groups).to_frame().index.tolist() == [1, 2, "unknown"]


def test_labels_with_a_positive_one_are_binary_whatever_they_are():
    for labels, positive in (([1, 2, 1, 2], 2), ([0, 7, 0, 7], 7), (["n", "y", "n", "y"], "y")):
        found = audit(labels, P, sensitive_features=G, pos_label=positive)
        assert (found.task, found.to_frame()["accuracy"].tolist()) == ("binary", [1.0, 1.0])


def test_a_baseline_is_compared_row_by_row():
    before = [0.1, 0.9, 0.4, 0.4]
    comparison = audit(Y, P, baseline_scores=before, sensitive_features=G).comparison
    frame = comparison.to_frame()
    assert frame["flip_rate"].to_dict() == {"f": 0.0, "m": 0.5}
    assert frame["mended"].to_dict() == {"f": 0, "m": 1}
    assert frame["accuracy_change"].to_dict() == {"f": 0.0, "m": 0.5}
    assert str(comparison.verdict) == "insufficient data"


def test_every_output_of_several_is_compared_as_if_it_were_alone():
    rng = np.random.default_rng(0)
    y, before, after = (rng.integers(0, 2, (500, 3)) for _ in range(3))
    g = rng.choice(["f", "m"], 500)
    several = audit(y, y_pred=after, baseline_pred=before, sensitive_features=g).comparison
    for target in range(3):
        alone = audit(y[:, target], y_pred=after[:, target], baseline_pred=before[:, target], sensitive_features=g)
        assert (several.pairs[:, target] == alone.comparison.pairs[:, 0]).all()
        columns = ["baseline_accuracy", "accuracy", "accuracy_change", "flip_rate", "broken", "mended", "mcnemar_p"]
        pd.testing.assert_frame_equal(several.to_frame(target=target)[columns], alone.comparison.to_frame()[columns])
        gaps = [test.gap for test in several.tests if test.target == str(target)]
        assert gaps == [test.gap for test in alone.comparison.tests]


def test_a_change_that_hits_one_group_is_a_disparity():
    rng = np.random.default_rng(0)
    y, g = rng.integers(0, 2, 1000), np.repeat(["f", "m"], 500)
    before = np.where(rng.random(1000) < 0.9, y, 1 - y)
    after = np.where((g == "m") & (rng.random(1000) < 0.2), 1 - before, before)
    result = audit(y, y_pred=after, baseline_pred=before, sensitive_features=g)
    assert str(result.comparison.verdict) == "disparity"
    assert {t.outliers for t in result.comparison.tests if t.metric == "accuracy_change"} == {("m",)}
    assert result.comparison.to_frame().loc["m", "mcnemar_p_adjusted"] < 0.001


def test_the_group_that_a_change_hits_is_named_by_every_rate():
    rng = np.random.default_rng(0)
    y, g = rng.integers(0, 2, 4000), np.repeat(["f", "m"], 2000)
    before = np.where(rng.random(4000) < 0.9, y, 1 - y)
    after = np.where((g == "m") & (rng.random(4000) < 0.3), 1 - y, before)
    rates = ["accuracy", "true_positive_rate", "false_positive_rate", "true_negative_rate", "false_negative_rate"]
    result = audit(y, y_pred=after, baseline_pred=before, sensitive_features=g, gate=Gate(metrics=rates))
    named = {test.metric: test.outliers for test in result.comparison.tests}
    assert named == {f"{rate}_change": ("m",) for rate in rates}


def test_changes_are_compared_within_control_features():
    rng = np.random.default_rng(0)
    y, g, site = rng.integers(0, 2, 4000), rng.choice(["f", "m"], 4000), rng.choice(["a", "b"], 4000)
    before = np.where(rng.random(4000) < 0.9, y, 1 - y)
    after = np.where((site == "b") & (rng.random(4000) < 0.3), 1 - before, before)  # a change of the site, not of sex
    controlled = audit(y, y_pred=after, baseline_pred=before, sensitive_features=g, control_features=site).comparison
    assert {test.control: set(test.outliers) for test in controlled.tests if test.metric == "accuracy_change"} == {
        ("a",): set(),
        ("b",): {"f", "m"},
    }
    assert [(test.control, test.groups) for test in controlled.tests[:2]] == [
        (("a",), ("f", "m")),
        (("b",), ("f", "m")),
    ]
    assert str(audit(y, y_pred=after, baseline_pred=before, sensitive_features=site).comparison.verdict) == "disparity"


def test_weights_do_not_enter_the_comparison_and_that_is_said():
    with pytest.warns(UserWarning, match="counts rows, without sample_weight"):
        audit(Y, P, baseline_scores=P, sensitive_features=G, sample_weight=[1, 2, 3, 4])


def test_every_table_shows_all_outputs_of_several_or_the_one_asked_for():
    rng = np.random.default_rng(0)
    y = pd.DataFrame(rng.integers(0, 2, (400, 2)), columns=["hat", "beard"])
    before, after = rng.random((2, 400, 2))
    g = pd.Series(rng.choice(["f", "m"], 400), name="sex")
    result = audit(y, after, baseline_scores=before, sensitive_features=g)
    for name in ("to_frame", "summary", "intervals", "confidence", "impact_ratios"):
        table = getattr(result, name)()
        for target in ("hat", "beard"):
            pd.testing.assert_frame_equal(table.xs(target, level="target"), getattr(result, name)(target=target))
    changes = result.comparison.to_frame()
    assert changes.index.tolist() == [("f", "hat"), ("f", "beard"), ("m", "hat"), ("m", "beard")]
    one = result.comparison.to_frame(target=1).drop(columns="mcnemar_p_adjusted")
    pd.testing.assert_frame_equal(changes.xs("beard", level="target")[one.columns], one)


def test_impact_ratios_are_within_control_features():
    rng = np.random.default_rng(0)
    g, c = rng.choice(["f", "m"], 400), rng.choice(["a", "b"], 400)
    picked = rng.random(400) < np.where(c == "a", 0.8, 0.2)
    ratios = audit(picked, y_pred=picked, sensitive_features=g, control_features=c).impact_ratios()["impact_ratio"]
    assert ratios.groupby(level=0).max().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("task", [None, "multiclass"])
@pytest.mark.parametrize(
    ("labels", "predictions"),
    [
        (np.array(["0", "1", "?", "0"]), np.array([0, 1, 1, 0])),
        (np.array(["0", "1", "?", "0"], dtype=object), [0, 1, 1, 0]),
        ([0, 1, 2, 0], np.array(["0", "1", "2", "0"])),
        (["a", "b", "c", "a"], [0, 1, 2, 0]),
        ([0, 1, "2", 0], [0, 1, 2, 0]),
        ([b"a", b"b", b"c", b"a"], ["a", "b", "c", "a"]),
        (pd.Series(["0", "1", "2", "0"], dtype="category"), pd.Series([0, 1, 2, 0])),
    ],
)
def test_labels_and_predictions_of_different_types_are_refused_and_shown(labels, predictions, task):
    with pytest.raises(ValueError, match=r"y_true holds .* and y_pred holds .*never equal") as caught:
        audit(labels, y_pred=predictions, sensitive_features=G, task=task)
    for value in (*set(map(str, np.asarray(labels, dtype=object))), *set(map(str, predictions))):
        assert value in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "predictions", "options", "message"),
    [
        (["a", "b", "c", "a"], ["A", "B", "C", "A"], {}, "no value is in both"),
        ([1, 2, 3, 1], [4, 5, 6, 4], {}, "no class is in both"),
        (["no", "no", "no", "no"], [0, 0, 0, 0], {"pos_label": "yes"}, "never equal"),
        (["yes", "no", "yes", "no"], ["Yes", "no", "no", "Yes"], {"pos_label": "no"}, "together have the values"),
        ([1, 2, 1, 2], [0, 1, 0, 1], {"pos_label": 1}, "together have the values"),
    ],
)
def test_labels_and_predictions_that_cannot_meet_are_refused(labels, predictions, options, message):
    with pytest.raises(ValueError, match=message):
        audit(labels, y_pred=predictions, sensitive_features=G, **options)


@pytest.mark.parametrize(
    ("labels", "predictions", "accuracy"),
    [
        ([0, 1, 2, 0], [0.0, 1.0, 2.0, 1.0], 0.75),
        ([True, False, True, False], [1, 0, 0, 1], 0.5),
        ([-1, 1, -1, 1], [0, 1, 1, 0], 0.5),
    ],
)
def test_numbers_of_any_type_are_compared_by_value(labels, predictions, accuracy):
    assert audit(labels, y_pred=predictions, sensitive_features=G).to_frame([])["accuracy"].iloc[0] == accuracy


def test_a_baseline_may_predict_a_class_that_the_model_never_does():
    y, after, before = ["a", "b", "b", "a"], ["a", "b", "a", "b"], ["a", "b", "c", "a"]
    y, after, before = y * 10 + ["d"], after * 10 + ["d"], before * 10 + ["d"]
    frame = audit(y, y_pred=after, baseline_pred=before, sensitive_features=[0] * 41).comparison.to_frame()
    assert frame[["flip_rate", "broken", "mended"]].iloc[0].tolist() == [20 / 41, 10, 0]


def selected(rows):
    """An audit of groups with (selected, all) rows, by their predictions alone."""
    p = np.concatenate([np.arange(n) < k for k, n in rows]).astype(int)
    return p, np.repeat(np.arange(len(rows)), [n for _, n in rows])


@pytest.mark.parametrize("weight", [None, 0.1, 1 / 3])
def test_exactly_four_fifths_are_four_fifths(weight):
    for best, n in [(best, rows) for rows in (30, 50, 70, 90, 110, 1000) for best in range(5, rows, 5)]:
        p, g = selected([(best * 4 // 5, n), (best, n), (best * 4 // 5 - 1, n)])
        options = {} if weight is None else {"sample_weight": np.full(len(p), weight)}
        found = audit(p, y_pred=p, sensitive_features=g, **options).impact_ratios()["four_fifths"].tolist()
        assert found == [True, True, False], (best, n)


def test_four_fifths_of_groups_of_different_sizes_are_exact():
    for k, n, best, most in ((72, 100, 90, 100), (24, 50, 18, 30), (28, 100, 35, 100), (56, 175, 40, 100)):
        assert 5 * k * most == 4 * best * n
        p, g = selected([(k, n), (best, most)])
        assert audit(p, y_pred=p, sensitive_features=g).impact_ratios()["four_fifths"].tolist() == [True, True]


def test_a_group_of_one_row_is_marked_and_does_not_fail_the_others():
    p, g = selected([(50, 100), (45, 100), (1, 1)])
    found = audit(p, y_pred=p, sensitive_features=g).impact_ratios()
    assert found["four_fifths"].tolist() == [True, True, None]
    assert found["too_few_rows"].tolist() == [False, False, True]
    assert found["impact_ratio"].tolist() == pytest.approx([1.0, 0.9, 2.0])


def test_where_nobody_is_selected_there_is_no_ratio():
    p, g = selected([(0, 40), (0, 50)])
    assert audit(p, y_pred=p, sensitive_features=g).impact_ratios()["four_fifths"].tolist() == [None, None]
