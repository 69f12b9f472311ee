"""A run whose plugin does nothing is as one without groundwire, also for who saves, copies and stores."""

import copy
import io

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from programs_harness import Evaluates, Idle, Replay
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from groundwire import Plugins
from groundwire_bias_audit import BiasAudit


class Module(pl.LightningModule):
    """At the level of a file, so that it can be pickled."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def saved(trainer):
    file = io.BytesIO()
    torch.save(trainer, file)
    return file.getbuffer().nbytes


@pytest.mark.parametrize(
    "plugins",
    [
        pytest.param(list, id="bare"),
        pytest.param(lambda: [Idle()], id="idle"),
    ],
)
def test_a_trainer_is_saved_after_fit(kit, plugins):
    trainer = kit.fit(Module(), *plugins())
    assert saved(trainer) > 1000


class Copies(pl.Callback):
    def __init__(self, moment):
        self.moment, self.copies = moment, []

    def __deepcopy__(self, memo):
        return type(self)(self.moment)

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self._at("batch", trainer)

    def on_validation_epoch_end(self, trainer, pl_module):
        self._at("validation", trainer)

    def on_train_end(self, trainer, pl_module):
        self._at("end", trainer)

    def _at(self, moment, trainer):
        if moment == self.moment:
            self.copies.append(copy.deepcopy(trainer.callbacks))


@pytest.mark.parametrize("moment", ["batch", "validation", "end"])
def test_callbacks_are_copied_during_a_run(kit, moment):
    copies = Copies(moment)
    plugin = Idle()
    kit.fit(kit.Net(), plugin, copies, val=kit.loader())
    assert copies.copies
    names = [type(callback).__name__ for callback in copies.copies[-1]]
    assert [name for name in names if name in ("Idle", "Copies")] == ["Idle", "Copies"]


class OwnIO(TorchCheckpointIO):
    """A user's storage, with attributes that they ask for later."""

    def __init__(self, bucket):
        self.bucket, self.calls = bucket, []

    @property
    def address(self):
        return f"store://{self.bucket}"

    def save_checkpoint(self, checkpoint, path, storage_options):  # no default, as some write it
        self.calls.append(("save", storage_options))
        super().save_checkpoint(checkpoint, path)

    def flush(self):
        self.calls.append(("flush", None))


def test_storage_options_reach_the_users_storage(kit):
    own = OwnIO("data")
    trainer = kit.fit(kit.Net(), Idle(), plugins=[own])
    trainer.save_checkpoint(kit.path / "a.ckpt", weights_only=False, storage_options={"tier": 1})
    assert own.calls == [("save", {"tier": 1})]


def test_a_storage_without_a_default_gets_none(kit):
    own = OwnIO("data")
    trainer = kit.fit(kit.Net(), Idle(), plugins=[own])
    trainer.save_checkpoint(kit.path / "a.ckpt", weights_only=False)
    assert own.calls == [("save", None)]
    assert "groundwire" in torch.load(kit.path / "a.ckpt", weights_only=True)


@pytest.mark.parametrize("moment", ["during", "after"])
def test_the_users_storage_is_what_it_was(kit, moment):
    own, seen = OwnIO("data"), []

    def look(trainer):
        storage = trainer.strategy.checkpoint_io
        storage.flush()
        storage.bucket = "other"
        seen.append((isinstance(storage, OwnIO), storage.address, storage.bucket))

    class Looks(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            if moment == "during":
                look(trainer)

    trainer = kit.fit(kit.Net(), Idle(), Looks(), plugins=[own])
    if moment == "after":
        look(trainer)
    assert seen == [(True, "store://other", "other")]
    assert own.bucket == "other"
    assert ("flush", None) in own.calls


class Accelerated(SingleDeviceStrategy):
    """Stands for strategies whose setter takes a storage of their own kind only."""

    @property
    def checkpoint_io(self):
        if self._checkpoint_io is None:
            self._checkpoint_io = AcceleratedIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io):
        if io is not None and type(io) is not AcceleratedIO:
            raise TypeError(f"this strategy takes an AcceleratedIO, not a {type(io).__name__}")
        self._checkpoint_io = io


class AcceleratedIO(TorchCheckpointIO):
    pass


def test_a_strategy_that_takes_its_own_storage_only(kit):
    trainer = kit.fit(kit.Net(), Idle(), strategy=Accelerated(device="cpu"))
    trainer.save_checkpoint(kit.path / "a.ckpt", weights_only=False)
    assert isinstance(trainer.strategy.checkpoint_io, AcceleratedIO)
    assert "groundwire" in torch.load(kit.path / "a.ckpt", weights_only=True)


def test_an_asynchronous_storage(kit):
    storage = AsyncCheckpointIO()
    trainer = kit.fit(kit.Net(), Idle(), plugins=[storage])
    trainer.save_checkpoint(kit.path / "a.ckpt", weights_only=False)
    storage.teardown()
    assert "groundwire" in torch.load(kit.path / "a.ckpt", weights_only=True)


class Collected:
    """Metrics that share their counts: torchmetrics computes them once a group, if nobody asks in between."""

    def build(self):
        of = {"average": "macro", "num_classes": 3}
        self.metrics = MetricCollection([MulticlassAccuracy(**of), MulticlassPrecision(**of), MulticlassRecall(**of)])
        self.seen = self.metrics.clone(prefix="val_")
        self.groups = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.seen.update(self(batch[0]), batch[1])
        self.log_dict(self.seen, on_step=False, on_epoch=True)
        self.groups.append((len(self.seen.compute_groups), self.seen._state_is_copy))

    def training_step(self, batch, batch_idx):
        self.metrics.update(self(batch[0]), batch[1])
        self.log_dict(self.metrics, on_step=False, on_epoch=True)
        self.groups.append((len(self.metrics.compute_groups), self.metrics._state_is_copy))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "plugin",
    [
        Idle,
        Replay,
        Evaluates,
        lambda: BiasAudit(lambda batch: batch[1] % 2, [0.5], every_n_epochs=1),
    ],
    ids=["idle", "replay", "evaluation", "BiasAudit"],
)
def test_compute_groups_of_metrics_stay(kit, plugin):
    class Module(Collected, kit.Net):
        def __init__(self):
            super().__init__()
            self.build()

    seen, metrics = [], []
    for plugins in ([], [Plugins([plugin()], report=False)]):
        module = Module()
        trainer = kit.fit(module, *plugins, val=kit.loader(), max_epochs=2, num_sanity_val_steps=0)
        seen.append(module.groups)
        metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert seen[0] == seen[1]
    assert {name: metrics[1][name] for name in metrics[0]} == metrics[0]


def test_a_collection_that_is_logged_is_evaluated_by_the_names_that_lightning_gives(kit):
    class Module(Collected, kit.Net):
        def __init__(self):
            super().__init__()
            self.build()

    plugin = Evaluates()
    trainer = kit.fit(Module(), plugin, val=kit.loader())
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    assert plugin.found[-1].metrics == pytest.approx(metrics)
