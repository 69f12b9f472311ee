"""LIMES inside a Trainer."""

import json
import math
from datetime import UTC, datetime

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import groundwire
from groundwire import Plugin, PluginError, Plugins, Report, hookimpl
from groundwire_limes import LIMES, PriorExtrapolator, StreamDataModule
from groundwire_limes.functional import log_offset

HOUR = 3600


def stream(hours=12, rows=40, classes=10, seed=0):
    """Digits whose mix has a period of four hours; rows in the order of time."""
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    keep = y < classes
    x, y = x[keep] / 16, y[keep]
    picked, times = [], []
    for hour in range(hours):
        prior = np.exp(1.5 * np.cos(np.pi * hour / 2 + np.arange(classes)))
        for k in rng.choice(classes, rows, p=prior / prior.sum()):
            picked.append(rng.choice(np.flatnonzero(y == k)))
            times.append(hour * HOUR + 10 * len(picked) % HOUR)
    times = np.sort(np.asarray(times) // HOUR * HOUR + np.arange(len(times)) % 100)
    data = TensorDataset(torch.tensor(x[picked], dtype=torch.float32), torch.tensor(y[picked]))
    return data, times


def module_of(hours=12, batch_size=20, **options):
    data, times = stream(hours, **options)
    return StreamDataModule(data, times, batch_size=batch_size)


class Digits(pl.LightningModule):
    def __init__(self, classes=10):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen = self(batch[0])

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)


class Spy(pl.Callback):
    """What corrects each training batch."""

    def __init__(self):
        self.offsets = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        layer = pl_module.get_submodule("net.2")
        rows = layer.gw_offset_rows
        self.offsets.append((layer.gw_offset if rows is None else rows).detach().clone())


def fit(kit, limes, datamodule=None, module=None, **options):
    module, spy = module or Digits(), Spy()
    trainer = kit.trainer(limes, spy, **options)
    trainer.fit(module, datamodule=datamodule or module_of())
    return trainer, module, spy


def labels_by_hour(datamodule):
    found = {}
    for batch in datamodule.train_dataloader():
        hour = int(batch[2]["timestamp"][0]) // HOUR
        found[hour] = found.get(hour, 0) + np.bincount(batch[1].numpy(), minlength=10)
    return found


# The algorithm


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


def test_validation_and_prediction_are_corrected_by_the_forecast_for_their_time(kit):
    limes = LIMES()
    _, module, _ = fit(kit, limes)
    plain = kit.trainer().predict(module, module_of().train_dataloader())
    later = [(x, y, {"timestamp": meta["timestamp"] + 15 * HOUR}) for x, y, meta in module_of().train_dataloader()]
    shifted = kit.trainer(limes).predict(module, Listed(later))
    for one, other, batch in zip(plain, shifted, later, strict=True):
        forecast = limes.prior(batch[2]["timestamp"][0].item())
        assert (other - one).numpy() == pytest.approx(
            np.tile(log_offset(forecast).astype(np.float32), (len(one), 1)), abs=1e-5
        )
    assert not np.allclose(limes.prior(20 * HOUR), limes.prior(22 * HOUR))


def test_a_batch_without_time_is_predicted_for_the_step_after_the_last(kit):
    limes = LIMES()
    _, module, _ = fit(kit, limes)
    data, _ = stream()
    [plain] = kit.trainer().predict(module, DataLoader(data, len(data)))
    [shifted] = kit.trainer(limes).predict(module, DataLoader(data, len(data)))
    assert (shifted - plain)[0].numpy() == pytest.approx(log_offset(limes.prior(12 * HOUR)), abs=1e-5)


def test_a_mixed_batch_has_an_offset_for_each_row_and_counts_each_row_in_its_own_step(kit):
    data, times = stream(12)
    rows = [(x, y, {"timestamp": float(t)}) for (x, y), t in zip(data, times, strict=True)]
    limes = LIMES(training_prior="forecast", method="seasonal", season="4h")
    _, _, spy = fit(kit, limes, kit_loader(DataLoader(rows, 30)))
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


def kit_loader(loader):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader

    return Data()


