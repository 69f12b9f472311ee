"""The pruned variants that CrAM offers: recalibrated, evaluated on the way, and not in the way."""

import lightning.pytorch as pl
import pytest

from groundwire import Plugin, Plugins, Report, hookimpl
from groundwire_cram import CrAM, prune, recalibrate_batchnorm


class Asks(Plugin):
    """Evaluates every variant that somebody offers; knows nobody."""

    after = ("cram",)

    def __init__(self):
        self.results, self.names = {}, []

    @hookimpl
    def gw_findings(self, run):
        if run.stage == "validate":
            for variant in run.variants():
                self.results[variant.name] = run.evaluate(variant).metrics

    @hookimpl
    def gw_scores(self, variant):
        self.names.append(variant)


def test_offered_variants_are_pruned_and_recalibrated_and_leave_the_model_alone(kit):
    asks, module, plain = Asks(), kit.Net(), kit.Net()
    kit.fit(module, CrAM(), asks, val=kit.loader(), num_sanity_val_steps=0)
    kit.fit(plain, CrAM(), val=kit.loader(), num_sanity_val_steps=0)
    assert kit.difference(module.state_dict(), plain.state_dict()) == 0.0
    assert list(asks.results) == ["0.5", "0.7", "0.9"]
    twin = recalibrate_batchnorm(prune(module, 0.9), kit.loader())
    [expected] = kit.trainer().validate(twin, kit.loader(), verbose=False)
    assert dict(asks.results["0.9"]) == pytest.approx(expected)
    assert set(asks.names) == {None, "0.5", "0.7", "0.9"}


def test_variants_without_data_say_that_they_are_not_recalibrated(kit):
    asks = Asks()
    kit.trainer(CrAM(sparsities=(0.9,)), asks).validate(kit.Net(), kit.loader(), verbose=False)
    assert list(asks.results) == ["0.9 (not recalibrated)"]
    asks = Asks()
    kit.trainer(CrAM(sparsities=(0.9,), calibration=kit.loader()), asks).validate(
        kit.Net(), kit.loader(), verbose=False
    )
    assert list(asks.results) == ["0.9"]


def test_evaluate_every_gives_a_curve_in_the_report_and_metrics_in_the_logs(kit):
    logger = pl.loggers.CSVLogger(kit.path, name="", version="")
    options = {"val": kit.loader(), "max_epochs": 2, "logger": logger}
    trainer = kit.fit(kit.Net(), CrAM(sparsities=(0.5, 0.9), evaluate_every=2), **options)
    report = Report.read(kit.path)
    codes = {(f.code, f.epoch) for f in report.findings}
    assert codes - {("backend", None)} == {
        (f"{metric}@{s}", 1) for metric in ("val_acc", "val_loss") for s in ("dense", "0.5", "0.9")
    }
    page = report.path.read_text()
    assert "<svg" in page
    assert "val_acc after one-shot compression" in page
    assert "cram/val_acc@0.9" in (kit.path / "metrics.csv").read_text()
    dense = next(f.value for f in report.findings if f.code == "val_acc@dense")
    assert float(trainer.callback_metrics["val_acc"]) == pytest.approx(dense)


def test_bundled_with_other_plugins_it_trains_the_same(kit):
    alone, bundled = kit.Net(), kit.Net()
    kit.fit(alone, CrAM())
    kit.fit(bundled, Plugins([Asks(), CrAM()]))
    assert kit.difference(alone.state_dict(), bundled.state_dict()) == 0.0


def test_the_batches_kept_are_the_last_of_the_epoch_and_no_copy_takes_them_along(kit):
    import copy
    import pickle

    cram, module = CrAM(calibration_batches=2), kit.Net()
    trainer = kit.fit(module, cram)
    assert [batch[0].tolist() for batch in cram._recent] == [b[0].tolist() for b in list(kit.loader())[-2:]]
    assert not copy.deepcopy(cram)._recent
    assert not pickle.loads(pickle.dumps(cram))._recent
    asks = Asks()
    kit.trainer(cram, asks).validate(module, kit.loader(), verbose=False)
    assert list(asks.results) == ["0.5", "0.7", "0.9"]
    assert trainer.callbacks == [cram]
