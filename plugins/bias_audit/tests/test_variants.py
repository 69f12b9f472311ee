"""Versions of the model: evaluated when due, paired with the model row by row."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from bias_audit_patients import SHUFFLED, Classifier, Patients, assert_same, expected, fitted, loaders
from torch.utils.data import DataLoader

from groundwire import Fields, Plugin, PluginError, Plugins, Report, Variant, hookimpl
from groundwire_bias_audit import BiasAudit, audit


def magnitude_pruned(module, sparsity):
    """The same pruning written out: the floor or round of the share, over all matrices together."""
    pruned = copy.deepcopy(module)
    weights = [p for p in pruned.parameters() if p.dim() > 1]
    flat = torch.cat([w.detach().abs().flatten() for w in weights])
    cut = flat.sort().values[round(sparsity * flat.numel()) - 1]
    with torch.no_grad():
        for w in weights:
            w[w.abs() <= cut] = 0
    return pruned


@SHUFFLED
@pytest.mark.parametrize("shuffle", [False, True])
def test_pruned_versions_are_audited_and_paired_with_the_model(kit, shuffle):
    plugin = BiasAudit(variants=[0.5, 0.9])
    module, _ = fitted(kit, plugin, epochs=2, shuffle=shuffle)
    results = plugin.results["validate"]
    assert list(results) == ["dense", "0.5", "0.9"]
    data = Patients()
    small = magnitude_pruned(module, 0.9)
    assert_same(results["0.9"].to_frame(), expected(small).to_frame())
    with torch.no_grad():
        before, after = (m.eval()(data.x)[:, 0].sigmoid() for m in (module, small))
    pairs = audit(data.y, after, baseline_scores=before, sensitive_features=data.hospital).comparison
    assert (results["0.9"].comparison.pairs == pairs.pairs).all()
    assert (results["0.9"].comparison.flips == pairs.flips).all()


def test_versions_wait_for_their_epoch(kit):
    class Counting(BiasAudit):
        seen = ()

        def _compare(self, run, *args):
            self.seen = (*self.seen, run.trainer.current_epoch)
            return super()._compare(run, *args)

    last, every = Counting(variants=[0.5]), Counting(variants=[0.5], every_n_epochs=2)
    for plugin, epochs in ((last, [3]), (every, [1, 3])):
        plugin.name = "bias_audit"
        fitted(kit, plugin, epochs=4, limit_train_batches=1, limit_val_batches=2)
        assert list(plugin.seen) == epochs


class Halved(Plugin):
    """A third party that knows nobody: the model with all its weights halved."""

    @hookimpl
    def gw_variants(self, module):
        from contextlib import contextmanager

        @contextmanager
        def halved():
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(0.5)
                try:
                    yield
                finally:
                    for p in module.parameters():
                        p.mul_(2)

        return [Variant("halved", halved)]


def test_versions_of_other_plugins_are_audited(kit):
    plugin = BiasAudit()
    module = Classifier()
    kit.trainer(plugin, Halved()).test(module, DataLoader(Patients(), 64), verbose=False)
    assert list(plugin.results["test"]) == ["dense", "halved"]
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.5)
    assert_same(plugin.results["test"]["halved"].to_frame(), expected(module).to_frame())


def test_without_versions_a_finding_says_so(kit):
    plugin = BiasAudit()
    kit.trainer(plugin, report=True).validate(Classifier(), DataLoader(Patients(), 64), verbose=False)
    codes = {f.code: f for f in Report.read(kit.path).findings}
    assert "No plugin of this run offers" in codes["versions"].message


def test_an_earlier_model_can_be_the_baseline(kit):
    data = Patients()
    old = torch.rand(569, generator=torch.Generator().manual_seed(0))
    plugin = BiasAudit(variants=False, baseline=old)
    module = Classifier()
    kit.trainer(plugin).validate(module, DataLoader(data, 64), verbose=False)
    with torch.no_grad():
        new = module.eval()(data.x)[:, 0].sigmoid()
    wanted = audit(data.y, new, baseline_scores=old, sensitive_features=data.hospital).comparison
    assert (plugin.results["validate"]["dense"].comparison.pairs == wanted.pairs).all()


def test_a_version_can_be_the_baseline(kit):
    plugin = BiasAudit(variants=[0.5, 0.9], baseline="0.5")
    fitted(kit, plugin)
    results = plugin.results["validate"]
    assert results["0.5"].comparison is None
    half, most = results["0.5"].to_frame(), results["0.9"].comparison.to_frame()
    assert (most["baseline_accuracy"] == half["accuracy"]).all()


def test_an_unknown_baseline_is_refused_before_training(kit):
    with pytest.raises(PluginError, match=r"baseline is '0.7', and the variants are \['0.5'\]"):
        fitted(kit, BiasAudit(variants=[0.5], baseline="0.7"))


def test_a_feature_may_be_called_like_a_column_of_the_lists(kit):
    groups = pd.DataFrame({"label": np.arange(569) % 3, "score": np.arange(569) % 2})
    plugin = BiasAudit(groups, variants=[0.9], attribution="input_x_gradient", attribution_samples=2)
    fitted(kit, plugin, "plain", report=True)
    folder = Report.read(kit.path).path.parent / "bias_audit"
    flips = pd.read_csv(folder / "flips-validate-0.9.csv")
    likely = pd.read_csv(folder / "susceptible-validate.csv")
    for table in (flips, likely):
        assert (table["group label"] == table["id"] % 3).all()
        assert (table["group score"] == table["id"] % 2).all()
    assert set(flips["label"]) <= {0, 1}
    assert {"label", "score"} <= set(pd.read_csv(folder / "attribution-validate-0.9.csv"))


class Regression(Classifier):
    def loss(self, batch):
        return (self(batch[0])[:, 0] - batch[0][:, 0] ** 2).square().mean()


def real(batch):
    return Fields(batch[0], targets=batch[0][:, 0] ** 2, groups=batch[2]["groups"])


def test_versions_of_a_regression_are_audited_and_have_no_flips(kit):
    plugin, (_, val) = BiasAudit(variants=[0.9]), loaders()
    trainer = kit.trainer(Plugins([plugin], fields=real))
    trainer.validate(Regression(), val, verbose=False)
    audited = plugin.results["validate"]
    assert audited["0.9"].task == "regression"
    assert audited["0.9"].comparison is None
    assert audited["0.9"].to_frame()["mean_absolute_error"].ne(audited["dense"].to_frame()["mean_absolute_error"]).all()


def test_a_baseline_for_a_regression_is_refused(kit):
    trainer = kit.trainer(Plugins([BiasAudit(variants=[0.5, 0.9], baseline=0.5)], fields=real))
    with pytest.raises(PluginError, match="a regression has not"):
        trainer.validate(Regression(), loaders()[1], verbose=False)
