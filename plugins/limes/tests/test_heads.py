"""Heads of all kinds, and those that are refused."""

import copy
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from limes_digit_stream import HOUR, Digits, Listed, fit, module_of, stream
from torch import nn
from torch.utils.data import DataLoader

from groundwire import Plugin, PluginError, Plugins
from groundwire_limes import LIMES


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
    assert limes._tracker.class_counts.quality(11)["accuracy"] > 0.5


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


def test_a_model_that_pools_the_scores_of_places_is_refused_with_the_reason(kit):
    class Pooling(Segmenter):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]).mean(dim=(2, 3)), batch[1])

    batch = (torch.zeros(4, 64), torch.zeros(4, dtype=torch.long), {"timestamp": 0.0})
    with pytest.raises(PluginError, match=r"targets of shape \(4,\) do not fit 256 predictions .* before the head"):
        kit.trainer(LIMES()).fit(Pooling(conv=True), Listed([batch]))


def test_a_step_of_two_forward_passes_with_half_the_rows_each_is_counted_from_its_first_batch(kit):
    """What LIMES itself passes through the model before the first step is no part of that step."""

    class Halves(Digits):
        def training_step(self, batch, batch_idx):
            scores = torch.cat([self(half) for half in batch[0].chunk(2)])
            return nn.functional.cross_entropy(scores, batch[1])

    found = []
    for kind in (Halves, Digits):
        limes = LIMES()
        kit.trainer(limes).fit(kind(), datamodule=module_of(3))
        found.append(limes._tracker.class_counts.known)
    assert all(np.allclose(found[0][step], found[1][step]) for step in found[1])


def test_the_state_dict_stays_the_users_and_loads_strictly_both_ways(fitted):
    module = copy.deepcopy(fitted.module)
    plain = Digits()
    assert list(module.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(torch.load(fitted.checkpoint, weights_only=True)["state_dict"])
    module.load_state_dict(plain.state_dict())


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
    name, changes = "other", "shift"


def test_a_second_correction_of_the_head_is_an_error_that_names_both(kit):
    with pytest.raises(PluginError, match=r"'limes' and 'other' both correct|'other' and 'limes' both correct"):
        kit.trainer(Plugins([Other(), LIMES()], head="net.2")).fit(Digits(), datamodule=module_of())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `LIMES`"):
        kit.trainer(LIMES(), LIMES(), report=True).fit(Digits(), datamodule=module_of())
