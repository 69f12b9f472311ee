"""Near copies among sources: named, and counted once where the user wants that."""

import numpy as np
import pytest
from flea_clinics_of_tests import Rows, fit

from groundwire import Plugins, Report
from groundwire_flea import FLEA, FLEASelector, FLEAWarning, filter_sources
from groundwire_flea.copies import first_copies
from groundwire_flea.distances.sources import Sources

quietly = pytest.mark.filterwarnings("ignore::groundwire_flea.FLEAWarning")


def source(rng, rows=300, flipped=False, discrete=False):
    """One source's X, y and a."""
    a, z = rng.integers(2, size=rows), rng.normal(size=(rows, 4))
    z = (z > 0).astype(float) if discrete else z
    y = (z[:, 0] + 0.5 * a + rng.normal(size=rows) > 0).astype(int)
    return np.column_stack([z, a]), 1 - y if flipped else y, a


def given(parts):
    x, y, a = (np.concatenate([part[i] for part in parts.values()]) for i in range(3))
    return {
        "X": x,
        "y": y,
        "sensitive_features": a,
        "sources": np.repeat(list(parts), [len(p[1]) for p in parts.values()]),
    }


def run(parts, **options):
    data = given(parts)
    return filter_sources(data.pop("X"), data.pop("y"), **data, **options)


def compared(*parts):
    x, y, a = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Sources((x - x.mean(0)) / x.std(0), y, a, np.array([len(p[1]) for p in parts]), 2, 2)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def thrice(rng):
    """An honest source under three names, and four others."""
    first = source(rng)
    return {"A": first, "A2": first, "A3": first, **{name: source(rng) for name in "BCDE"}}


@pytest.fixture
def outvoted(rng):
    """Seven copies of a flipped source, and four honest ones."""
    bad = source(rng, flipped=True)
    return {**{f"bad {i}": bad for i in range(7)}, **{name: source(rng) for name in "BCDE"}}