def test_the_model_gets_better_than_without_correction_on_a_moving_mix(kit):
    class Fast(Digits):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 2e-2)

    accuracies = []
    for limes in (LIMES(season="4h"), LIMES(season="4h", method="long_run", training_prior="forecast")):
        fit(kit, limes, module_of(60, rows=100), Fast())
        by_step = [limes._line.tally.quality(s)["accuracy"] for s in range(20, 60)]
        accuracies.append(np.mean(by_step))
    assert accuracies[0] > accuracies[1] + 0.02


# Heads


class Binary(Digits):
    def __init__(self, flat):
        super().__init__(1)
        self.flat = flat

    def training_step(self, batch, batch_idx):
        scores = self(batch[0])
        targets = batch[1].float() if self.flat else batch[1].float()[:, None]
        return nn.functional.binary_cross_entropy_with_logits(scores.squeeze(1) if self.flat else scores, targets)


@pytest.mark.parametrize("flat", [True, False])
def test_a_single_logit_is_corrected_by_the_log_odds(kit, flat):
    limes = LIMES(training_prior="forecast")
    _, _, spy = fit(kit, limes, module_of(classes=2), Binary(flat))
    assert limes.extrapolator.num_classes == 2
    prior = limes.extrapolator.forecast(11)
    assert spy.offsets[-1].tolist() == pytest.approx([math.log(prior[1] / prior[0])], abs=1e-5)
    assert limes._line.tally.quality(11)["accuracy"] > 0.5


