"""W1 to W8: when the filter says not to trust it blindly."""

import warnings

import numpy as np
import pandas as pd
import pytest

from groundwire_flea import FLEAWarning, filter_sources

quietly = pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")


def run(data, **options):
    return filter_sources(data.X, data.y, sensitive_features=data.a, sources=data.source, **options)


@quietly
def test_workers_blocks_and_order_of_rows_change_nothing(table):
    data = table(5, (1, 3))
    plain = run(data).distances
    pd.testing.assert_frame_equal(run(data, n_jobs=2).distances, plain)
    order = np.argsort(data.source, kind="stable")
    grouped = type(data)(X=data.X[order], y=data.y[order], a=data.a[order], source=data.source[order])
    pd.testing.assert_frame_equal(run(grouped).distances, plain, atol=1e-9)


def codes(result):
    return {caution.code: caution for caution in result.warnings}


@quietly
def test_w1_half_or_fewer_clean_sources_warn_with_the_theorem(table):
    with pytest.warns(FLEAWarning, match="W1.*n_clean=2 of 4.*theorem"):
        run(table(4), n_clean=2)


@quietly
def test_w1_half_of_the_sources_suspicious(table):
    result = run(table(4, (1, 3)), n_clean=3, permutations=10)
    assert "W1" in codes(result)
    assert set(codes(result)["W1"].sources) >= {"clinic 1", "clinic 3"}


@quietly
def test_w2_small_groups_are_named_with_their_size(table):
    result = run(table(8))
    caution = codes(result)["W2"]
    assert caution.sources == tuple(result.scores)
    assert str(int(caution.value)) in caution.message


@quietly
def test_w3_no_gap_between_clean_sources_and_a_gap_before_flipped_ones(table):
    assert "W3" in codes(run(table(5)))
    assert "W3" not in codes(run(table(5, (1, 3))))


def flipped_within(group, rows=4000, share=0.5, flip=True):
    """Five sources, the second of which may have all labels of one group flipped."""
    rng = np.random.default_rng(1)
    a, source = (rng.random(rows) < share).astype(int), np.arange(rows) % 5
    x = np.column_stack([rng.normal(size=(rows, 3)), a])
    y = (x[:, 0] + rng.normal(size=rows) > 0).astype(int)
    turned = flip & (source == 1) & (a == group)
    return filter_sources(x, np.where(turned, 1 - y, y), sensitive_features=a, sources=source, n_clean=4)


@quietly
def test_w3_tells_which_group_s_flipped_labels_are_hidden_by_chance():
    """A flip within 6 % of the rows is hidden; one within the other 94 % is found, and not said to be hidden."""
    message = codes(flipped_within(1, share=0.06, flip=False))["W3"].message
    assert "Flipped labels of one group only are at chance level here for 1 (about 0.03)" in message
    assert " 0 (about" not in message
    assert flipped_within(0, share=0.06).suppressed == (1,)
    assert 1 in flipped_within(1, share=0.06).kept


@quietly
def test_w3_hides_no_flip_that_would_be_found():
    assert "Flipped labels" not in codes(flipped_within(0, rows=40_000, flip=False))["W3"].message
    assert flipped_within(0, rows=40_000).suppressed == (1,)
    assert flipped_within(1, rows=40_000).suppressed == (1,)


@quietly
def test_w3_and_w7_leave_out_sources_that_the_user_vouches_for(table):
    result = run(table(7, (1, 3)), always_keep=["clinic 1"])
    known, suppressed = codes(result), result.suppressed
    by_score = [result.scores[s] for s in result.kept if s != "clinic 1"]
    border = min(result.scores[s] for s in suppressed)
    assert "clinic 1" in result.kept
    assert max(by_score) <= border < result.scores["clinic 1"]
    assert known["W3"].value == pytest.approx(border - max(by_score))
    assert "clinic 1" not in known["W3"].sources
    doubled = table(4)
    half = np.arange(len(doubled.y)) % 2 == 0
    same = type(doubled)(**{k: np.concatenate([v[half]] * 4) for k, v in vars(doubled).items()})
    same.source = np.repeat(list("ABCD"), half.sum())
    assert codes(run(same, always_keep=["A"]))["W7"].sources == ("B", "C", "D")


