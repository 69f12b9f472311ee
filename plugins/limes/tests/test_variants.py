"""Other versions of the model, which other plugins evaluate: each of their batches is corrected for its own time."""

import pytest
import torch
from limes_digit_stream import HOUR, Digits, Listed, across_hours, module_of
from torch import nn

from groundwire import Plugin, Plugins, hookimpl
from groundwire_limes import LIMES


class Scored(Digits):
    def validation_step(self, batch, batch_idx):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), batch_size=len(batch[1]))

    test_step = validation_step


class Again(Plugin):
    """Evaluates the model itself a second time, as a plugin that compares versions of it does."""

    name = "again"

    @hookimpl
    def gw_findings(self, run):
        if run.stage in ("validate", "test"):
            self.metrics = run.evaluate().metrics


class Versions(Plugin):
    """Evaluates what others offer."""

    name = "versions"

    @hookimpl
    def gw_findings(self, run):
        if run.stage in ("validate", "test"):
            self.metrics = {version.name: run.evaluate(version).metrics for version in run.variants()}
            self.again = run.evaluate().metrics


@pytest.mark.parametrize("batches", [module_of, lambda: across_hours(module_of())])
def test_others_can_evaluate_the_model_without_the_correction(kit, fitted, batches):
    versions, module = Versions(), Scored()
    module.load_state_dict(fitted.module.state_dict())
    limes = LIMES()
    limes.load_state_dict(torch.load(fitted.checkpoint, weights_only=True)["callbacks"][limes.state_key])
    loader = Listed(list(batches().train_dataloader()))
    [corrected] = kit.trainer(Plugins([limes, versions], report=False)).validate(module, loader, verbose=False)
    [plain] = kit.trainer().validate(module, loader, verbose=False)
    assert versions.metrics == {"without LIMES": {"loss": pytest.approx(plain["loss"])}}
    assert corrected["loss"] != pytest.approx(plain["loss"], rel=1e-2)
    assert versions.again["loss"] == pytest.approx(corrected["loss"])


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("batches", [module_of, lambda: across_hours(module_of())])
def test_a_version_of_the_model_is_evaluated_as_the_model_is(kit, fitted, stage, batches):
    again, module = Again(), Scored()
    module.load_state_dict(fitted.module.state_dict())
    limes = LIMES()
    limes.load_state_dict(torch.load(fitted.checkpoint, weights_only=True)["callbacks"][limes.state_key])
    loader = Listed(
        [(x, y, {"timestamp": meta["timestamp"] + 13 * HOUR}) for x, y, meta in batches().train_dataloader()]
    )
    trainer = kit.trainer(Plugins([limes, again], report=False))
    [metrics] = getattr(trainer, stage)(module, loader, verbose=False)
    assert again.metrics["loss"] == pytest.approx(metrics["loss"])
