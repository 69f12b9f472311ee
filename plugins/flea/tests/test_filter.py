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
    for other in (frame, tensor):
        assert other.scores == pytest.approx(plain.scores)
        assert other.kept == plain.kept


@quietly
def test_workers_blocks_and_order_of_rows_change_nothing(table):
    data = table(5, (1, 3))
    plain = run(data).distances
    pd.testing.assert_frame_equal(run(data, n_jobs=2).distances, plain)
    order = np.argsort(data.source, kind="stable")
    grouped = type(data)(X=data.X[order], y=data.y[order], a=data.a[order], source=data.source[order])
    pd.testing.assert_frame_equal(run(grouped).distances, plain, atol=1e-9)


@quietly
def test_the_distance_does_not_depend_on_units_of_the_columns(table):
    data = table(4, (2,))
    plain = run(data)
    data.X = data.X * np.array([1e-3, 1e6, 1, -5, 1]) + np.array([0, 1e4, -3, 0, 0])
    assert run(data).scores == pytest.approx(plain.scores, abs=0.03)
    assert run(data).kept == plain.kept


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
    from groundwire_flea.distances import distances
    from groundwire_flea.rows import Rows
    from groundwire_flea.settings import Settings

    data = table(3, (1,))
    order = np.argsort(data.source, kind="stable")
    parts = (data.X - data.X.mean(0))[order] / data.X.std(0), data.y[order], data.a[order]
    sizes = np.unique(data.source, return_counts=True)[1]
    two = distances(Rows(*parts, sizes, 2, 2), Settings(components=("disc",)))
    three = distances(Rows(*parts, sizes, 3, 2), Settings(components=("disc",)))
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


# Refusals


def broken(data, **changes):
    for name, change in changes.items():
        setattr(
            data, name, change(getattr(data, name).astype(object) if name == "source" else getattr(data, name).copy())
        )
    return data


def put(row, value, column=None):
    def change(values):
        values = values.astype(float) if isinstance(value, float) else values
        if column is None:
            values[row] = value
        else:
            values[row, column] = value
        return values

    return change


CASES = {
    "two sources": ({"source": lambda s: np.where(s == "clinic 0", "A", "B")}, "at least 3"),
    "no label 0 in a source": ("label", "source 'clinic 1' .* has no row with label 0"),
    "no group 1 in a source": ("group", "source 'clinic 1' .* has no row of group 1"),
    "an infinite number": ({"X": put(3, np.inf, 2)}, "column 2 of X has 1 missing or .*, the first in row 3"),
    "a missing number": ({"X": put(4, np.nan, 0)}, "column 0 of X"),
    "a missing group": ({"a": put(5, np.nan)}, "sensitive_features has 1 missing values, the first in row 5"),
    "a missing source": ({"source": put(6, None)}, "sources has 1 missing"),
    "a missing label": ({"y": put(7, np.nan)}, "y has 1 missing"),
    "unequal lengths": ({"y": lambda y: y[:-1]}, "different numbers of rows"),
    "one group only": ({"a": lambda a: a * 0}, "only the value 0"),
    "one label only": ({"y": lambda y: y * 0}, "only the value 0"),
    "regression": ({"y": lambda y: np.linspace(0.1, 0.9, len(y))}, "regression"),
    "three dimensions": ({"X": lambda x: x[:, :, None]}, "two dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_by_name(table, case):
    change, text = CASES[case]
    data = table(4)
    if isinstance(change, str):
        drop = (data.source == "clinic 1") & ((data.y == 0) if change == "label" else (data.a == 1))
        data = type(data)(**{k: v[~drop] for k, v in vars(data).items()})
    else:
        data = broken(data, **change)
    with pytest.raises(ValueError, match=text):
        run(data)


def test_identifiers_and_dates_are_refused_by_column(table):
    data = table(4)
    frame = pd.DataFrame(data.X).add_prefix("c")
    for name, values in {"patient": [f"p{i}" for i in range(len(frame))], "seen": pd.Timestamp("2020-01-01")}.items():
        with pytest.raises(ValueError, match=f"column '{name}'"):
            filter_sources(frame.assign(**{name: values}), data.y, sensitive_features=data.a, sources=data.source)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fairness": "parity"}, "fairness='parity'"),
        ({"mode": "drop"}, "mode='drop'"),
        ({"n_clean": 9}, "outside 1..4"),
        ({"n_clean": 1.5}, "outside"),
        ({"components": ("disc", "x")}, "components"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"always_keep": ["clinic 77"]}, "always_keep names 'clinic 77'"),
        ({"always_keep": "clinic 1"}, "give a list"),
        ({"positive_label": 5, "fairness": "equal_opportunity"}, "positive_label=5"),
        ({"compat": "reference", "fairness": "equalized_odds"}, "demographic parity only"),
        ({"compat": "jax"}, "compat"),
        ({"alpha": 0}, "alpha"),
        ({"max_rows_per_source": 1}, "max_rows_per_source"),
    ],
)
def test_arguments_out_of_range_are_refused(table, options, text):
    with pytest.raises(ValueError, match=text):
        run(table(4), **options)


def test_a_bool_is_no_number_of_sources(table):
    with pytest.raises(TypeError, match="n_clean"):
        run(table(4), n_clean=True)


# Cautions


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
    assert "W5" not in codes(run(table(3)))


@quietly
def test_w6_a_rare_group_makes_unfiltered_training_hopeless(table):
    data = table(5)
    data.a = (data.X[:, 0] > np.quantile(data.X[:, 0], 0.8)).astype(int)
    result = run(data)
    assert codes(result)["W6"].value == pytest.approx(0.4 / data.a.mean())
    assert result.bound == 1
    assert "W6" not in codes(run(table(5)))


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


def test_the_public_names_are_there():
    assert {"FLEA", "FLEASelector", "filter_sources", "FLEAResult"} <= set(groundwire_flea.__all__)
