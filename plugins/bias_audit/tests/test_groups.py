"""Groups come from the batch, from its data set, or from a table, wherever people keep them."""

import numpy as np
import pandas as pd
import pytest
from bias_audit_patients import Classifier, Patients, assert_same, expected, fitted
from torch.utils.data import DataLoader, Subset

from groundwire import PluginError
from groundwire_bias_audit import BiasAudit


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


def test_groups_that_are_missing_are_told_before_training(kit):
    class Trains(Classifier):
        steps = 0

        def training_step(self, *arguments):
            self.steps += 1
            return super().training_step(*arguments)

    module, loader = Trains(), DataLoader(Patients(form="plain"), 32)
    with pytest.raises(PluginError, match="found no groups"):
        kit.fit(module, BiasAudit(variants=False), loader=loader, val=loader, num_sanity_val_steps=1)
    assert module.steps == 0