class Segmenter(pl.LightningModule):
    """Every pixel's class: whether it is bright, by a convolution."""

    def __init__(self, conv):
        super().__init__()
        torch.manual_seed(0)
        self.conv = conv
        self.net = nn.Conv2d(1, 3, 1) if conv else nn.Linear(1, 3)

    def forward(self, x):
        return self.net(x.reshape(-1, 1, 8, 8) if self.conv else x.reshape(-1, 64, 1))

    def training_step(self, batch, batch_idx):
        scores = self(batch[0])
        labels = (batch[0] * 2.9).long()
        labels[:, :8] = -100
        scores = scores if self.conv else scores.movedim(2, 1)
        return nn.functional.cross_entropy(scores, labels.reshape(-1, 8, 8) if self.conv else labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize("batch_size", [20, 30])
def test_heads_with_a_score_for_every_place_count_every_place_and_mask_ignored_ones(kit, conv, batch_size):
    data, times = stream(3)

    def labels(x):
        found = (x * 2.9).long()
        found[:8] = -100
        return found.reshape(8, 8) if conv else found

    rows = [(x, labels(x), {"timestamp": float(t)}) for (x, _), t in zip(data, times, strict=True)]
    limes = LIMES()
    kit.trainer(limes).fit(Segmenter(conv), DataLoader(rows, batch_size))
    counts = np.asarray(limes.extrapolator.state_dict()["counts"])
    seen = [np.concatenate([y[y >= 0].numpy() for _, y, m in rows if m["timestamp"] // HOUR == h]) for h in range(3)]
    expected = [np.bincount(labels, minlength=3) for labels in seen]
    assert np.array_equal(counts, expected)


def test_the_state_dict_stays_the_users_and_loads_strictly_both_ways(kit):
    trainer, module, _ = fit(kit, LIMES())
    trainer.save_checkpoint(kit.path / "x.ckpt")
    plain = Digits()
    assert list(module.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(torch.load(kit.path / "x.ckpt", weights_only=True)["state_dict"])
    module.load_state_dict(plain.state_dict())


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_corrected_and_not_compiled_again(kit):
    torch.compiler.reset()
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    class Compiled(Digits):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend=counter)

    class Frames(pl.Callback):
        counts = []

        def on_train_batch_end(self, *args):
            self.counts.append(counter.frame_count)

    limes, frames = LIMES(head="net._orig_mod.2", training_prior="forecast"), Frames()
    module = Compiled()
    kit.trainer(limes, frames).fit(module, datamodule=module_of())
    _, eager, spy = fit(kit, LIMES(training_prior="forecast"))
    assert len({tuple(o.tolist()) for o in spy.offsets}) > 5
    assert set(frames.counts[2:]) == {counter.frame_count}
    weights = {k.replace("_orig_mod.", ""): v for k, v in module.state_dict().items()}
    assert kit.difference(weights, eager.state_dict()) < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_compiled_and_called_before_the_run_is_refused(kit):
    torch.compiler.reset()

    class Compiled(Digits):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")
            for train in (False, True):
                self.train(train)(torch.zeros(20, 64))
                with torch.no_grad():
                    self(torch.zeros(20, 64))

    with pytest.raises(PluginError, match="'limes' cannot correct the scores"):
        kit.trainer(LIMES(head="net._orig_mod.2")).fit(Compiled(), datamodule=module_of())


@pytest.mark.parametrize("last", [nn.Softmax(dim=1), nn.Sigmoid()])
def test_a_model_that_returns_probabilities_is_refused_with_the_reason(kit, last):
    module = Digits(1 if isinstance(last, nn.Sigmoid) else 10)
    module.net.append(last)
    with pytest.raises(PluginError, match=r"returns probabilities, the softmax or sigmoid of 'net\.2'"):
        kit.trainer(LIMES()).fit(module, datamodule=module_of(classes=2))


def test_log_probabilities_are_fine(kit):
    module = Digits()
    module.net.append(nn.LogSoftmax(dim=1))
    fit(kit, LIMES(), module=module)


def test_an_ambiguous_head_is_refused_with_the_candidates(kit):
    class Two(Digits):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(64, 10)

        def forward(self, x):
            return self.net(x), self.other(x)

        def training_step(self, batch, batch_idx):
            return sum(nn.functional.cross_entropy(s, batch[1]) for s in self(batch[0]))

    with pytest.raises(PluginError, match=r"candidates: \['net.0', 'net.2', 'other'\]"):
        kit.trainer(LIMES()).fit(Two(), datamodule=module_of())
    with pytest.raises(PluginError, match=r"head='net.7' is not a layer of Two"):
        kit.trainer(LIMES(head="net.7")).fit(Two(), datamodule=module_of())
    fit(kit, LIMES(head="net.2"), module=Two())


class Other(Plugin):
    name = "other"

    @hookimpl
    def gw_check(self, run):
        if run.ready:
            run.offset("other", torch.zeros(10))


def test_a_second_correction_of_the_head_is_an_error_that_names_both(kit):
    with pytest.raises(PluginError, match=r"'limes' and 'other' both correct|'other' and 'limes' both correct"):
        kit.trainer(Plugins([Other(), LIMES()], head="net.2")).fit(Digits(), datamodule=module_of())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LIMES`"):
        kit.trainer(LIMES(), LIMES()).fit(Digits(), datamodule=module_of())


# Saving


class SaveAt(pl.Callback):
    def __init__(self, path, at):
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.at:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("at", [1, 6, 7, 23])
@pytest.mark.parametrize("options", [{}, {"preset": "icpr2022"}], ids=["auto", "icpr2022"])
def test_a_run_resumed_at_any_batch_has_bitwise_the_same_offsets(kit, at, options):
    path = kit.path / "at.ckpt"
    trainer = kit.trainer(LIMES(season="4h", **options), whole := Spy(), SaveAt(path, at))
    trainer.fit(Digits(), datamodule=module_of())
    rest = Spy()
    again = kit.trainer(LIMES(season="4h", **options), rest)
    module = Digits()
    again.fit(module, datamodule=resumable(), ckpt_path=path)
    assert len(rest.offsets) == len(whole.offsets) - at
    assert all(torch.equal(a, b) for a, b in zip(whole.offsets[at:], rest.offsets, strict=True))
    assert kit.difference(module.state_dict(), trainer.lightning_module.state_dict()) == 0.0


def resumable():
    return module_of()


def test_a_checkpoint_brings_its_history_along_for_prediction(kit):
    limes = LIMES()
    trainer, module, _ = fit(kit, limes)
    trainer.save_checkpoint(kit.path / "x.ckpt", weights_only=False)
    data, _ = stream()
    expected = kit.trainer(limes).predict(module, DataLoader(data, 50))
    found = kit.trainer(LIMES()).predict(Digits(), DataLoader(data, 50), ckpt_path=kit.path / "x.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_without_history_the_user_is_told(kit, caplog):
    data, _ = stream()
    kit.trainer(LIMES()).predict(Digits(), DataLoader(data, 50))
    assert "LIMES has no history" in caplog.text


@pytest.mark.parametrize("options", [{"method": "nearest"}, {"period": "2h"}, {"batches_per_step": 3}])
def test_a_checkpoint_of_other_arguments_is_refused_with_the_differences(kit, options):
    trainer, _, _ = fit(kit, LIMES())
    trainer.save_checkpoint(kit.path / "x.ckpt", weights_only=False)
    with pytest.raises(PluginError, match=f"{next(iter(options))}: .* in the checkpoint, .* here"):
        kit.trainer(LIMES(**options)).fit(Digits(), datamodule=module_of(), ckpt_path=kit.path / "x.ckpt")


def test_a_head_with_another_number_of_classes_than_the_history_is_refused(kit):
    limes = LIMES()
    fit(kit, limes)
    data, _ = stream()
    with pytest.raises(PluginError, match=r"has 10 classes and the head 'net\.2' has 12"):
        kit.trainer(limes).predict(Digits(12), DataLoader(data, 50))


def test_a_second_fit_of_the_module_goes_on_and_another_module_starts_anew(kit):
    data, times = stream(24)
    first, second = (
        StreamDataModule(torch.utils.data.Subset(data, rows), times[rows], batch_size=20)
        for rows in (np.flatnonzero(times < 12 * HOUR), np.flatnonzero(times >= 12 * HOUR))
    )
    limes, module = LIMES(), Digits()
    kit.trainer(limes).fit(module, datamodule=first)
    kit.trainer(limes).fit(module, datamodule=second)
    assert limes.extrapolator.observed == 24
    kit.trainer(limes).fit(Digits(), datamodule=first)
    assert limes.extrapolator.observed == 12


def test_export_folds_the_forecast_for_the_next_step_into_the_bias(kit):
    limes = LIMES()
    _, module, _ = fit(kit, limes)
    plain = groundwire.export(module)
    x = torch.randn(5, 64)
    expected = module(x) + torch.tensor(log_offset(limes.prior()), dtype=torch.float32)
    assert torch.allclose(plain(x), expected, atol=1e-6)
    assert list(plain.state_dict()) == list(module.state_dict())
    assert not plain.net[2]._forward_hooks
    assert not torch.equal(plain.net[2].bias, module.net[2].bias)


def test_export_during_the_run_leaves_no_hook_and_no_buffer(kit):
    found = []

    class Exports(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 10:
                offsets = limes._line.offset(limes.next_step), pl_module.net[2].gw_offset.clone()
                found.append((groundwire.export(pl_module), pl_module(batch[0]), batch[0], *offsets))

    limes = LIMES()
    kit.trainer(limes, Exports()).fit(Digits(), datamodule=module_of())
    [(plain, corrected, x, offset, current)] = found
    assert not hasattr(plain.net[2], "gw_offset")
    assert torch.allclose(plain(x), corrected - current + offset, atol=1e-5)


def test_export_gives_a_head_without_bias_one(kit):
    class NoBias(Digits):
        def __init__(self):
            super().__init__()
            self.net[2] = nn.Linear(16, 10, bias=False)

    limes = LIMES()
    _, module, _ = fit(kit, limes, module=NoBias())
    plain = groundwire.export(module)
    assert plain.net[2].bias.detach().numpy() == pytest.approx(log_offset(limes.prior()), abs=1e-5)


def test_the_table_of_biases_serves_without_the_plugin(kit):
    limes = LIMES()
    _, module, _ = fit(kit, limes)
    when = [datetime(1970, 1, 1, 14, 30, tzinfo=UTC), datetime(1970, 1, 1, 16, 0, tzinfo=UTC)]
    table = limes.export_adapted(when, module)
    assert table.steps == [14, 16]
    assert table.valid_from == ["1970-01-01T14:00:00+00:00", "1970-01-01T16:00:00+00:00"]
    x = torch.randn(5, 64)
    hidden = module.net[1](module.net[0](x))
    served = hidden @ module.net[2].weight.T + torch.tensor(table.bias[0], dtype=torch.float32)
    served_batch = (x, torch.zeros(5), {"timestamp": torch.full((5,), 14.5 * HOUR)})
    [expected] = kit.trainer(limes).predict(module, Listed([served_batch]))
    assert torch.allclose(served, expected, atol=1e-5)
    table.to_json(kit.path / "table.json")
    assert json.loads((kit.path / "table.json").read_text())["rows"][1]["step"] == 16
    assert limes.export_adapted(when).bias[0] == pytest.approx(log_offset(limes.prior(when[0])), abs=1e-6)


# Processes


@pytest.mark.parametrize("training_prior", ["running", "forecast"])
def test_two_processes_agree_on_steps_counts_and_offsets(kit, training_prior):
    data, times = stream(12, rows=80)

    class Ragged(pl.LightningDataModule):
        """The ranks cross the hours at different batches."""

        def train_dataloader(self):
            rank = self.trainer.global_rank
            rows = np.arange(rank, len(data), 2)
            rows = rows[12:] if rank else rows[:-12]
            return DataLoader([(*data[i], {"timestamp": float(times[i])}) for i in rows], 26, drop_last=True)

    class Seen(Spy):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            line = limes._line
            steps = {s: f.prior.tolist() for s, f in line._made.items()}
            kept.append((line.current, steps))

        def on_train_end(self, trainer, pl_module):
            state = {"kept": kept, "state": limes.extrapolator.state_dict(), "weights": dict(pl_module.state_dict())}
            torch.save(state, kit.path / f"rank{trainer.global_rank}.pt")

    kept = []
    limes = LIMES(training_prior=training_prior)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    trainer = kit.trainer(limes, Seen(), strategy=strategy, devices=2, use_distributed_sampler=False)
    trainer.fit(Digits(), datamodule=Ragged())
    one, two = (torch.load(kit.path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert kit.difference(one["weights"], two["weights"]) == 0.0
    assert one["state"] == two["state"]
    total = np.sum(one["state"]["counts"], axis=0)
    used = [(np.arange(r, len(data), 2)[12:] if r else np.arange(r, len(data), 2)[:-12]) for r in (0, 1)]
    used = np.concatenate([u[: len(u) // 26 * 26] for u in used])
    assert np.array_equal(total, np.bincount(data.tensors[1][used].numpy(), minlength=10))
    for (step, made), (other, also) in zip(one["kept"], two["kept"], strict=True):
        assert step == other
        assert all(made[s] == also[s] for s in made.keys() & also.keys())


# Bad input


def rows_at(times, labels=None):
    labels = [0] * len(times) if labels is None else labels
    return [(torch.zeros(4, 64), torch.full((4,), y), {"timestamp": t}) for t, y in zip(times, labels, strict=True)]


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
        ([0.0], {"weights": "w"}, "no weights 'w'"),
    ],
)
def test_bad_times_are_refused_with_the_reason(kit, times, options, text):
    with pytest.raises(PluginError, match=text):
        kit.trainer(LIMES(**options)).fit(Digits(), Listed(rows_at(times)))


class Listed:
    """Batches as they are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def test_a_label_that_the_head_does_not_have_is_named_before_the_loss_sees_it(kit):
    with pytest.raises(PluginError, match="label 12 is in a training batch, and the head has 10 classes"):
        kit.trainer(LIMES()).fit(Digits(), Listed(rows_at([0.0], [12])))


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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"period": "1 fortnight"}, "period must be a positive length"),
        ({"period": 0}, "period must be a positive length"),
        ({"method": "magic"}, "method must be one of 'auto', 'nearest'"),
        ({"preset": "icpr"}, "preset must be one of None, 'icpr2022'"),
        ({"training_prior": "x"}, "training_prior must be one of"),
        ({"on_backward": "x"}, "on_backward must be one of"),
        ({"batches_per_step": 0}, "batches_per_step must be a whole number of at least 1"),
        ({"lateness": -1}, "lateness must be a whole number of at least 0"),
        ({"season": 1, "batches_per_step": 2}, "season must be a whole number of at least 2"),
    ],
)
def test_bad_arguments_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        LIMES(**options)


# What is said


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(10)), "class weights"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "label_smoothing"),
        (type("FocalLoss", (nn.CrossEntropyLoss,), {})(), "does not give the posterior"),
    ],
)
def test_losses_that_move_the_prior_are_said_and_reported(kit, loss, text):
    class Module(Digits):
        def __init__(self):
            super().__init__()
            self.loss = loss

        def training_step(self, batch, batch_idx):
            return self.loss(self(batch[0]), batch[1])

    with pytest.warns(UserWarning, match=text):
        fit(kit, LIMES(), module=Module())
    [folder] = (kit.path / "groundwire").iterdir()
    assert any(text in f.message for f in Report.read(folder).findings if f.severity == "warn")


def test_balanced_samplers_are_said(kit):
    data, times = stream(1)
    rows = [(x, y, {"timestamp": float(t)}) for (x, y), t in zip(data, times, strict=True)]
    sampler = torch.utils.data.WeightedRandomSampler(torch.ones(len(rows)), len(rows))
    with pytest.warns(UserWarning, match="WeightedRandomSampler draws the classes with other frequencies"):
        kit.trainer(LIMES()).fit(Digits(), DataLoader(rows, 20, sampler=sampler))


def test_the_report_has_prequential_accuracy_worst_hours_divergence_and_pictures(kit):
    logger = pl.loggers.CSVLogger(kit.path, name="", version="")
    limes = LIMES(season="4h")
    fit(kit, limes, logger=logger, log_every_n_steps=1)
    report = Report.read(kit.path)
    found = {f.code: f.value for f in report.findings}
    qualities = [limes._line.tally.quality(s)["accuracy"] for s in range(12)]
    assert found["mean_accuracy"] == pytest.approx(np.mean(qualities))
    worst = [min(qualities[i : i + 4]) for i in (0, 4, 8)]
    assert found["worst_step_accuracy"] == pytest.approx(np.mean(worst))
    assert found["divergence"] > 0
    assert found["guarded_steps"] >= 0
    page = report.path.read_text()
    assert page.count("<svg") == 3
    assert "prequential" in page
    text = (kit.path / "metrics.csv").read_text()
    assert "limes/accuracy" in text
    assert "limes/divergence" in text


def test_prequential_accuracy_is_that_of_the_forecast_before_the_batch_was_learned_from(kit):
    limes, datamodule = LIMES(training_prior="realised"), module_of()

    class Before(pl.Callback):
        hits, rows = 0, 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            offset = torch.tensor(log_offset(limes._line.forecast(limes._line.current).prior), dtype=torch.float32)
            with torch.no_grad():
                scores = pl_module(batch[0]) - pl_module.net[2].gw_offset + offset
            self.hits += int((scores.argmax(1) == batch[1]).sum())
            self.rows += len(batch[1])

    before = Before()
    kit.trainer(limes, before).fit(Digits(), datamodule=datamodule)
    sums = sum(row[10:] for row in limes._line.tally.known.values())
    assert (sums[0], sums[1]) == (before.rows, before.hits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_arguments_come_from_yaml(kit, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit"])
    from lightning.pytorch.cli import LightningCLI

    arguments = {
        "trainer": {**kit.QUIET, "max_epochs": 1, "default_root_dir": str(kit.path),
                    "callbacks": [{"class_path": "groundwire_limes.LIMES", "init_args": {"batches_per_step": 4}}]},
    }  # fmt: skip
    cli = LightningCLI(Digits, pl.LightningDataModule, run=False, args=arguments, save_config_callback=None,
                       seed_everything_default=False)  # fmt: skip
    limes = next(c for c in cli.trainer.callbacks if isinstance(c, LIMES))
    assert limes.batches_per_step == 4


# Without labels


def test_batches_without_labels_are_adapted_where_past_labels_show_that_it_helps(kit):
    data, times = stream(40, rows=100)
    limes, module = LIMES(unlabelled=True, season=None), Digits()
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), 2e-2)
    kit.trainer(limes).fit(module, datamodule=StreamDataModule(data, times, batch_size=50))
    gate = limes._learned.memory.gate(limes.extrapolator, 1)
    assert gate is not None
    rows = data.tensors[1] == 7  # a flood of sevens that no forecast expects
    x = data.tensors[0][rows][:60]
    batch = [(x, torch.zeros(60), {"timestamp": 60.0 * HOUR})]
    [plain] = kit.trainer(LIMES()).predict(module, Listed(batch))
    [adapted] = kit.trainer(limes).predict(module, Listed(batch))
    offset = (adapted - plain)[0].numpy()
    if limes._learned.memory.gate(limes.extrapolator, 21).is_open:
        assert offset.argmax() == 7
        assert offset[7] > log_offset(limes.prior(60 * HOUR))[7]
    else:
        assert offset == pytest.approx(log_offset(limes.prior(60 * HOUR)), abs=1e-5)
