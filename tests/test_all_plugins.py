"""Plugins that know nothing of each other, in one run."""

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from groundwire import Plugins, Report, export
from groundwire_aol import AOL
from groundwire_bias_audit import BiasAudit
from groundwire_cram import CrAM
from groundwire_flea import FLEA
from groundwire_limes import LIMES

images, labels = load_digits(return_X_y=True)
X, Y = torch.tensor(images[:500] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels[:500])


class Digits(Dataset):
    """Images with a group, a source and an hour."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i], Y[i], {"groups": i % 2, "source": f"site {i % 5}", "time": i // 100 * 3600}


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        layers = (
            nn.Conv2d(1, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 2, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 10),
        )
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def limes():
    return LIMES(time="time")


TOGETHER = {
    "pruned versions are audited": lambda: [CrAM(0.5), BiasAudit(groups="groups")],
    "Lipschitz and compressible": lambda: [AOL(), CrAM(0.5)],
    "Lipschitz and audited": lambda: [AOL(), BiasAudit(groups="groups")],
    "drift, with certificates": lambda: [limes(), AOL()],
    "drift, compressible and audited": lambda: [limes(), CrAM(0.5), BiasAudit(groups="groups")],
    "filtered, compressible and audited": lambda: [
        FLEA(source="source", groups="groups", permutations=0), CrAM(0.5), BiasAudit(groups="groups")
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # each plugin's own tests look at its warnings
@pytest.mark.parametrize("which", TOGETHER)
def test_plugins_work_side_by_side_and_leave_a_plain_model(which, tmp_path):
    torch.manual_seed(0)
    callbacks, net = TOGETHER[which](), Net()
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=callbacks,
        accelerator="cpu",
        logger=pl.loggers.CSVLogger(tmp_path, name="", version=""),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Digits(), 50)
    trainer.fit(net, loader, loader)
    assert len(trainer.callbacks) == len(callbacks)
    report = Report.read(tmp_path)
    assert {f.plugin for f in report.findings} & {callback.name for callback in callbacks}
    assert report.path.exists()
    plain = export(net)
    assert plain(X[:4]).shape == (4, 10)
    assert not any("groundwire" in key for key in plain.state_dict())


def test_versions_are_evaluated_with_the_correction_of_each_hour_not_of_the_last_one():
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[limes(), CrAM(evaluate_every=1), Plugins(report=False)],
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(Net(), DataLoader(Digits(), 20), DataLoader(Digits(), 50))
    metrics = trainer.callback_metrics
    assert metrics["cram/acc@dense"] == pytest.approx(float(metrics["acc"]))
    assert 0 < float(metrics["acc"]) < 1
