"""Forecasts of class priors whose labels come late."""

import numpy as np
import pytest

from groundwire_limes import PriorExtrapolator
from groundwire_limes.functional import kl_divergence


def test_labels_that_are_a_day_late_are_answered_with_the_hour_not_with_yesterday():
    day = np.eye(4)[np.arange(24) // 6] * 90 + 10
    extrapolator = PriorExtrapolator(4, period=24)
    hits = 0
    for hour in range(240):
        if hour >= 12:
            extrapolator.update(hour - 12, day[(hour - 12) % 24])
        if hour >= 120:
            forecast = extrapolator.explain(hour)
            hits += forecast.prior.argmax() == day[hour % 24].argmax()
    assert forecast.ahead == 12
    assert hits == 120
    assert forecast.weights["persistence"] < 0.05


@pytest.mark.parametrize("seed", range(6))
def test_a_day_late_the_forecast_recovers_from_a_change_as_soon_as_labels_tell_of_it(seed):
    truth, counts = changed_stream(seed)
    auto, long_run = (
        day_late(truth, counts, PriorExtrapolator(8, method=method, period=24)) for method in ("auto", "long_run")
    )
    told = slice(120 + 24 + 3, 120 + 48)  # labels from after the change came, forecasts made with them were not judged
    assert auto[told].mean() < 0.5 * long_run[told].mean()


def changed_stream(seed):
    """In hour 120 the day moves by eight hours and the classes get other base rates."""
    rng, hours = np.random.default_rng(seed), np.arange(240)[:, None]
    base = np.where(hours < 120, rng.normal(size=8), rng.normal(size=8))
    shift = np.where(hours < 120, 0, 8)
    truth = np.exp(base + 1.2 * np.cos(2 * np.pi * (hours + shift) / 24 + rng.uniform(0, 6.3, 8)))
    truth /= truth.sum(axis=1, keepdims=True)
    return truth, np.stack([rng.multinomial(1000, p) for p in truth])


def day_late(truth, counts, extrapolator):
    """Divergence by hour of forecasts whose labels come 24 hours late."""
    found = []
    for hour, prior in enumerate(truth):
        found.append(kl_divergence(prior, extrapolator.forecast(hour)))
        if hour >= 24:
            extrapolator.update(hour - 24, counts[hour - 24])
    return np.array(found)
