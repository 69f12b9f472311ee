"""What a run gives its plugins: fields of a batch, names in the logs, a seed for each step."""

from importlib import import_module

import lightning.pytorch as pl
import pytest
from torch import nn

from groundwire import Fields, Plugin, PluginError, Plugins, hookimpl
from groundwire.host import host_of


def test_fields_come_from_the_user_then_the_module_then_core(kit):
    found = []

    class Asks(Plugin):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.append(host_of(trainer).run.fields(batch).source)

    class Module(kit.Net):
        @hookimpl
        def gw_fields(self, batch):
            return Fields(batch[0], batch[1], source="module")

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return kit.loader()

        @hookimpl
        def gw_fields(self, batch):
            return Fields(batch[0], source="datamodule")

    kit.fit(kit.Net(), Asks(), max_steps=1)
    kit.fit(Module(), Asks(), max_steps=1)
    kit.fit(Module(), Plugins([Asks()], fields=lambda b: Fields(b[0], source="given")), max_steps=1)
    kit.fit(Module(), Plugins([Asks()], fields=lambda b: None), max_steps=1)
    kit.trainer(Asks(), max_steps=1).fit(kit.Net(), datamodule=Data())
    assert found == [None, "module", "given", "module", "datamodule"]


def test_a_batch_nobody_can_read_is_named(kit):
    class Asks(Plugin):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            host_of(trainer).run.fields({"foo": 1, "bar": 2})

    with pytest.raises(PluginError, match=r"keys \['foo', 'bar'\].*Plugins\(fields="):
        kit.fit(kit.Net(), Asks(), max_steps=1)


def test_run_log_prefixes_the_plugins_name_everywhere(kit):
    class Logs(Plugin):
        name = "logs"

        @hookimpl
        def gw_gradient(self, step, run):
            run.log("in_step", 1.0)

        @hookimpl
        def gw_findings(self, run):
            run.log(f"at_{run.stage}", 2.0)

    logger = pl.loggers.CSVLogger(kit.path, name="", version="")
    trainer = kit.fit(kit.Net(), Logs(), val=kit.loader(), logger=logger, log_every_n_steps=1)
    assert {"logs/in_step", "logs/at_validate"} <= set(trainer.callback_metrics)
    assert "logs/at_train" in (kit.path / "metrics.csv").read_text()


def test_step_seed_depends_on_the_step_and_the_global_seed_only(kit, monkeypatch):
    seeds = []

    class Look(Plugin):
        @hookimpl
        def gw_gradient(self, step, run):
            seeds.append(run.step_seed)

    kit.fit(kit.Net(), Look())
    kit.fit(kit.Net(), Look())
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    kit.fit(kit.Net(), Look())
    assert seeds[:5] == seeds[5:10]
    assert len(set(seeds)) == 10


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_run_log_works_where_lightning_forbids_it_in_both_packages(kit, package):
    package = import_module(package)
    got = []

    class Logger(package.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            got.append(metrics)

    class Logs(Plugin):
        @hookimpl
        def gw_findings(self, run):
            run.log("at_end", 2.0)

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = kit.network()

        training_step = lambda self, batch: nn.functional.cross_entropy(self.net(batch[0]), batch[1])  # noqa: E731
        configure_optimizers = kit.Net.configure_optimizers

    kit.fit(Module(), Logs(), package=package, logger=Logger(kit.path))
    assert {"logs/at_end": 2.0} in got


def test_run_log_weights_batches_as_lightning_does(kit):
    class Logs(Plugin):
        score_stages = ("validate",)

        @hookimpl
        def gw_scores(self, scores, run):
            run.log("mean", scores.mean())

    class Module(kit.Net):
        def validation_step(self, batch, batch_idx):
            self.log("mean", self(batch[0]).mean())

    from torch.utils.data import DataLoader

    trainer = kit.trainer(Logs())
    trainer.validate(Module(), DataLoader(kit.data(9), 8), verbose=False)
    assert float(trainer.callback_metrics["logs/mean"]) == pytest.approx(float(trainer.callback_metrics["mean"]))
