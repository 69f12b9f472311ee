"""The parts that work without a Trainer: times, labels, streams, estimation without labels."""

from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwire import PluginError
from groundwire_limes import PriorExtrapolator, StreamDataModule
from groundwire_limes.class_counts import ClassCounts, Predictions
from groundwire_limes.expectation_maximization import LabelledScores, map_em
from groundwire_limes.functional import softmax
from groundwire_limes.labels import labels_of
from groundwire_limes.time_steps import period_seconds, season_steps, time_steps


def test_steps_are_in_utc_whatever_the_zone_and_before_1970_too():
    east = timezone(timedelta(hours=5, minutes=30))
    same = [datetime(2026, 3, 29, 12, tzinfo=UTC), datetime(2026, 3, 29, 17, 30, tzinfo=east)]
    assert len(set(time_steps(same, 3600).tolist())) == 1
    assert time_steps([-1, -3600, -3601], 3600).tolist() == [-1, -1, -2]
    assert time_steps(torch.tensor([7200]), 3600).tolist() == [2]


def test_naive_times_are_refused():
    for naive in (datetime(2026, 1, 1), [datetime(2026, 1, 1)], np.array(["2026-01-01"], "datetime64[s]")):
        with pytest.raises(ValueError, match="time zone"):
            time_steps(naive, 3600)


def test_periods_and_seasons():
    assert (period_seconds("2w"), period_seconds(timedelta(minutes=3)), period_seconds("1.5h")) == (1209600, 180, 5400)
    assert (season_steps("1w", 3600), season_steps("1d", 7 * 3600), season_steps("1h", 3600)) == (168, None, None)


