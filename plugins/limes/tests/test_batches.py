"""Times, labels and weights of batches, good and bad."""

from datetime import datetime

import numpy as np
import pytest
import torch
from limes_digit_stream import HOUR, Digits, Listed, across_hours, labels_by_hour, module_of, rows_at
from torch import nn

from groundwire import PluginError
from groundwire_limes import LIMES, PriorExtrapolator
from groundwire_limes.functional import kl_divergence
from groundwire_limes.labels import check_class_indices


@pytest.mark.parametrize(
    ("times", "options", "text"),
    [
        ([datetime(2026, 1, 1)], {}, "has no time zone"),
        ([float("nan")], {}, "a timestamp is nan"),
        ([1.7e12], {}, "looks like milliseconds"),
        ([torch.tensor(1.7e9, dtype=torch.float32)], {}, "cannot hold Unix seconds"),
        (["2026-01-01"], {}, "must be numbers"),
        ([[0.0, 1.0]], {}, "2 timestamps for a batch of 4 rows"),
        ([0.0, 9999.0, 0.0], {}, "time goes backwards, from step 2 to 0"),
        ([0.0, 99999.0, 80000.0], {"lateness": 1}, "time goes backwards, from step 27 to 22"),
        ([0.0], {"time": "when"}, "no 'when' in a training batch"),
        ([[]], {}, "a batch has no rows"),
        ([0.0], {"weights": "w"}, "no weights 'w'"),
        ([0.0], {"weights": lambda _: [1.0, 2.0]}, "2 weights for a batch of 4 rows"),
    ],
)
def test_bad_times_are_refused_with_the_reason(kit, times, options, text):
    with pytest.raises(PluginError, match=text):
        kit.trainer(LIMES(**options)).fit(Digits(), Listed(rows_at(times)))


def test_a_label_that_the_head_does_not_have_is_named_before_the_loss_sees_it(kit):
    with pytest.raises(PluginError, match="label 12 is in a training batch, and the head has 10 classes"):
        kit.trainer(LIMES()).fit(Digits(), Listed(rows_at([0.0], [12])))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_label_that_the_head_does_not_have_is_named_whatever_its_dtype(dtype):
    with pytest.raises(PluginError, match="label 2 is in a training batch, and the head has 2 classes"):
        check_class_indices(torch.tensor([0, 2, 1]).to(dtype), 2)


def test_targets_of_a_regression_are_called_that():
    with pytest.raises(PluginError, match="have fractions"):
        check_class_indices(torch.tensor([0.5, 3.2]), 2)


def test_a_missing_binary_label_that_is_nan_is_masked(kit):
    class Binary(Digits):
        def training_step(self, batch, batch_idx):
            known = ~batch[1].isnan()
            scores = self(batch[0]).squeeze(1)
            return nn.functional.binary_cross_entropy_with_logits(scores[known], batch[1][known])

    labels, limes = torch.tensor([1.0, float("nan"), 0.0, 1.0]), LIMES()
    batches = [(torch.zeros(4, 64), labels, {"timestamp": HOUR * h}) for h in (0.0, 1.0)]
    kit.trainer(limes).fit(Binary(1), Listed(batches))
    assert limes.extrapolator.state_dict()["counts"] == [[1.0, 2.0], [1.0, 2.0]]
    assert limes._tracker.class_counts.quality(0)["labels"] == 3


def test_labels_that_are_not_found_are_said(kit):
    class Named(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["kind"]), batch_idx)

    batch = {"image": torch.zeros(4, 64), "kind": torch.zeros(4, dtype=torch.long), "timestamp": 0.0}
    with pytest.warns(UserWarning, match="no labels are found in a training batch"):
        kit.trainer(LIMES()).fit(Named(), Listed([batch]))


def test_several_labels_for_each_row_are_refused(kit):
    class Multi(Digits):
        def training_step(self, batch, batch_idx):
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    batch = (torch.zeros(4, 64), torch.ones(4, 10), {"timestamp": 0.0})
    with pytest.raises(PluginError, match="several independent labels"):
        kit.trainer(LIMES()).fit(Multi(), Listed([batch]))


def test_soft_labels_count_by_their_shares(kit):
    shares = torch.full((4, 10), 0.05)
    shares[:, 3] = 0.55
    limes = LIMES()
    kit.trainer(limes).fit(Digits(), Listed([(torch.zeros(4, 64), shares, {"timestamp": 0.0})]))
    assert limes.extrapolator.state_dict()["counts"][0] == pytest.approx((4 * shares[0]).tolist())


