"""BiasAudit inside a Trainer: the same numbers as the one call, on scripts that do not know it."""

import copy
import json
import pickle

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from groundwire import Fields, Plugin, PluginError, Plugins, Report, Variant, hookimpl
from groundwire_bias_audit import BiasAudit, Gate, audit


class Patients(Dataset):
    """Breast cancer data; the group is whether the patient's id is odd, which nothing depends on."""

    def __init__(self, rows=slice(None), form="meta"):
        x, y = load_breast_cancer(return_X_y=True)
        x = (x - x.mean(0)) / x.std(0)
        self.x, self.y = torch.tensor(x, dtype=torch.float32)[rows], torch.tensor(y)[rows]
        self.hospital = np.array(["north", "south", "west"])[np.arange(len(x)) % 3][rows]
        self.form = form

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        if self.form == "meta":
            return self.x[i], self.y[i], {"groups": self.hospital[i]}
        if self.form == "dict":
            return {"x": self.x[i], "y": self.y[i], "hospital": self.hospital[i], "id": f"p{i}"}
        return self.x[i], self.y[i]


class Classifier(pl.LightningModule):
    def __init__(self, outputs=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        scores = self(x)
        if scores.shape[1] > 1:
            return nn.functional.cross_entropy(scores, y)
        return nn.functional.binary_cross_entropy_with_logits(scores[:, 0], y.float())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch["y"] if isinstance(batch, dict) else batch[1]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def loaders(form="meta", batch=64, shuffle=False):
    data = Patients(form=form)
    return DataLoader(data, batch, shuffle=True), DataLoader(data, batch, shuffle=shuffle)


def fitted(kit, plugin, form="meta", outputs=1, epochs=1, shuffle=False, **options):
    module = Classifier(outputs)
    train, val = loaders(form, shuffle=shuffle)
    trainer = kit.trainer(plugin, max_epochs=epochs, **options)
    trainer.fit(module, train, val)
    return module, trainer


def expected(module, variant=None, data=None):
    data = data or Patients()
    with torch.no_grad():
        scores = module.eval()(data.x)
    p = scores.sigmoid()[:, 0] if scores.shape[1] == 1 else scores.softmax(1)[:, 1]
    return audit(data.y, p, sensitive_features=pd.Series(data.hospital, name="group"))


def assert_same(found, wanted):
    exact = [c for c in wanted.columns if c not in ("roc_auc", "calibration_error")]
    assert found.index.tolist() == wanted.index.tolist()
    assert (found[exact].fillna(-1) == wanted[exact].fillna(-1)).all().all()
    # In a bin of width 1/1000 scores are ties; a model that is unsure has many of them.
    assert (found["roc_auc"] - wanted["roc_auc"]).abs().max() < 5e-3
    assert (found["calibration_error"] - wanted["calibration_error"]).abs().max() < 1e-6


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


@pytest.mark.parametrize(
    ("source", "form", "name"),
    [
        (None, "meta", "group"),
        ("hospital", "dict", "hospital"),
        ("hospital", "plain", "hospital"),  # an attribute of the data set
        (["hospital"], "dict", "hospital"),
        (pd.Series(Patients().hospital), "plain", "group"),
        (pd.DataFrame({"ward": Patients().hospital}, index=[f"p{i}" for i in range(569)]), "dict", "ward"),
        (dict(enumerate(Patients().hospital)), "plain", "group"),
        (lambda batch: {"site": batch["hospital"]}, "dict", "site"),
    ],
)
def test_groups_come_from_wherever_they_are(kit, source, form, name):
    plugin = BiasAudit(source, variants=False)
    module, _ = fitted(kit, plugin, form=form)
    frame = plugin.results["validate"]["dense"].to_frame()
    assert frame.index.name == name
    assert_same(frame, expected(module).to_frame())


def test_a_table_on_disk_is_joined_by_id(kit):
    path = kit.path / "wards.csv"
    data = Patients()
    shuffled = np.random.default_rng(0).permutation(569)
    pd.DataFrame({"id": [f"p{i}" for i in shuffled], "ward": data.hospital[shuffled]}).to_csv(path, index=False)
    plugin = BiasAudit(str(path), variants=False)
    module, _ = fitted(kit, plugin, form="dict")
    assert_same(plugin.results["validate"]["dense"].to_frame(), expected(module).to_frame())


def test_an_attribute_is_found_through_subsets(kit):
    rows = list(range(500, 100, -3))
    data = Patients(form="plain")
    plugin = BiasAudit("hospital", variants=False)
    module = Classifier()
    kit.trainer(plugin).validate(module, DataLoader(Subset(data, rows), 32), verbose=False)
    assert_same(plugin.results["validate"]["dense"].to_frame(), expected(module, data=Patients(rows)).to_frame())


def test_a_side_table_with_repeated_ids_is_refused():
    with pytest.raises(PluginError, match="repeated ids, such as 3"):
        BiasAudit(pd.Series(["a", "b", "c"], index=[3, 3, 4]))


def test_a_side_table_with_gaps_is_refused(kit):
    with pytest.raises(PluginError, match="no row for"):
        fitted(kit, BiasAudit(pd.Series(["a"] * 500), variants=False), form="plain")


@pytest.mark.parametrize(
    ("source", "form", "message"),
    [(None, "plain", "found no groups"), ("sex", "dict", "no 'sex'"), ("sex", "plain", "no 'sex'")],
)
def test_missing_groups_say_where_they_were_looked_for(kit, source, form, message):
    with pytest.raises(PluginError, match=message):
        fitted(kit, BiasAudit(source, variants=False), form=form)


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


SHUFFLED = pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")


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
    kit.trainer(plugin).validate(Classifier(), DataLoader(Patients(), 64), verbose=False)
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
    with pytest.raises(PluginError, match=r"baseline is '0.7', and the versions are \['0.5'\]"):
        fitted(kit, BiasAudit(variants=[0.5], baseline="0.7"))


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
    fitted(kit, plugin)
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
    assert written["schema"] == 1
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
    assert plugin.results["validate"]["0.5"].evidence.size.sum() == 569


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
    kit.trainer(BiasAudit()).fit(Classifier(), loaders()[0])
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


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
def test_two_processes_count_every_row_once_and_bit_equal_to_one(kit):
    class Dumping(BiasAudit):
        def on_validation_end(self, trainer, pl_module):
            if trainer.is_global_zero:
                torch.save(
                    {
                        name: (
                            r.evidence.histogram.counts,
                            r.evidence.histogram.mass,
                            r.comparison and r.comparison.pairs,
                        )
                        for name, r in self.results["validate"].items()
                    },
                    kit.path / f"world{trainer.world_size}.pt",
                )

    class Exact(Classifier):
        """Sums that have no rounding, so that scores do not depend on how rows are dealt into batches."""

        def __init__(self):
            super().__init__()
            self.net = nn.Linear(30, 1)
            with torch.no_grad():
                self.net.weight.copy_((self.net.weight * 64).round() / 16)
                self.net.bias.zero_()

        def validation_step(self, batch, batch_idx):
            self.loss(batch)

    data = Patients()  # 569 rows: two processes repeat one
    data.x = (data.x * 8).round() / 8
    for world in (1, 2):
        plugin = Dumping(variants=[0.9])
        plugin.name = "bias_audit"
        options = {}
        if world == 2:
            strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
            options = {"strategy": strategy, "devices": 2}
        kit.trainer(plugin, **options).validate(Exact(), DataLoader(data, 50), verbose=False)
    one, two = (torch.load(kit.path / f"world{w}.pt", weights_only=False) for w in (1, 2))
    assert list(one) == list(two) == ["dense", "0.9"]
    for name in one:
        for a, b in zip(one[name], two[name], strict=True):
            assert (a is None and b is None) or (a == b).all()
    assert two["dense"][0].sum() == 569