def test_masked_soft_and_binary_labels():
    ones = torch.ones(3, dtype=torch.float64)
    masked = labels_of(torch.tensor([2, -1, 0]), 3, 3)
    assert masked.known.tolist() == [True, False, True]
    assert masked.counts(masked.known.double()).tolist() == [1, 0, 1]
    smooth = labels_of(torch.tensor([[0.9], [0.0], [1.0]]), 2, 3)
    assert smooth.counts(ones).tolist() == pytest.approx([1.1, 1.9])
    assert smooth.hard.tolist() == [1, 0, 1]
    with pytest.raises(PluginError, match="do not fit 4 predictions of 3 classes"):
        labels_of(torch.zeros(7), 3, 4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_class_indices_and_their_one_hot_shares_count_alike(seed):
    generator = torch.Generator().manual_seed(seed)
    hard = torch.randint(5, (7,), generator=generator)
    scores, weights = torch.randn(7, 5, generator=generator), torch.rand(7, generator=generator).double()
    offset = torch.randn(5, generator=generator)
    one, other = labels_of(hard, 5, 7), labels_of(torch.eye(5)[hard], 5, 7)
    assert torch.allclose(one.counts(weights), other.counts(weights))
    for labels in (one, other):
        hits = ((scores + offset).argmax(dim=1) == hard).double() @ weights
        loss = -((scores + offset).log_softmax(dim=1)[range(7), hard]).double() @ weights
        found = Predictions(scores, offset, labels, weights).quality()
        assert torch.allclose(found[[0, 1, 3]], torch.stack([weights.sum(), hits, loss]), atol=1e-5)


def test_batches_that_waited_together_are_judged_as_an_independent_loop_judges_each():
    generator = torch.Generator().manual_seed(0)
    tally, expected = ClassCounts(4), torch.zeros(4, 9, dtype=torch.float64)
    offsets = torch.randn(4, 4, generator=generator).log_softmax(dim=1)
    for batch in range(20):
        step = batch // 7
        scores, hard = torch.randn(6, 4, generator=generator), torch.randint(4, (6,), generator=generator)
        targets = [hard, torch.where(hard == 0, -1, hard), torch.eye(4)[hard]][batch % 3]
        labels = labels_of(targets, 4, 6, indices=batch % 3 == 0)
        tally.add(step, Predictions(scores, offsets[step], labels, labels.weights()))
        for row, label in zip(scores, hard.tolist(), strict=True):
            if batch % 3 != 1 or label != 0:
                moved = row + offsets[step]
                found = [moved.argmax() == label, row.argmax() == label]
                found += [-moved.log_softmax(0)[label], -row.log_softmax(0)[label]]
                expected[step, label] += 1
                expected[step, 4:] += torch.tensor([1.0, *map(float, found)])
    tally.gather(lambda own: [own])
    for step in range(3):
        assert torch.allclose(torch.from_numpy(tally.known[step]), expected[step], atol=1e-5)


def test_losses_of_scores_far_apart_are_those_of_a_cross_entropy():
    scores = torch.tensor([[0.0, 200.0], [300.0, 0.0], [-1e4, 1e4]])
    offset, labels = torch.tensor([0.999, 0.001]).log(), labels_of(torch.tensor([0, 1, 1]), 2, 3)
    for row in range(3):
        one = torch.tensor([row])
        found = Predictions(scores[one], offset, labels.rows(one), torch.ones(1, dtype=torch.float64)).quality()
        losses = [-(scores[row] + c).log_softmax(0)[labels.hard[row]].double() for c in (offset, 0)]
        assert torch.allclose(found[3:], torch.stack(losses))


def test_the_stream_sorts_by_time_and_never_mixes_steps():
    times = [7200, 0, 3600, 10, 3601]
    data = [(torch.tensor(float(i)), i % 2) for i in range(5)]
    stream = StreamDataModule(data, times, batch_size=3)
    batches = [(b[0].tolist(), b[2]["timestamp"].tolist()) for b in stream.train_dataloader()]
    assert batches == [([1.0, 3.0], [0, 10]), ([2.0, 4.0], [3600, 3601]), ([0.0], [7200])]
    loader = stream.train_dataloader()
    next(iter(loader))
    again = stream.train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert [b[0].tolist() for b in again] == [[2.0, 4.0], [0.0]]
    with pytest.raises(ValueError, match="2 timestamps for 5 rows"):
        StreamDataModule(data, [0, 1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), strength=st.sampled_from([0.0, 10.0, 1e6]))
def test_map_em_gives_a_distribution_between_forecast_and_batch(seed, strength):
    rng = np.random.default_rng(seed)
    center = rng.dirichlet(np.ones(4))
    prior = map_em(rng.standard_normal((50, 4)) * 3, center, strength)
    assert (prior > 0).all()
    assert prior.sum() == pytest.approx(1)
    if strength == 1e6:
        assert prior == pytest.approx(center, abs=1e-3)


def rows(rng, prior, size, temperature, noise=0.0):
    """Scores of a classifier that is calibrated up to a temperature, or says nothing."""
    labels = rng.choice(len(prior), size, p=prior)
    scores = rng.standard_normal((size, len(prior)))
    scores[np.arange(size), labels] += 2.0
    return temperature * (2.0 * scores if noise == 0 else noise * rng.standard_normal(scores.shape)), labels


@pytest.mark.parametrize(("noise", "tells"), [(0.0, True), (8.0, False)])
def test_the_gate_lets_scores_that_tell_the_mix_move_the_prior_and_others_not(noise, tells):
    rng = np.random.default_rng(0)
    memory, extrapolator = LabelledScores(), PriorExtrapolator(3)
    for step in range(24):
        prior = rng.dirichlet(np.ones(3))  # nothing foretells it, only the batch itself
        scores, labels = rows(rng, prior, 256, temperature=3.0, noise=noise)
        memory.add(step, scores, labels)
        extrapolator.update(step, np.bincount(labels, minlength=3))
    gate = memory.gate(extrapolator, 1)
    truth = np.array([0.9, 0.05, 0.05])
    scores, _ = rows(rng, truth, 500, temperature=3.0, noise=noise)
    center = extrapolator.forecast(24)
    adapted = gate.prior(scores, center)
    if tells:
        assert gate.is_open
        assert np.abs(adapted - truth).sum() < 0.5 * np.abs(center - truth).sum()
    else:
        assert np.abs(adapted - center).sum() < 0.2


def test_the_gate_is_shut_while_few_labelled_steps_are_known_and_its_memory_comes_back():
    rng = np.random.default_rng(1)
    memory, extrapolator = LabelledScores(), PriorExtrapolator(3)
    assert memory.gate(extrapolator, 1) is None
    for step in range(12):
        if step == 7:
            assert memory.gate(extrapolator, 1) is None
        scores, labels = rows(rng, np.ones(3) / 3, 64, 1.0)
        memory.add(step, scores, labels)
        extrapolator.update(step, np.bincount(labels, minlength=3))
    twin = LabelledScores()
    twin.load_state_dict(memory.state_dict())
    one, other = memory.gate(extrapolator, 2), twin.gate(extrapolator, 2)
    assert (one.gain, one.strength, one.calibration.temperature) == (
        other.gain,
        other.strength,
        other.calibration.temperature,
    )
    memory.add(12, *rows(rng, np.ones(3) / 3, 64, 1.0))
    twin.load_state_dict(memory.state_dict())
    assert memory.gate(extrapolator, 2).gain == twin.gate(extrapolator, 2).gain != one.gain


def test_softmax_is_stable():
    assert np.isfinite(softmax(np.array([1e4, 0.0]))).all()


def test_many_classes_keep_few_states_and_forecast_the_same():
    rng = np.random.default_rng(0)
    one, other = PriorExtrapolator(30_000, period=24), PriorExtrapolator(30_000, period=24)
    rows = rng.multinomial(1000, np.full(30_000, 1 / 30_000), 16)
    for step, counts in enumerate(rows):
        one.update(step, counts)
        one.forecast(step + 1)
    for step in reversed(range(16)):
        other.update(step, rows[step])
    held = sum(state.filter.cov.nbytes for state in one._states._by_rows.values())
    assert held <= 8 * 2**24
    assert np.array_equal(one.forecast(3), other.forecast(3))
    assert np.array_equal(one.forecast(16), other.forecast(16))