@quietly
def test_w4_two_camps_are_named(table):
    data = table(7, (0, 1, 2))
    caution = codes(run(data))["W4"]
    assert set(caution.sources) == {"clinic 0", "clinic 1", "clinic 2"}
    assert "W4" not in codes(run(table(7)))


@quietly
def test_w5_sources_that_differ_by_nature(table):
    data = table(3)
    data.source = np.array(["small", "middle", "large"])[
        np.digitize(data.X[:, 0], np.quantile(data.X[:, 0], [0.33, 0.66]))
    ]
    data.y = (data.X[:, 1] > np.median(data.X[:, 1])).astype(int)
    flip = np.isin(data.source, ["small"])
    data.y[flip] = 1 - data.y[flip]
    assert "W5" in codes(run(data))
    assert "W5" in codes(run(data, permutations=5))
    assert "W5" not in codes(run(table(3)))


@quietly
def test_w5_tells_overfitted_scores_of_small_sources_from_different_ones_by_cross_fitting(table):
    data = table(10, features=range(12))
    message = codes(run(data))["W5"].message
    assert "or have few rows for their 13 columns (permutations= tells which)" in message
    assert "W5" not in codes(run(data, permutations=5))


@quietly
def test_w6_a_rare_group_makes_unfiltered_training_hopeless(table):
    data = table(5)
    data.a = (data.X[:, 0] > np.quantile(data.X[:, 0], 0.8)).astype(int)
    result = run(data)
    two_largest = np.sort(np.unique(data.source, return_counts=True)[1])[-2:].sum() / len(data.y)
    assert codes(result)["W6"].value == pytest.approx(two_largest / data.a.mean())
    assert result.bound == 1
    assert "W6" not in codes(run(table(5)))


@quietly
def test_w6_counts_the_rows_of_the_largest_sources_and_the_groups_that_fairness_looks_at(table):
    data = table(5)
    data.source = np.where(np.arange(len(data.y)) < 340, np.array(["A", "B"])[np.arange(len(data.y)) % 2], data.source)
    assert len(set(data.source)) == 7
    result = run(data, n_clean=5)
    rarest = min(data.a.mean(), 1 - data.a.mean())
    assert codes(result)["W6"].value == pytest.approx(340 / len(data.y) / rarest)
    rarest = min(float(np.mean((data.a == group) & (data.y == 0))) for group in (0, 1))
    within = run(data, n_clean=5, fairness="equal_opportunity", positive_label=0)
    assert within.bound == 1
    assert codes(within)["W6"].value == pytest.approx(340 / len(data.y) / rarest)


@quietly
def test_w7_a_tie_at_the_border_is_named(table):
    data = table(3)
    four = {k: np.concatenate([v, v[data.source == "clinic 2"]]) for k, v in vars(data).items()}
    four["source"] = np.concatenate([data.source, np.full((data.source == "clinic 2").sum(), "copy")])
    result = run(type(data)(**four), n_clean=1)
    assert set(codes(result)["W7"].sources) >= {"clinic 2", "copy"}


def test_well_separated_large_sources_cause_no_warning():
    rng = np.random.default_rng(0)
    n, m = 5, 1500
    a, source = rng.integers(2, size=n * m), np.repeat(np.arange(n), m)
    x = np.column_stack([rng.normal(size=(n * m, 3)), a])
    y = (x[:, 0] + 0.5 * a + rng.normal(size=n * m) > 0).astype(int)
    y[source == 4] = 1 - y[source == 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = filter_sources(x, y, sensitive_features=a, sources=source, n_clean=4)
    assert result.suppressed == (4,)
    assert result.warnings == ()
    assert "kept" in repr(result)
