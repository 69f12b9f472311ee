"""BiasAudit inside a Trainer: the same numbers as the one call, on scripts that do not know it."""

import copy
import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from bias_audit_patients import SHUFFLED, Classifier, Patients, assert_same, expected, fitted, loaders
from torch.utils.data import DataLoader, TensorDataset

from groundwire import Fields, PluginError, Plugins, Report
from groundwire_bias_audit import BiasAudit, Gate, audit


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_streamed_audit_is_the_audit_of_the_rows(kit, outputs):
    plugin = BiasAudit(variants=False)
    module, _ = fitted(kit, plugin, outputs=outputs)
    assert_same(plugin.results["validate"]["dense"].to_frame(), expected(module).to_frame())


def test_the_model_is_not_run_a_second_time(kit):
    calls = []

    class Counting(Classifier):
        def forward(self, x):
            calls.append(self.training)
            return super().forward(x)

    train, val = loaders()
    kit.trainer(BiasAudit(variants=False), num_sanity_val_steps=0).fit(Counting(), train, val)
    # One more: the head is found in a pass of the first batch.
    assert calls.count(False) == len(val) + 1


@SHUFFLED
def test_training_is_bit_for_bit_as_without(kit):
    plain, audited = Classifier(), Classifier()
    for module, plugins in ((plain, []), (audited, [BiasAudit(variants=[0.9], every_n_epochs=1)])):
        train, val = loaders(shuffle=True)
        torch.manual_seed(3)
        kit.trainer(*plugins, max_epochs=3).fit(module, train, val)
    assert kit.difference(plain.state_dict(), audited.state_dict()) == 0.0


def test_findings_and_files_tell_the_verdict(kit):
    plugin = BiasAudit(variants=[0.5])
    fitted(kit, plugin, report=True)
    report = Report.read(kit.path)
    codes = {f.code: f for f in report.findings}
    assert {"verdict", "accuracy", "roc_auc", "uncertainty", "worst_group_accuracy", "accuracy_gap[group]"} <= set(
        codes
    )
    assert {"verdict@0.5", "flip_rate@0.5", "change_verdict@0.5"} <= set(codes)
    assert codes["verdict"].value == str(plugin.results["validate"]["dense"].verdict)
    assert (
        codes["verdict"].severity
        == {"pass": "info", "insufficient data": "warn", "disparity": "fail"}[codes["verdict"].value]
    )
    folder = report.path.parent / "bias_audit"
    written = json.loads((folder / "validate-dense.json").read_text())
    assert written["schema"] == 2
    assert written["verdict"] == codes["verdict"].value
    susceptible = pd.read_csv(folder / "susceptible-validate.csv")
    assert len(susceptible) == 100
    assert susceptible["susceptibility"].is_monotonic_decreasing
    assert "could not be drawn" not in report.path.read_text("utf-8")


def test_two_audits_of_one_run_need_two_names(kit):
    with pytest.raises(PluginError, match="bias_audit"):
        fitted(kit, Plugins([BiasAudit(), BiasAudit()]))
    first, second = BiasAudit(variants=False), BiasAudit("hospital", variants=False, name="by_hospital")
    module = Classifier()
    data = Patients()
    kit.trainer(first, second).validate(module, DataLoader(data, 64), verbose=False)
    assert first.results["validate"]["dense"].features == ("group",)
    assert second.results["validate"]["dense"].features == ("hospital",)


def test_several_loaders_are_audited_together(kit):
    class Two(Classifier):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.loss(batch)

    plugin = BiasAudit("hospital", variants=[0.5])
    first, second = Patients(slice(0, 300), "plain"), Patients(slice(300, None), "plain")
    module = Two()
    kit.trainer(plugin).validate(module, [DataLoader(first, 64), DataLoader(second, 50)], verbose=False)
    assert_same(plugin.results["validate"]["dense"].to_frame(), expected(module).to_frame())
    assert plugin.results["validate"]["0.5"].counts.size.sum() == 569


