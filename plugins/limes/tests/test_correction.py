"""What corrects the scores, batch by batch."""

import numpy as np
import pytest
import torch
from limes_digit_stream import HOUR, Digits, Listed, data_of, fit, labels_by_hour, module_of, stream
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire import PluginError
from groundwire_limes import LIMES, PriorExtrapolator, StreamDataModule
from groundwire_limes.functional import log_offset


def test_the_published_preset_corrects_every_batch_by_the_published_forecast(kit):
    _, _, spy = fit(kit, LIMES(preset="icpr2022"))
    rows, expected = [], []
    for counts in labels_by_hour(module_of()).values():
        prior = np.full(10, 0.1)
        if len(rows) >= 2:
            distances = [np.abs(rows[-1] - row).sum() for row in rows[:-1]]
            prior = rows[int(np.argmin(distances)) + 1]
        expected += [np.log(prior) + np.log(10)] * 2
        rows.append((counts + 1) / (counts + 1).sum())
    assert len(spy.offsets) == len(expected)
    for offset, wanted in zip(spy.offsets, expected, strict=True):
        assert offset.numpy() == pytest.approx(wanted, abs=1e-6)


def test_the_published_preset_trains_as_a_loop_without_lightning(kit):
    datamodule = module_of()
    _, module, _ = fit(kit, LIMES(preset="icpr2022"), datamodule)
    twin = Digits()
    optimizer = torch.optim.Adam(twin.parameters(), 2e-3)
    history = PriorExtrapolator(10, method="nearest")
    for x, y, meta in datamodule.train_dataloader():
        hour = int(meta["timestamp"][0]) // HOUR
        offset = torch.tensor(log_offset(history.forecast(hour)), dtype=torch.float32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(x) + offset, y).backward()
        optimizer.step()
        history.update(hour, np.bincount(y.numpy(), minlength=10))
    assert kit.difference(twin.state_dict(), module.state_dict()) < 1e-6


def test_running_uses_the_labels_of_the_step_before_this_batch_only(kit):
    datamodule = module_of()
    _, _, spy = fit(kit, LIMES(season=None), datamodule)
    history, seen, at = PriorExtrapolator(10), np.zeros(10), 0
    for (_, y, meta), offset in zip(datamodule.train_dataloader(), spy.offsets, strict=True):
        hour = int(meta["timestamp"][0]) // HOUR
        if hour != at:
            history.update(at, seen)
            seen, at = np.zeros(10), hour
        mixed = (100 * history.forecast(hour) + seen) / (100 + seen.sum())
        assert offset.numpy() == pytest.approx(log_offset(mixed), abs=1e-5)
        seen = seen + np.bincount(y.numpy(), minlength=10)


def test_realised_takes_all_labels_of_the_step_from_the_datamodule(kit):
    datamodule = module_of()
    _, _, spy = fit(kit, LIMES(training_prior="realised"), datamodule)
    counts = labels_by_hour(datamodule)[11]
    assert spy.offsets[-1].numpy() == pytest.approx(log_offset((counts + 0.1) / (counts.sum() + 1)), abs=1e-5)
    with pytest.raises(PluginError, match="no step_counts"):
        kit.trainer(LIMES(training_prior="realised")).fit(Digits(), datamodule.train_dataloader())


def test_counts_are_those_of_training_batches_only(kit):
    limes, datamodule = LIMES(), module_of()
    data, times = stream(4, seed=5)
    val = StreamDataModule(data, times + 13 * HOUR, batch_size=20).train_dataloader()
    trainer = kit.trainer(limes, val_check_interval=3)
    trainer.fit(Digits(), datamodule.train_dataloader(), val)
    state = limes.extrapolator.state_dict()
    assert {s: list(c) for s, c in zip(state["steps"], state["counts"], strict=True)} == {
        hour: counts.tolist() for hour, counts in labels_by_hour(datamodule).items()
    }


def test_validation_and_prediction_are_corrected_by_the_forecast_for_their_time(kit, fitted):
    limes, module = fitted.limes, fitted.module
    plain = kit.trainer().predict(module, module_of().train_dataloader())
    later = [(x, y, {"timestamp": meta["timestamp"] + 15 * HOUR}) for x, y, meta in module_of().train_dataloader()]
    shifted = kit.trainer(limes).predict(module, Listed(later))
    for one, other, batch in zip(plain, shifted, later, strict=True):
        forecast = limes.prior(batch[2]["timestamp"][0].item())
        assert (other - one).numpy() == pytest.approx(
            np.tile(log_offset(forecast).astype(np.float32), (len(one), 1)), abs=1e-5
        )
    assert not np.allclose(limes.prior(20 * HOUR), limes.prior(22 * HOUR))


def test_a_batch_without_time_is_predicted_for_the_step_after_the_last(kit, fitted):
    limes, module = fitted.limes, fitted.module
    data, _ = stream()
    [plain] = kit.trainer().predict(module, DataLoader(data, len(data)))
    [shifted] = kit.trainer(limes).predict(module, DataLoader(data, len(data)))
    assert (shifted - plain)[0].numpy() == pytest.approx(log_offset(limes.prior(12 * HOUR)), abs=1e-5)


def test_a_mixed_batch_has_an_offset_for_each_row_and_counts_each_row_in_its_own_step(kit):
    data, times = stream(12)
    rows = [(x, y, {"timestamp": float(t)}) for (x, y), t in zip(data, times, strict=True)]
    limes = LIMES(training_prior="forecast", method="seasonal", season="4h")
    _, _, spy = fit(kit, limes, data_of(DataLoader(rows, 30)))
    mixed = [o for o in spy.offsets if o.dim() == 2]
    assert mixed
    assert all(o.shape == (30, 10) for o in mixed)
    state = limes.extrapolator.state_dict()
    assert [sum(c) for c in state["counts"]] == [40.0] * 12
    index = next(i for i, o in enumerate(spy.offsets) if o.dim() == 2 and i > 8)
    hours = times[30 * index : 30 * index + 30] // HOUR
    first, second = spy.offsets[index][0], spy.offsets[index][-1]
    assert hours[0] != hours[-1]
    assert not torch.equal(first, second)


def test_the_model_gets_better_than_without_correction_on_a_moving_mix(kit):
    class Fast(Digits):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 2e-2)

    accuracies = []
    for limes in (LIMES(season="4h"), LIMES(season="4h", method="long_run", training_prior="forecast")):
        fit(kit, limes, module_of(60, rows=100), Fast())
        by_step = [limes._tracker.class_counts.quality(s)["accuracy"] for s in range(20, 60)]
        accuracies.append(np.mean(by_step))
    assert accuracies[0] > accuracies[1] + 0.02


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_offset_is_exact_to_float32_in_other_precisions(kit, precision):
    limes = LIMES(preset="icpr2022")
    if precision == "bf16-true":
        data, times = stream()
        low = TensorDataset(data.tensors[0].bfloat16(), data.tensors[1])
        datamodule = StreamDataModule(low, times, batch_size=20)
    else:
        datamodule = module_of()
    _, module, spy = fit(kit, limes, datamodule, precision=precision)
    assert spy.offsets[-1].dtype == torch.float32
    assert spy.offsets[-1].numpy() == pytest.approx(log_offset(limes.extrapolator.forecast(11)), abs=1e-6)
    assert all(torch.isfinite(p).all() for p in module.parameters())