def changed(rng, part, other):
    """The rows in another order; a tenth missing; a tenth of another source; a little noise on every number."""
    x, y, a = part
    order, rows = rng.permutation(len(y)), np.arange(len(y))
    noise = rng.normal(size=x.shape) * np.array([0.03] * 4 + [0])
    mixed = [
        np.where((rows < len(y) // 10)[:, None] if v.ndim == 2 else rows < len(y) // 10, w, v)
        for v, w in zip(part, other, strict=True)
    ]
    return {
        "shuffled": tuple(v[order] for v in part),
        "shorter": tuple(v[len(y) // 10 :] for v in part),
        "mixed": tuple(mixed),
        "noisy": (x + noise, y, a),
    }


@pytest.mark.parametrize("how", ["shuffled", "shorter", "mixed", "noisy"])
def test_near_copies_are_found_however_they_differ(rng, how):
    part, *others = (source(rng) for _ in range(4))
    near = changed(rng, part, others[0])[how]
    assert first_copies(compared(part, *others, near)).tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("rows", [40, 200, 1000])
@pytest.mark.parametrize("discrete", [False, True])
def test_independent_sources_are_no_copies_also_where_all_values_repeat(rng, discrete, rows):
    parts = [source(rng, rows, discrete=discrete) for _ in range(12)]
    assert first_copies(compared(*parts)).tolist() == list(range(12))
    assert first_copies(compared(*parts, parts[3])).tolist() == [*range(12), 3]


def test_the_same_rows_with_other_labels_are_no_copy(rng):
    x, y, a = source(rng)
    assert first_copies(compared((x, y, a), (x, 1 - y, a), source(rng))).tolist() == [0, 1, 2]


@quietly
@pytest.mark.parametrize("once", [False, True])
def test_copies_are_named_in_a_warning_and_in_the_result(thrice, once):
    with pytest.warns(FLEAWarning, match="W8: near copies of each other, by their rows: 'A', 'A2', 'A3'"):
        result = run(thrice, count_copies_once=once)
    assert result.copies == (("A", "A2", "A3"),)
    [caution] = [c for c in result.warnings if c.code == "W8"]
    assert caution.sources == ("A", "A2", "A3")
    assert caution.value == 3


@quietly
def test_three_copies_of_an_honest_source_displace_others_unless_they_count_once(thrice):
    assert run(thrice, n_clean=3).kept == ("A", "A2", "A3")
    once = run(thrice, n_clean=3, count_copies_once=True)
    assert {"A2", "A3"} <= set(once.suppressed)
    assert once.report.loc["A3", "why"] == "a copy of 'A', which counts for it"
    assert len(once.kept) == 3


@quietly
def test_seven_copies_of_a_manipulated_source_beat_four_honest_ones_unless_they_count_once(outvoted):
    assert all(name.startswith("bad") for name in run(outvoted).kept)
    assert set(run(outvoted, count_copies_once=True).kept) < set("BCDE")


@quietly
@pytest.mark.parametrize(
    "options", [{}, {"n_clean": 4}, {"n_clean": 0.5}, {"permutations": 3}, {"fairness": "equalized_odds"}]
)
def test_counting_once_is_the_filter_without_the_copies(thrice, options):
    alone = run({name: part for name, part in thrice.items() if name not in ("A2", "A3")}, **options)
    once = run(thrice, count_copies_once=True, **options)
    assert once.kept == alone.kept
    assert once.n_clean == alone.n_clean
    assert {name: once.scores[name] for name in alone.scores} == pytest.approx(alone.scores, abs=0.02)
    assert once.scores["A2"] == once.scores["A"]
    rows = given(thrice)["sources"]
    assert once.mask.tolist() == [name in alone.kept for name in rows]


@quietly
def test_the_bound_counts_the_rows_of_all_copies_of_a_source(outvoted):
    once = run(outvoted, count_copies_once=True)
    rarest = min(share for column, share in once.report.mean(numeric_only=True).items() if column.startswith("P(a="))
    # Two of five may be manipulated: the one of seven copies, and another one, of eleven sources of one size.
    assert once.bound == pytest.approx(min(1, (8 / 11) / rarest))


@quietly
def test_a_vouched_copy_stands_for_the_others_and_several_are_all_kept(thrice):
    one = run(thrice, count_copies_once=True, always_keep=["A3"])
    assert one.copies == (("A3", "A", "A2"),)
    assert "A3" in one.kept
    assert not {"A", "A2"} & set(one.kept)
    two = run(thrice, count_copies_once=True, always_keep=["A3", "A"])
    assert {"A", "A3"} < set(two.kept)


@quietly
def test_a_copy_is_neither_kept_as_unsuspicious_nor_drawn(thrice):
    more = run(thrice, count_copies_once=True, keep_unsuspicious=True, permutations=8)
    assert set(more.kept) == set("ABCDE")
    weights = run(thrice, count_copies_once=True, mode="weights").weights
    names = given(thrice)["sources"]
    assert set(weights[np.isin(names, ["A2", "A3"])]) == {0}
    assert (weights[~np.isin(names, ["A2", "A3"])] > 0).all()


def test_more_clean_sources_than_differ_are_refused(thrice):
    with pytest.raises(ValueError, match=r"n_clean=6 is outside 1\.\.5"):
        run(thrice, count_copies_once=True, n_clean=6)


@quietly
def test_a_copy_that_comes_later_is_found(thrice):
    late = {"A3": thrice.pop("A3")}
    selector = FLEASelector(count_copies_once=True).fit(**given(thrice)).partial_fit(**given(late))
    assert selector.result_.copies == (("A", "A2", "A3"),)
    assert len(selector.result_.kept) == 3


@quietly
def test_copies_are_found_among_some_rows_of_large_sources(thrice):
    assert run(thrice, max_rows_per_source=100).copies == (("A", "A2", "A3"),)


def doubled(bad):
    copy = bad.source == "clinic 1"
    table = type(bad)(**{k: np.concatenate([v, v[copy]]) for k, v in vars(bad).items()})
    table.source = np.concatenate([bad.source, np.full(copy.sum(), "clinic 9")])
    return table


@quietly
@pytest.mark.parametrize("known", [False, True])
def test_the_callback_names_copies_on_its_page_and_counts_them_once(kit, bad, known):
    flea = FLEA(
        source="clinics" if known else None, max_rows_per_source=80, n_clean=3, count_copies_once=True, permutations=0
    )
    folder = kit.path / "report"
    _, module = fit(kit, Rows(doubled(bad)), Plugins([flea], report_dir=folder))
    assert flea.decision.copies == [["clinic 1", "clinic 9"]]
    assert module.seen == {"clinic 0", "clinic 2", "clinic 4"}
    assert "W8" in {f.code for f in Report.read(folder).findings}
    page = (folder / "report.html").read_text()
    assert "near copies of each other" in page
    assert "which counts for it" in page


@quietly
def test_weights_of_a_training_loader_are_zero_for_copies(kit, bad):
    flea = FLEA(mode="weights", n_clean=3, count_copies_once=True, permutations=0)
    data = doubled(bad)
    trainer, _ = fit(kit, Rows(data), flea)
    weights = trainer.train_dataloader.sampler.weights.numpy()
    assert set(weights[data.source == "clinic 9"]) == {0}
    assert (weights[data.source == "clinic 1"] > 0).all()
