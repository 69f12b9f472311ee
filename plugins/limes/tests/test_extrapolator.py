"""Forecasting class priors without torch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import groundwire_limes
from groundwire_limes import PriorExtrapolator
from groundwire_limes.extrapolator import METHODS
from groundwire_limes.functional import kl_divergence, log_odds

CLASSES = 4
COUNTS = st.lists(st.integers(0, 6), min_size=CLASSES, max_size=CLASSES)
STREAMS = st.lists(COUNTS, min_size=0, max_size=14)


def made(method="auto", **options):
    return PriorExtrapolator(CLASSES, method=method, period=5, **options)


def fed(rows, method="auto", **options):
    extrapolator = made(method, **options)
    for step, counts in enumerate(rows):
        extrapolator.update(step, counts)
    return extrapolator


def published(history, classes, ahead=1):
    """The published rule, written from its description with plain loops."""
    if len(history) < 2:
        return np.full(classes, 1 / classes)
    rows = []
    for counts in history:
        row = np.ones(classes)
        row += counts
        row /= row.sum()
        rows.append(row)
    if len(rows) <= ahead:
        return rows[-1]
    best, winner = float("inf"), None
    for i in range(len(rows) - ahead):
        distance = np.abs(rows[-1] - rows[i]).sum()
        if distance < best:
            best, winner = distance, i
    return rows[winner + ahead]


def test_importing_the_extrapolator_imports_neither_torch_nor_lightning():
    code = (
        "import sys; from groundwire_limes import PriorExtrapolator; PriorExtrapolator(3).forecast(0); "
        "print([m for m in ('torch', 'lightning', 'groundwire') if m in sys.modules])"
    )
    path = str(Path(groundwire_limes.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert done.stdout.strip() == "[]", done.stderr


@given(STREAMS, st.integers(0, 3))
def test_nearest_is_the_published_rule_bit_for_bit(rows, later):
    extrapolator = PriorExtrapolator(CLASSES, method="nearest")
    for step, counts in enumerate(rows):
        assert np.array_equal(extrapolator.forecast(step), published(rows[:step], CLASSES))
        extrapolator.update(step, counts)
    forecast = extrapolator.forecast(len(rows) + later)
    assert np.array_equal(forecast, published(rows, CLASSES, later + 1))


def test_nearest_takes_the_oldest_of_equally_near_rows():
    rows = [[9, 0, 0, 0], [0, 9, 0, 0], [9, 0, 0, 0], [0, 0, 9, 0], [9, 0, 0, 0]]
    assert fed(rows, "nearest").forecast(5).argmax() == 1


def test_the_third_step_is_persistence_by_the_published_rule():
    rows = [[5, 0, 0, 0], [0, 5, 0, 0]]
    assert np.array_equal(made("nearest").forecast(0), np.full(CLASSES, 0.25))
    assert np.array_equal(fed(rows[:1], "nearest").forecast(1), np.full(CLASSES, 0.25))
    assert np.array_equal(fed(rows, "nearest").forecast(2), np.array([1, 6, 1, 1]) / 9)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(rows=STREAMS, later=st.integers(0, 30))
def test_every_forecast_is_a_positive_distribution(method, rows, later):
    prior = fed(rows, method).forecast(len(rows) + later)
    assert prior.dtype == np.float64
    assert prior.shape == (CLASSES,)
    assert (prior > 0).all()
    assert prior.sum() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None)
@given(rows=STREAMS, order=st.permutations(range(CLASSES)))
def test_renaming_the_classes_renames_the_forecast(method, rows, order):
    plain = fed(rows, method).forecast(len(rows))
    renamed = fed([[row[k] for k in order] for row in rows], method).forecast(len(rows))
    assert renamed == pytest.approx(plain[list(order)], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None)
@given(rows=STREAMS.filter(len), data=st.data())
def test_late_labels_revise_history_as_if_they_had_been_in_time(method, rows, data):
    late = made(method)
    for step in data.draw(st.permutations(range(len(rows)))):
        late.update(step, [2 * (c // 2) for c in rows[step]])
        late.forecast(len(rows))
    for step, counts in enumerate(rows):
        late.update(step, [c % 2 for c in counts])
    in_time = fed(rows, method)
    for step in (len(rows), len(rows) + 5):  # the second is a season later, which has a track of its own
        assert np.array_equal(late.forecast(step), in_time.forecast(step))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None)
@given(rows=STREAMS, cut=st.integers(0, 14), ahead=st.integers(1, 6))
def test_the_state_goes_through_json_and_continues_bit_for_bit(method, rows, cut, ahead):
    whole, first = made(method), made(method)
    for step, counts in enumerate(rows[:cut]):
        first.update(step, counts)
        first.forecast(step + ahead)
    second = made(method)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step, counts in enumerate(rows):
        whole.update(step, counts)
        if step >= cut:
            second.update(step, counts)
    assert np.array_equal(whole.forecast(len(rows) + ahead), second.forecast(len(rows) + ahead))


def test_a_second_update_of_a_step_adds():
    once, twice = made(), made()
    once.update(0, [3, 1, 0, 0])
    twice.update(0, [1, 1, 0, 0])
    twice.update(0, [2, 0, 0, 0])
    assert np.array_equal(once.forecast(1), twice.forecast(1))


def test_a_forecast_uses_earlier_steps_only():
    rows = [[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0]]
    assert np.array_equal(fed(rows).forecast(2), fed(rows[:2]).forecast(2))


def test_missing_steps_are_left_out_of_the_rule_and_not_uniform():
    rows = {0: [9, 0, 0, 0], 1: [0, 9, 0, 0], 4: [0, 0, 9, 0], 5: [9, 0, 0, 0]}
    extrapolator = PriorExtrapolator(CLASSES, method="nearest")
    for step, counts in rows.items():
        extrapolator.update(step, counts)
    assert extrapolator.observed == 4
    assert np.array_equal(extrapolator.forecast(6), published(list(rows.values()), CLASSES))


def test_steps_that_are_ten_apart_are_one_step_apart_for_the_rules():
    rows = [[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0], [9, 0, 0, 0]]
    apart = PriorExtrapolator(CLASSES, method="nearest")
    for step, counts in enumerate(rows):
        apart.update(10 * step, counts)
    assert np.array_equal(apart.forecast(40), published(rows, CLASSES))


def stream(kind, seed, steps=200, classes=8, size=500):
    rng = np.random.default_rng(seed)
    hours = np.arange(steps)[:, None]
    random = rng.dirichlet(np.ones(classes), steps) + 1e-6
    season = np.exp(1.5 * np.cos(2 * np.pi * hours / 24 + rng.uniform(0, 6.3, classes)))
    truth = random if kind == "random" else season
    truth = truth / truth.sum(axis=1, keepdims=True)
    return truth, np.stack([rng.multinomial(size, p) for p in truth])


def mean_divergence(truth, counts, **options):
    extrapolator = PriorExtrapolator(truth.shape[1], **options)
    found = []
    for step, (prior, row) in enumerate(zip(truth, counts, strict=True)):
        if step >= 2:
            found.append(kl_divergence(prior, extrapolator.forecast(step)))
        extrapolator.update(step, row)
    return float(np.mean(found))


@pytest.mark.parametrize("period", [24, None])
@pytest.mark.parametrize("seed", range(2))
def test_auto_is_no_worse_than_nearest_on_seasons_and_than_the_long_run_on_random_priors(period, seed):
    truth, counts = stream("season", seed)
    auto = mean_divergence(truth, counts, period=period)
    assert auto <= mean_divergence(truth, counts, method="nearest")
    truth, counts = stream("random", seed)
    auto = mean_divergence(truth, counts, period=period)
    assert auto <= 1.15 * mean_divergence(truth, counts, method="long_run")


def test_the_guard_holds_the_long_run_prior_on_random_priors_and_says_so():
    random, season = PriorExtrapolator(8), PriorExtrapolator(8, period=24)
    for step, (one, other) in enumerate(zip(stream("random", 0)[1], stream("season", 0)[1], strict=True)):
        random.update(step, one)
        season.update(step, other)
    assert random.explain(200).guarded
    assert not season.explain(200).guarded
    assert sum(season.explain(200).weights.values()) == pytest.approx(1)


def test_without_a_period_the_seasonal_expert_sits_out():
    extrapolator = PriorExtrapolator(2)
    extrapolator.update(0, [1, 1])
    assert "seasonal" not in extrapolator.explain(1).weights


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.lists(st.sampled_from([0, 1, 1000]), min_size=3, max_size=3), min_size=1, max_size=12))
def test_auto_never_moves_further_than_the_largest_move(rows):
    extrapolator = PriorExtrapolator(3, max_move=0.5)
    before = np.full(3, 1 / 3)
    for step, counts in enumerate([c for c in rows if any(c)]):
        extrapolator.update(step, counts)
        after = extrapolator.forecast(step + 1)
        assert np.abs(log_odds(after) - log_odds(before)).max() <= 0.5 + 1e-9
        before = after


def test_a_flood_of_one_class_moves_the_forecast_by_the_limit_only():
    calm, flooded = (fed([[50, 50, 50, 50]] * 30, max_move=m) for m in (1.0, float("inf")))
    for extrapolator in (calm, flooded):
        extrapolator.update(30, [10**6, 0, 0, 0])
    moves = [np.abs(log_odds(e.forecast(31)) - log_odds(np.full(4, 0.25))).max() for e in (calm, flooded)]
    assert moves[0] <= 1.0 + 1e-6 < moves[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_was_never_seen_keeps_a_positive_prior_and_gains_one_when_it_comes(method):
    extrapolator = fed([[50, 50, 0, 0]] * 10, method)
    before = extrapolator.forecast(10)[3]
    for step in range(10, 20):
        extrapolator.update(step, [25, 25, 0, 50])
    assert 0 < before < 0.1 < extrapolator.forecast(20)[3]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_labels_never_makes_nan(method):
    extrapolator = fed([[0, 0, 0, 0], [3, 0, 0, 0], [0, 0, 0, 0]], method)
    assert np.isfinite(extrapolator.forecast(3)).all()
    assert extrapolator.observed == (3 if method == "nearest" else 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_classes": 1}, "num_classes must be a whole number of at least 2, got 1"),
        ({"num_classes": 2.5}, "num_classes must be a whole number"),
        ({"method": "magic"}, "method must be one of auto, nearest"),
        ({"period": 1}, "period must be a whole number of at least 2"),
        ({"method": "seasonal"}, "needs period="),
        ({"smoothing": 0}, "smoothing must be a positive number"),
        ({"smoothing": float("nan")}, "smoothing must be a positive number"),
        ({"max_move": -1}, "max_move must be a positive number"),
        ({"max_move": 1, "method": "nearest"}, "max_move acts in method='auto' only"),
    ],
)
def test_bad_arguments_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        PriorExtrapolator(**{"num_classes": 3, **options})


@pytest.mark.parametrize(
    ("step", "counts", "text"),
    [
        (0, [1, 2, 3], r"shape \(4,\), one per class, got \(3,\)"),
        (0, [1, 2, -3, 0], "count of class 2 is -3"),
        (0, [1, float("nan"), 3, 0], "count of class 1 is nan"),
        (0, [1, 2, 3, float("inf")], "count of class 3 is inf"),
        (0.5, [1, 2, 3, 4], "step must be a whole number, got 0.5"),
    ],
)
def test_bad_counts_are_refused_and_nothing_is_lost(step, counts, text):
    extrapolator = fed([[1, 2, 3, 4]])
    before = extrapolator.forecast(1)
    with pytest.raises((ValueError, TypeError), match=text):
        extrapolator.update(step, counts)
    assert np.array_equal(extrapolator.forecast(1), before)


def test_a_state_of_other_arguments_is_refused_with_the_differences():
    state = PriorExtrapolator(3, period=24).state_dict()
    with pytest.raises(ValueError, match=r"num_classes is 3 there and 4 here; period is 24 there and 5 here"):
        made().load_state_dict(state)
    with pytest.raises(ValueError, match="it lacks num_classes"):
        made().load_state_dict({})