def test_a_loader_may_use_the_same_tensors_for_every_batch(kit):
    """Quality waits for several batches, so what it is computed of has to be kept."""

    class Reusing(Listed):
        def __iter__(self):
            shared = [torch.empty_like(part) for part in self.batches[0][:2]]
            for x, y, meta in self.batches:
                shared[0].copy_(x), shared[1].copy_(y)
                yield (*shared, meta)

    labels = torch.eye(10)[torch.randint(10, (8, 4))]
    batches = [(torch.randn(4, 64), shares, {"timestamp": 0.0}) for shares in labels]
    found = []
    for loader in (Listed(batches), Reusing(batches)):
        limes = LIMES()
        kit.trainer(limes).fit(Digits(), loader)
        found.append(limes._tracker.class_counts.quality(0))
    assert found[0] == found[1]


@pytest.mark.parametrize("view", [lambda y: y, lambda y: y.numpy(), lambda y: y.data])
def test_labels_that_the_training_step_edits_are_counted_as_it_left_them(kit, view):
    class Relabelling(Digits):
        def training_step(self, batch, batch_idx):
            view(batch[1])[:3] = 7
            view(batch[1])[3:] = -100
            return super().training_step(batch, batch_idx)

    limes = LIMES()
    kit.trainer(limes).fit(Relabelling(), Listed(rows_at([0.0], [3])))
    assert limes.extrapolator.state_dict()["counts"][0] == [0.0] * 7 + [3.0, 0.0, 0.0]
    assert limes._tracker.class_counts.quality(0)["labels"] == 3


def test_weighted_rows_count_by_their_weights(kit):
    batch = (
        torch.zeros(4, 64),
        torch.tensor([1, 1, 2, 2]),
        {"timestamp": 0.0, "w": torch.tensor([1.0, 2.0, 0.0, 0.5])},
    )
    limes = LIMES(weights="w")
    kit.trainer(limes).fit(Digits(), Listed([batch]))
    assert limes.extrapolator.state_dict()["counts"][0][:3] == [0.0, 3.0, 0.5]


def test_late_rows_within_the_lateness_revise_the_history(kit):
    limes = LIMES(lateness=2)
    kit.trainer(limes).fit(Digits(), Listed(rows_at([0.0, 2.5 * HOUR, 0.5 * HOUR], [1, 2, 3])))
    counts = dict(zip(*(limes.extrapolator.state_dict()[k] for k in ("steps", "counts")), strict=True))
    assert counts[0][1] == counts[0][3] == 4


def test_a_replay_trains_without_counting(kit):
    limes = LIMES(on_backward="replay")
    datamodule = module_of()
    kit.trainer(limes, max_epochs=2).fit(Digits(), datamodule=datamodule)
    counts = np.sum(limes.extrapolator.state_dict()["counts"], axis=0)
    assert np.array_equal(counts, sum(labels_by_hour(datamodule).values()))
    with pytest.raises(PluginError, match="max_epochs=1 stops there"):
        kit.trainer(LIMES(), max_epochs=2).fit(Digits(), datamodule=datamodule)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_hours_without_batches_are_missing_and_empty_ones_harmless(kit):
    limes = LIMES()
    masked = (torch.zeros(4, 64), torch.full((4,), -100), {"timestamp": 2.0 * HOUR})

    class Module(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if (batch[1] >= 0).any() else None

    kit.trainer(limes).fit(Module(), Listed([*rows_at([0.0, 1.0 * HOUR]), masked, *rows_at([7.0 * HOUR, 8.0 * HOUR])]))
    assert limes.extrapolator.state_dict()["steps"] == [0, 1, 7, 8]
    assert np.isfinite(limes.prior()).all()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_label_is_missing_for_the_published_rule_too(kit):
    class Module(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if (batch[1] >= 0).any() else None

    limes = LIMES(method="nearest")
    kit.trainer(limes).fit(Module(), Listed(rows_at([0.0, HOUR, 2.0 * HOUR, 3.0 * HOUR], [1, 2, -100, 1])))
    assert limes.extrapolator.state_dict()["steps"] == [0, 1, 3]


def test_a_forecast_is_judged_by_what_was_known_when_its_step_began_also_where_batches_span_two(kit):
    limes = LIMES(season="4h")
    kit.trainer(limes).fit(Digits(), datamodule=across_hours(module_of()))
    twin, counts = PriorExtrapolator(10, period=4), labels_by_hour(module_of())
    for closed in limes._tracker.finished:
        realised = counts[closed.step] / counts[closed.step].sum()
        assert closed.divergence == kl_divergence(realised, twin.forecast(closed.step))
        twin.update(closed.step, counts[closed.step])
    assert [closed.step for closed in limes._tracker.finished] == list(range(11))


def test_a_step_to_which_late_rows_come_is_judged_once(kit):
    limes = LIMES(lateness=2)
    kit.trainer(limes).fit(Digits(), Listed(rows_at([HOUR * h for h in (0, 1, 2, 1, 3, 4)])))
    assert [closed.step for closed in limes._tracker.finished] == [0, 1, 2, 3]
