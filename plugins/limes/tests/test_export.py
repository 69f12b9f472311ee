"""Leaving the plugin behind."""

import json
from datetime import UTC, datetime

import lightning.pytorch as pl
import pytest
import torch
from limes_digit_stream import HOUR, Digits, Listed, fit, module_of, offset_on
from torch import nn

import groundwire
from groundwire.modules import shift_hooks
from groundwire_limes import LIMES
from groundwire_limes.functional import log_offset


def test_export_folds_the_forecast_for_the_next_step_into_the_bias(fitted):
    limes, module = fitted.limes, fitted.module
    plain = groundwire.export(module)
    x = torch.randn(5, 64)
    expected = module(x) + torch.tensor(log_offset(limes.prior()), dtype=torch.float32)
    assert torch.allclose(plain(x), expected, atol=1e-6)
    assert list(plain.state_dict()) == list(module.state_dict())
    assert not plain.net[2]._forward_hooks
    assert not torch.equal(plain.net[2].bias, module.net[2].bias)


def test_export_during_the_run_leaves_no_hook(kit):
    found = []

    class Exports(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 10:
                offsets = limes._tracker.offset(limes.next_step), offset_on(pl_module.net[2])
                found.append((groundwire.export(pl_module), pl_module(batch[0]), batch[0], *offsets))

    limes = LIMES()
    kit.trainer(limes, Exports()).fit(Digits(), datamodule=module_of())
    [(plain, corrected, x, offset, current)] = found
    assert not shift_hooks(plain.net[2])
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


def test_the_table_of_biases_serves_without_the_plugin(kit, fitted):
    limes, module = fitted.limes, fitted.module
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
