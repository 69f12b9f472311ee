"""Versions are audited in the last validation of a fit, whatever ends the fit."""

import pytest
from bias_audit_patients import Classifier, loaders
from lightning.pytorch.callbacks import Callback, EarlyStopping

from groundwire import hookimpl
from groundwire_bias_audit import BiasAudit


class Timed(BiasAudit):
    """Remembers how many validations there were, and which of them evaluated versions."""

    def __init__(self, **options):
        super().__init__("hospital", **{"variants": [0.9], **options}, name="bias_audit")
        self.validations, self.compared = 0, []

    @hookimpl
    def gw_findings(self, run):
        found = super().gw_findings(run)
        if run.stage == "validate":
            self.validations += 1
            if "0.9" in self.results["validate"]:
                self.compared.append(self.validations)
        return found


def stopping(patience):
    """Nothing improves by a million."""
    return EarlyStopping("val_loss", min_delta=1e6, patience=patience)


def fitted(kit, plugin, *callbacks, **options):
    train, val = loaders("plain")  # 9 batches
    kit.trainer(plugin, *callbacks, **options).fit(Classifier(), train, val)
    return plugin


@pytest.mark.parametrize(
    ("options", "callbacks"),
    [
        ({"max_epochs": 2}, []),
        ({"max_epochs": 5, "check_val_every_n_epoch": 2}, []),
        ({"max_epochs": 2, "val_check_interval": 5}, []),
        ({"max_epochs": 3, "val_check_interval": 7, "check_val_every_n_epoch": None}, []),
        ({"max_epochs": -1, "max_steps": 20}, []),
        ({"max_epochs": -1, "max_steps": 18}, []),
        ({"max_epochs": -1, "max_steps": 7, "accumulate_grad_batches": 3}, []),
        ({"max_epochs": 50}, [stopping(1)]),
        ({"max_epochs": 50}, [stopping(2)]),
    ],
    ids=["epochs", "every second", "within", "by batches", "steps", "whole", "accumulated", "stopped", "patient"],
)
def test_the_last_validation_is_one_with_versions(kit, options, callbacks):
    plugin = fitted(kit, Timed(), *callbacks, num_sanity_val_steps=0, limit_val_batches=1, **options)
    assert plugin.compared[-1] == plugin.validations
    assert len(plugin.compared) <= 2  # not in every one


def test_an_end_that_nobody_could_foresee_is_reported(kit):
    class Impatient(Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"Variants of the model were not audited.*every_n_epochs=1"):
        plugin = fitted(kit, Timed(), Impatient(), num_sanity_val_steps=0, max_epochs=9)
    assert plugin.compared == []
    fitted(kit, often := Timed(every_n_epochs=2), num_sanity_val_steps=0, max_epochs=5)
    assert often.compared == [2, 4, 5]
    fitted(kit, every := Timed(every_n_epochs=1), Impatient(), num_sanity_val_steps=0, max_epochs=9)
    assert every.compared == [1]
