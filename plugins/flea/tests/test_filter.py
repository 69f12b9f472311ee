"""filter_sources and FLEASelector: what goes in, what comes out, and what is refused."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import groundwire_flea
from groundwire_flea import FLEASelector, FLEAWarning, filter_sources

quietly = pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")


def run(data, **options):
    return filter_sources(data.X, data.y, sensitive_features=data.a, sources=data.source, **options)


@quietly
@pytest.mark.parametrize("how", ["protected", "label"])
def test_manipulated_sources_are_suppressed(table, how):
    data = table(5, (1, 3), how=how)
    result = run(data)
    assert set(result.suppressed) == {"clinic 1", "clinic 3"}
    assert result.kept == ("clinic 0", "clinic 2", "clinic 4")
    assert result.mask.tolist() == [s in result.kept for s in data.source]
    assert list(result.scores) == [f"clinic {i}" for i in range(5)]
    assert result.distances.loc["clinic 0", "clinic 1"] == result.distances.loc["clinic 1", "clinic 0"]
    np.testing.assert_allclose(result.distances, result.disc + result.disp + result.disb, atol=1e-12)


@quietly
def test_arrays_frames_tensors_and_lists_give_the_same_result(table):
    data = table(4, (2,))
    plain = run(data)
    frame = filter_sources(
        pd.DataFrame(data.X).set_axis(list("vwxyz"), axis=1), pd.Series(data.y, index=data.y.cumsum()),
        sensitive_features=pd.DataFrame({"sex": data.a}), sources=pd.Categorical(data.source),
    )  # fmt: skip
    tensor = filter_sources(
        torch.tensor(data.X), torch.tensor(data.y), sensitive_features=torch.tensor(data.a), sources=list(data.source)
    )
    bfloat = filter_sources(
        torch.tensor(data.X), torch.tensor(data.y).bfloat16(), sensitive_features=torch.tensor(data.a).bfloat16(),
        sources=data.source,
    )  # fmt: skip
    given = {"sensitive_features": data.a, "sources": data.source}
    sparse = filter_sources(torch.tensor(data.X).to_sparse(), data.y, **given)
    objects = filter_sources(pd.DataFrame(data.X, dtype=object), data.y, **given)
    for other in (frame, tensor, bfloat, sparse, objects):
        assert other.scores == pytest.approx(plain.scores)
        assert other.kept == plain.kept


@quietly
def test_the_distance_does_not_depend_on_units_of_the_columns(table):
    data = table(4, (2,))
    plain = run(data)
    data.X = data.X * np.array([1e-3, 1e6, 1, -5, 1]) + np.array([0, 1e4, -3, 0, 0])
    assert run(data).scores == pytest.approx(plain.scores, abs=0.03)
    assert run(data).kept == plain.kept


@quietly
@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_numbers_whose_squares_overflow_or_vanish_are_compared_too(table, size):
    data = table(4, (2,))
    plain = run(data)
    data.X = data.X * size
    assert run(data).scores == pytest.approx(plain.scores, abs=0.03)


@quietly
def test_a_missing_category_is_told_from_the_word_missing(table):
    data = table(4, (2,))
    words = np.where(data.X[:, 0] > 15, "missing", np.where(data.X[:, 0] > 12, None, "small"))
    frame = pd.DataFrame({"size": words, "sex": data.a})
    scores = filter_sources(frame, data.y, sensitive_features=data.a, sources=data.source).scores
    other = frame.assign(size=frame["size"].where(frame["size"] != "missing", "large").fillna("unknown"))
    assert filter_sources(other, data.y, sensitive_features=data.a, sources=data.source).scores == pytest.approx(
        scores, abs=0.03
    )


@quietly
def test_a_source_that_was_refused_leaves_the_selector_as_it_was(table):
    data, late = table(4, (2,)), table(5, (1, 3), seed=1)
    selector = FLEASelector().fit(**data.given())
    new = late.source == "clinic 4"
    rows = {"X": late.X[new], "y": late.y[new], "sensitive_features": late.a[new], "sources": late.source[new]}
    with pytest.raises(ValueError, match=r"'clinic 4' .* has no row with label 1"):
        selector.partial_fit(**rows | {"y": 0 * rows["y"]})
    assert selector.partial_fit(**rows).result_.mask.shape == (len(data.y) + new.sum(),)


def shown(selector):
    """Everything that a selector tells after ``fit``."""
    learned = {k: v for k, v in vars(selector).items() if k.endswith("_") and k != "result_"}
    return {**learned, "mask": selector.result_.mask, "scores": selector.result_.scores}


@quietly
def test_a_fit_that_fails_leaves_the_result_of_the_one_before(table):
    data, other = table(4, (2,)), table(5, (1, 3), seed=1)
    late = other.source == "clinic 4"
    rest = {k: v[late] for k, v in other.given().items()}
    selector, twin = (FLEASelector(max_rows_per_source=90, random_state=2).fit(**data.given()) for _ in range(2))
    before = shown(selector)
    failures = [
        ({"y": 0 * other.y}, "only the value 0"),
        ({"X": other.X[:-1]}, "different numbers of rows"),
        ({"sources": np.where(other.a == 1, "A", "B")}, "at least 3"),
        ({"sources": np.where(other.source == "clinic 0", None, other.source)}, "missing"),
        ({"y": np.where(other.source == "clinic 1", 0, other.y)}, "has no row with label 1"),
    ]
    for change, text in failures:
        with pytest.raises(ValueError, match=text):
            selector.fit(**{**other.given(), **change})
        pd.testing.assert_frame_equal(selector.report_, before["report_"])
        assert shown(selector).keys() == before.keys()
        assert selector.source_ids_ == before["source_ids_"]
        np.testing.assert_array_equal(selector.D_, before["D_"])
    with pytest.raises(ValueError, match="n_clean=9 is outside"):
        selector.set_params(n_clean=9).fit(**other.given())
    selector.set_params(n_clean=None)
    for one in (selector, twin):
        one.partial_fit(**rest)
    np.testing.assert_array_equal(selector.D_, twin.D_)
    assert selector.get_support(indices=True).tolist() == twin.get_support(indices=True).tolist()
    assert selector.select_rows(["clinic 0", "clinic 4"]).shape == (2,)


def test_a_warning_that_is_raised_leaves_a_selector_with_its_new_result(table):
    data, other = table(4, (2,)), table(5, (1, 3), seed=1)
    selector = FLEASelector()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        selector.fit(**data.given())
        expected = FLEASelector().fit(**other.given())
    with pytest.raises(FLEAWarning):
        selector.fit(**other.given())
    assert selector.result_.kept == expected.result_.kept
    np.testing.assert_array_equal(selector.D_, expected.D_)
    assert selector.source_ids_ == expected.source_ids_


@quietly
def test_constant_and_duplicate_columns_do_not_matter(table):
    data = table(4, (2,))
    plain = run(data)
    data.X = np.column_stack([data.X, np.full(len(data.y), 7.0), data.X[:, 1], np.zeros(len(data.y)), 2 * data.X[:, 0]])
    assert run(data).scores == pytest.approx(plain.scores, abs=0.03)


@quietly
def test_separable_sources_have_finite_distances(table):
    data = table(3)
    data.X = np.column_stack([data.y, data.a, data.X[:, 0]]).astype(float)
    assert np.isfinite(run(data).distances.to_numpy()).all()


@quietly
def test_the_sensitive_column_is_appended_unless_it_is_there(table):
    data = table(4, (2,))
    with_a = run(data, append_sensitive=True)
    assert with_a.scores == run(data).scores
    data.X = data.X[:, :-1]
    appended = run(data, append_sensitive=True)
    assert appended.scores == pytest.approx(with_a.scores, abs=1e-9)
    assert appended.scores != pytest.approx(run(data).scores, abs=1e-9)


@quietly
def test_text_and_missing_categories_are_encoded_and_strings_are_groups_and_labels(table):
    data = table(4, (2,))
    frame = pd.DataFrame(data.X[:, :2], columns=["radius", "texture"])
    frame["hospital type"] = np.where(data.X[:, 2] > np.median(data.X[:, 2]), "big", "small")
    frame.loc[::17, "hospital type"] = None
    frame["insured"] = pd.Categorical(np.where(data.X[:, 3] > 0.05, "yes", "no"))
    frame["flag"] = data.X[:, 3] > 0.04
    result = filter_sources(
        frame, np.where(data.y == 1, "benign", "malignant"), sensitive_features=np.where(data.a == 1, "f", "m"),
        sources=data.source, append_sensitive=True,
    )  # fmt: skip
    assert result.suppressed == ("clinic 2",)
    assert {"P(y=benign)", "P(a=m)", "q", "kept", "why"} <= set(result.report)


@quietly
@pytest.mark.parametrize("fairness", ["equal_opportunity", "equalized_odds"])
def test_other_fairness_notions_find_the_flipped_sources(table, fairness):
    result = run(table(5, (1, 3)), fairness=fairness)
    assert set(result.suppressed) == {"clinic 1", "clinic 3"}


@quietly
def test_equal_opportunity_looks_at_the_positive_label_only(table):
    data = table(5)
    bad = (data.source == "clinic 1") & (data.y == 0)
    data.a[bad] = 1 - data.a[bad]
    data.X[:, -1] = data.a
    zero = run(data, fairness="equal_opportunity", positive_label=0, components=("disp",)).scores
    one = run(data, fairness="equal_opportunity", positive_label=1, components=("disp",)).scores
    assert max(zero, key=zero.get) == "clinic 1"
    assert zero["clinic 1"] > one["clinic 1"] + 0.2


@quietly
def test_several_groups_and_several_labels(table):
    data = table(4)
    three = data.a + (data.X[:, 0] > np.quantile(data.X[:, 0], 0.6))
    labels = data.y + (data.X[:, 1] > np.quantile(data.X[:, 1], 0.5))
    bad = data.source == "clinic 3"
    three[bad], labels[bad] = (three[bad] + 1) % 3, (labels[bad] + 1) % 3
    result = filter_sources(data.X[:, :4], labels, sensitive_features=three, sources=data.source, append_sensitive=True)
    assert result.suppressed == ("clinic 3",)
    assert {"P(a=2)", "P(y=2)"} <= set(result.report)


@quietly
def test_three_groups_of_which_one_is_empty_of_meaning_equal_two(table):
    """One group against the rest, both ways, is what two groups are."""
    from groundwire_flea.distances.pairwise import DistanceOptions, distances
    from groundwire_flea.distances.sources import Sources

    data = table(3, (1,))
    order = np.argsort(data.source, kind="stable")
    parts = (data.X - data.X.mean(0))[order] / data.X.std(0), data.y[order], data.a[order]
    sizes = np.unique(data.source, return_counts=True)[1]
    two = distances(Sources(*parts, sizes, 2, 2), DistanceOptions(components=("disc",)))
    three = distances(Sources(*parts, sizes, 3, 2), DistanceOptions(components=("disc",)))
    np.testing.assert_allclose(three.disc, two.disc, atol=0.02)


@quietly
def test_a_source_that_comes_later_is_compared_with_the_old_ones_only(table):
    data = table(5, (1, 3))
    early = data.source != "clinic 4"
    selector = FLEASelector(n_clean=3)
    parts = [
        (data.X[m], data.y[m], {"sensitive_features": data.a[m], "sources": data.source[m]}) for m in (early, ~early)
    ]
    selector.fit(*parts[0][:2], **parts[0][2])
    old = selector.D_.copy()
    selector.partial_fit(*parts[1][:2], **parts[1][2])
    np.testing.assert_array_equal(selector.D_[:4, :4], old)
    whole = FLEASelector(n_clean=3).fit(data.X, data.y, sensitive_features=data.a, sources=data.source)
    order = [whole.source_ids_.index(s) for s in selector.source_ids_]
    np.testing.assert_allclose(selector.D_, whole.D_[np.ix_(order, order)], atol=0.02)
    assert set(selector.result_.kept) == set(whole.result_.kept)
    assert selector.result_.mask.shape == data.y.shape
    with pytest.raises(ValueError, match="compared already"):
        selector.partial_fit(*parts[1][:2], **parts[1][2])
    with pytest.raises(ValueError, match="unknown values 7"):
        selector.partial_fit(
            data.X[~early],
            data.y[~early],
            sensitive_features=np.full((~early).sum(), 7),
            sources=["new"] * (~early).sum(),
        )


@quietly
def test_the_selector_follows_scikit_learn(table):
    from sklearn.base import clone
    from sklearn.exceptions import NotFittedError

    data = table(5, (1, 3))
    selector = clone(FLEASelector(n_clean=0.6, random_state=3))
    with pytest.raises(NotFittedError):
        selector.get_support()
    x, y = selector.fit_resample(data.X, pd.Series(data.y), sensitive_features=data.a, sources=data.source)
    assert len(x) == len(y) == selector.result_.mask.sum()
    assert selector.get_support(indices=True).tolist() == [0, 2, 4]
    assert selector.select_rows(["clinic 1", "clinic 0"]).tolist() == [False, True]
    assert selector.disc_.shape == selector.disp_.shape == selector.disb_.shape == selector.D_.shape == (5, 5)
    with pytest.raises(ValueError, match="never compared"):
        selector.select_rows(["clinic 9"])


@quietly
def test_modes_and_vouched_sources(table):
    data = table(5, (1, 3))
    weights = run(data, mode="weights")
    assert weights.mask.all()
    assert (weights.weights[data.source == "clinic 0"] == 1).all()
    assert (weights.weights[data.source == "clinic 1"] < 0.5).all()
    report = run(data, mode="report")
    assert report.mask.all()
    assert report.weights is None
    assert report.suppressed == weights.suppressed
    vouched = run(data, always_keep=["clinic 1"])
    assert "clinic 1" in vouched.kept
    assert len(vouched.kept) == 3


@quietly
def test_more_sources_are_kept_where_nothing_is_suspicious(table):
    clean = run(table(5, seed=1), keep_unsuspicious=True, permutations=10)
    assert len(clean.kept) == 5
    attacked = run(table(5, (1, 3), seed=1), keep_unsuspicious=True, permutations=10)
    assert set(attacked.suppressed) == {"clinic 1", "clinic 3"}
    assert (attacked.report.loc[["clinic 1", "clinic 3"], "p-value"] < 0.05).all()


def test_a_test_that_could_find_nothing_suspicious_is_refused(table):
    with pytest.raises(ValueError, match=r"p-values of at least 0.062, .* use permutations >= 7"):
        run(table(5, (1, 3)), keep_unsuspicious=True, permutations=5)
    with pytest.raises(ValueError, match="use permutations >= 33"):
        run(table(5, (1, 3)), keep_unsuspicious=True, alpha=0.01)


@quietly
def test_components_and_aggregation(table):
    data = table(4, (2,), how="label")
    assert (run(data, components=("disb",)).disc == 0).all(axis=None)
    largest = run(data, aggregation="max")
    np.testing.assert_allclose(largest.distances, np.maximum(np.maximum(largest.disc, largest.disp), largest.disb))


@quietly
def test_a_subsample_of_rows_finds_the_same_sources_and_is_reproducible(table):
    data = table(4, (2,))
    one, two = (run(data, max_rows_per_source=80, random_state=5) for _ in range(2))
    assert one.scores == two.scores
    assert one.suppressed == ("clinic 2",)
    assert one.mask.shape == data.y.shape
    assert one.report["rows"].sum() == len(data.y)


@quietly
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(4)))
def test_names_of_sources_do_not_matter(table, names):
    data = table(4, (2,))
    plain = run(data)
    renamed = np.array([f"site {names[int(s[-1])]}" for s in data.source])
    result = filter_sources(data.X, data.y, sensitive_features=data.a, sources=renamed)
    assert list(result.scores.values()) == list(plain.scores.values())


def test_the_public_names_are_there():
    assert {"FLEA", "FLEASelector", "filter_sources", "FLEAResult"} <= set(groundwire_flea.__all__)