def test_multiclass_multilabel_and_regression(kit):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(200, 30, generator=generator), np.arange(200) % 2
    targets = {
        "multiclass": torch.randint(0, 4, (200,), generator=generator),
        "multilabel": torch.randint(0, 2, (200, 4), generator=generator),
        "regression": torch.randn(200, 1, generator=generator),
    }
    for task, y in targets.items():
        module = Classifier(1 if task == "regression" else 4)
        module.loss = lambda batch: torch.zeros(())
        module.validation_step = lambda batch, batch_idx, module=module: module(batch[0]).sum()
        plugin = BiasAudit(dict(enumerate(g)), variants=False)
        kit.trainer(plugin).validate(module, DataLoader(TensorDataset(x, y), 30), verbose=False)
        result = plugin.results["validate"]["dense"]
        assert result.task == task
        with torch.no_grad():
            scores = module.eval()(x)
        if task == "multiclass":
            right = (scores.argmax(1) == y).numpy()
            assert result.to_frame()["accuracy"].tolist() == [right[g == 0].mean(), right[g == 1].mean()]
        elif task == "multilabel":
            right = ((scores > 0) == (y == 1)).numpy()
            assert result.to_frame(target=2)["accuracy"].tolist() == [right[g == 0, 2].mean(), right[g == 1, 2].mean()]
        else:
            error = (scores - y).abs().numpy()[:, 0]
            assert result.to_frame()["mean_absolute_error"].tolist() == pytest.approx(
                [error[g == 0].mean(), error[g == 1].mean()]
            )


def test_versions_of_a_regression_are_audited_each_by_itself(kit):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(200, 30, generator=generator), np.arange(200) % 2
    module = Classifier()
    module.loss = lambda batch: ((module(batch[0]) - batch[1]) ** 2).mean()
    data = DataLoader(TensorDataset(x, torch.randn(200, 1, generator=generator)), 30)
    plugin = BiasAudit(dict(enumerate(g)), variants=[0.5], attribution="auto")
    trainer = kit.trainer(plugin, max_epochs=1)
    trainer.fit(module, data, data)
    results = plugin.results["validate"]
    assert list(results) == ["dense", "0.5"]
    assert {result.comparison for result in results.values()} == {None}
    dense, version = (results[name].to_frame()["mean_absolute_error"] for name in results)
    assert (dense != version).all()


def test_groups_may_have_a_column_of_their_own_in_a_batch(kit):
    class Columns(Patients):
        def __getitem__(self, i):
            return {"x": self.x[i], "y": self.y[i], "hospital": torch.tensor([i % 3])}

    module, plugin = Classifier(), BiasAudit("hospital", variants=False)
    kit.trainer(plugin, max_epochs=1).fit(module, *(DataLoader(Columns(), 64) for _ in range(2)))
    found, wanted = plugin.results["validate"]["dense"].to_frame(), expected(module).to_frame()
    assert found["accuracy"].tolist() == wanted["accuracy"].tolist()


def test_the_users_own_reading_of_batches_counts(kit):
    def fields(batch):
        x, y = batch
        return Fields(x, targets=1 - y, groups=(x[:, 0] > 0).long())

    plugin = BiasAudit(variants=False)
    module = Classifier()
    trainer = kit.trainer(Plugins([plugin], fields=fields))
    trainer.validate(module, DataLoader(Patients(form="plain"), 64), verbose=False)
    data = Patients()
    with torch.no_grad():
        p = module.eval()(data.x)[:, 0].sigmoid()
    wanted = audit(1 - data.y, p, sensitive_features=(data.x[:, 0] > 0).long()).to_frame()
    assert plugin.results["validate"]["dense"].to_frame()["accuracy"].tolist() == wanted["accuracy"].tolist()


def test_a_copy_or_pickle_is_a_fresh_audit_with_the_same_arguments(kit):
    plugin = BiasAudit("hospital", variants=[0.5], gate=Gate(tolerance=0.2), name="mine")
    fitted(kit, plugin, form="dict")
    for twin in (copy.deepcopy(plugin), pickle.loads(pickle.dumps(plugin))):
        assert (twin.groups, twin.variants, twin.gate, twin.name) == ("hospital", (0.5,), Gate(tolerance=0.2), "mine")
        assert twin.results == {}


def test_nothing_to_audit_is_said(kit):
    kit.trainer(BiasAudit(), report=True).fit(Classifier(), loaders()[0])
    codes = {f.code: f.severity for f in Report.read(kit.path).findings}
    assert codes == {"audited": "warn"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": [1.5]}, "sparsities in"),
        ({"variants": ["0.5"]}, "sparsities in"),
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"threshold": 1.0}, "threshold"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BiasAudit(**arguments)


def test_a_gate_must_be_a_gate():
    with pytest.raises(TypeError, match="gate must be a Gate"):
        BiasAudit(gate=0.05)


def test_the_old_name_of_the_counts_warns():
    result = audit([1, 0], y_pred=[1, 0], sensitive_features=["f", "m"])
    with pytest.warns(DeprecationWarning, match="counts"):
        assert result.evidence is result.counts
