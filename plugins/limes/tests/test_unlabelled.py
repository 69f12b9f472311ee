"""Batches without labels."""

import pytest
import torch
from limes_digit_stream import HOUR, Digits, Listed, stream

from groundwire import Plugin, PluginError, hookimpl
from groundwire_limes import LIMES, StreamDataModule
from groundwire_limes.adaptation import raw_scores
from groundwire_limes.functional import log_offset


def offset_in_a_flood(kit, hours, at):
    """LIMES after ``hours`` of labels, and what corrects sixty unlabelled sevens in hour ``at``."""
    data, times = stream(hours, rows=100)
    limes, module = LIMES(unlabelled=True, season=None), Digits()
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), 2e-2)
    kit.trainer(limes).fit(module, datamodule=StreamDataModule(data, times, batch_size=50))
    x = data.tensors[0][data.tensors[1] == 7][:60]
    batch = [(x, torch.zeros(60), {"timestamp": at * float(HOUR)})]
    [plain] = kit.trainer(LIMES()).predict(module, Listed(batch))
    [adapted] = kit.trainer(limes).predict(module, Listed(batch))
    return limes, (adapted - plain)[0].numpy()


def test_batches_without_labels_are_adapted_where_past_labels_show_that_it_helps(kit):
    limes, offset = offset_in_a_flood(kit, hours=24, at=44)
    gate = limes._labelled_scores.gate(limes.extrapolator, 21)  # forecasts so far ahead are poor
    assert gate is not None
    assert gate.gain > 0.02
    assert gate.is_open
    assert offset.argmax() == 7
    assert offset[7] > log_offset(limes.prior(44 * HOUR))[7] + 0.5


def test_batches_without_labels_keep_the_forecast_while_too_few_labelled_steps_are_known(kit):
    limes, offset = offset_in_a_flood(kit, hours=7, at=12)
    assert limes._labelled_scores.gate(limes.extrapolator, 6) is None
    assert offset == pytest.approx(log_offset(limes.prior(12 * HOUR)), abs=1e-5)


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (lambda self, x, mask: self.net(x * mask), "failed with TypeError"),
        (lambda self, x: x.sum(), "did not reach the head 'net.2'"),
    ],
)
def test_a_model_whose_forward_gives_no_scores_beforehand_is_told_what_to_do(kit, forward, text):
    class Module(Digits):
        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

    class Asking(Plugin):
        name, head = "asking", "net.2"

        @hookimpl
        def gw_check(self, run):
            self.run = run

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            raw_scores(self.run, batch)

    Module.forward = forward
    with pytest.raises(PluginError, match=rf"forward\(inputs\) {text}.* -> tell its inputs"):
        kit.trainer(Asking()).validate(Module(), Listed([(torch.zeros(4, 64), torch.zeros(4))]), verbose=False)
