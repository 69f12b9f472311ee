"""BiasAudit: labels and batches as people have them."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from groundwire import Fields, PluginError, Plugins, Report
from groundwire_bias_audit import BiasAudit


def groups(batch):
    return batch["x"][:, 0] > 0 if isinstance(batch, dict) else batch[0][:, 0] > 0


class Rows(Dataset):
    """Rows as dicts, the label under a name of the user's own."""

    def __init__(self, kit, name):
        self.data, self.name = kit.data(), name

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return {"x": x, self.name: y}


def named(kit, name):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["x"], batch[name]), batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step((batch["x"], batch[name]), batch_idx)

    return Module(), DataLoader(Rows(kit, name), 8)


@pytest.mark.xfail(strict=True, reason="item 23: missing targets end in a zero-dimensional array")
def test_a_label_of_an_unknown_name_is_asked_for(kit):
    module, loader = named(kit, "diagnosis")
    with pytest.raises(PluginError, match=r"(?s)label.*fields="):
        kit.fit(module, BiasAudit(groups), loader=loader, val=loader)


def test_it_can_be_told(kit):
    module, loader = named(kit, "diagnosis")
    audit = BiasAudit(groups)
    told = Plugins([audit], fields=lambda batch: Fields(batch["x"], batch["diagnosis"]), report=False)
    kit.fit(module, told, loader=loader, val=loader)
    assert len(audit.results["validate"]["dense"].to_frame()) == 2


class Several:
    """Several labels a row in validation, the index of the main one in training."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1].float()))


def several_labels(kit, rows=40):
    x, y = kit.data(rows).tensors
    return TensorDataset(x, nn.functional.one_hot(y, 3) | (x[:, :3] > 1).long())


@pytest.mark.parametrize(
    "highest",
    [
        pytest.param(
            1,
            id="indices that look like one binary label",
            marks=pytest.mark.xfail(strict=True, reason="item 23: counts of one label are taken for those of several"),
        ),
        pytest.param(2, id="indices up to 2"),
    ],
)
def test_several_labels_in_validation_beside_one_in_training(kit, highest):
    class Module(Several, kit.Net):
        pass

    x, y = kit.data().tensors
    train = DataLoader(TensorDataset(x, y.clamp(max=highest)), 8)
    audit = BiasAudit(groups)
    kit.fit(Module(), Plugins([audit], report=False), loader=train, val=DataLoader(several_labels(kit), 8))
    assert len(audit.results["validate"]["dense"].to_frame()) == 3 * 2  # labels by groups


MASKED = 7


@pytest.mark.parametrize("label", [-100, -1])
@pytest.mark.xfail(strict=True, reason="item 23: a masked label is refused as one of no class")
def test_rows_without_a_label_are_left_out_and_counted(kit, label):
    class Module(kit.Net):
        def validation_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1], ignore_index=label, reduction="sum")
            self.log("val_loss", loss / len(batch[0]))

    x, y = kit.data().tensors
    masked = y.clone()
    masked[torch.arange(MASKED) * 5] = label
    audit = BiasAudit(groups, variants=False)
    fitted = Module()
    kit.fit(fitted, Plugins([audit], report_dir=kit.path), val=DataLoader(TensorDataset(x, masked), 8))
    found = audit.results["validate"]["dense"]

    alone = BiasAudit(groups, variants=False)
    rows = TensorDataset(x[masked == y], y[masked == y])
    kit.trainer(Plugins([alone], report=False)).validate(fitted, DataLoader(rows, 8), verbose=False)
    expected = alone.results["validate"]["dense"]
    assert found.to_frame().equals(expected.to_frame())
    counted = [f for f in Report.read(kit.path).findings if f.plugin == "bias_audit" and f.value == MASKED]
    assert counted


class Views(Dataset):
    """Two versions of each row, to be averaged: test-time augmentation."""

    def __init__(self, kit):
        self.data = kit.data()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return torch.stack([x, -x]), y


@pytest.mark.parametrize("targets", ["labels", "no labels"])
@pytest.mark.xfail(strict=True, reason="item 23: scores of all versions of a row are taken for rows")
def test_a_stacked_batch_is_refused_with_a_way_out(kit, targets):
    class Module(kit.Net):
        def forward(self, x):
            return self.net(x.flatten(0, -2)).view(*x.shape[:-1], -1).mean(-2) if x.dim() > 2 else self.net(x)

        def validation_step(self, batch, batch_idx):
            self.log("acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def told(batch):
        return Fields(batch[0], batch[1] if targets == "labels" else None)

    loader = DataLoader(Views(kit), 8)
    audit = BiasAudit(lambda batch: batch[0].flatten(1)[:, 0] > 0)
    with pytest.raises(PluginError, match=r"(?s)->.*(head=|average|mean|fields=)"):
        kit.trainer(Plugins([audit], fields=told, report=False)).validate(Module(), loader, verbose=False)
