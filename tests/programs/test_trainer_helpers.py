"""What surrounds a fit: tuners, several fits, resumes, skipped losses, compiled modules; without plugins and with."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from programs_harness import Evaluates, Idle, Replay
from programs_loops import SimulatedScaler
from torch import nn
from torch.utils.data import DataLoader

from groundwire import Plugins

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`.*"),
    pytest.mark.filterwarnings("ignore:.*LearningRateFinder.*"),
]
PLUGINS = pytest.mark.parametrize("plugin", [Idle, Replay], ids=["idle", "replay"])


class Tuned:
    """With a learning rate and a batch size that others may set, and loaders of its own."""

    def __init__(self):
        super().__init__()
        self.lr, self.batch_size, self.steps = 0.05, 4, 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def tuned(kit):
    class Module(Tuned, kit.Net):
        def train_dataloader(self):
            return DataLoader(kit.data(), self.batch_size)

        def val_dataloader(self):
            return kit.loader()

    return Module()


def same(kit, program, plugin):
    """``program(*plugins)`` gives a module; without and with ``plugin`` it is the same one."""
    modules = [program(*plugins) for plugins in ([], [plugin()])]
    assert kit.difference(*(module.state_dict() for module in modules)) == 0.0
    values = [{k: v for k, v in vars(module).items() if isinstance(v, int | float | str)} for module in modules]
    assert values[0] == values[1]
    return modules


@PLUGINS
def test_a_tuner_that_searches_for_a_learning_rate(kit, plugin):
    def program(*plugins):
        module, trainer = tuned(kit), kit.trainer(*plugins, max_epochs=2)
        Tuner(trainer).lr_find(module, num_training=8)
        trainer.fit(module)
        return module

    same(kit, program, plugin)


@PLUGINS
def test_a_tuner_that_searches_for_a_batch_size(kit, plugin):
    def program(*plugins):
        module, trainer = tuned(kit), kit.trainer(*plugins, max_epochs=2)
        Tuner(trainer).scale_batch_size(module, max_trials=1, steps_per_trial=1)
        trainer.fit(module)
        return module

    assert same(kit, program, plugin)[0].batch_size != 4


@PLUGINS
def test_the_callback_that_searches_for_a_learning_rate(kit, plugin):
    def program(*plugins):
        module = tuned(kit)
        kit.trainer(*plugins, LearningRateFinder(num_training_steps=8), max_epochs=1).fit(module)
        return module

    same(kit, program, plugin)


@pytest.mark.parametrize("plugin", [Replay])
def test_the_callback_that_searches_for_a_batch_size(kit, plugin):
    def program(*plugins):
        module = tuned(kit)
        kit.trainer(*plugins, BatchSizeFinder(max_trials=1, steps_per_trial=1), max_epochs=1).fit(module)
        return module

    same(kit, program, plugin)


@PLUGINS
def test_several_fits_of_one_trainer(kit, plugin):
    def program(*plugins):
        module, trainer = tuned(kit), kit.trainer(*plugins)
        for epochs in (1, 2, 4):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module)
            trainer.validate(module, kit.loader(), verbose=False)
        assert trainer.current_epoch == 4
        return module

    same(kit, program, plugin)


@PLUGINS
def test_several_trainers_of_one_module_and_one_plugin(kit, plugin):
    def program(*plugins):
        module = tuned(kit)
        for _ in range(3):
            kit.trainer(*plugins).fit(module)
        return module

    same(kit, program, plugin)


class Finetuned:
    """A backbone that joins later, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        del self.net

    def forward(self, x):
        return self.head(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)


@PLUGINS
@pytest.mark.parametrize("at", [1, 2, 3], ids=lambda at: f"resumed at epoch {at}")
def test_a_backbone_that_joins_later_is_resumed(kit, plugin, at):
    class Module(Finetuned, kit.Net):
        pass

    def program(*plugins):
        def trainer(epochs):
            joins = BackboneFinetuning(2, lambda epoch: 1.5, backbone_initial_lr=0.01)
            return kit.trainer(*copy.deepcopy(plugins), joins, max_epochs=epochs)

        first = trainer(at)
        first.fit(Module(), kit.loader())
        first.save_checkpoint(kit.path / "a.ckpt", weights_only=False)
        module, second = Module(), trainer(4)
        second.fit(module, kit.loader(), ckpt_path=kit.path / "a.ckpt")
        assert len(second.optimizers[0].param_groups) == 2
        return module

    same(kit, program, plugin)


@PLUGINS
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("skipped", [{0}, {2, 3}, {0, 1, 2, 3, 4}], ids=str)
def test_a_loss_of_none_under_a_scaler(kit, plugin, accumulate, skipped):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in skipped else loss

    def program(*plugins):
        module = Module()
        kit.fit(module, *plugins, plugins=[SimulatedScaler()], accumulate_grad_batches=accumulate)
        return module

    same(kit, program, plugin)


def compile_net(module):
    module.net = torch.compile(module.net, backend="eager")
    return module


def compile_in_place(module):
    module.net.compile(backend="eager")
    return module


def compile_forward(module):
    module.forward = torch.compile(module.forward, backend="eager")
    return module


@pytest.mark.parametrize("plugin", [Idle, Replay, Evaluates], ids=["idle", "replay", "evaluation"])
@pytest.mark.parametrize("compiled", [compile_net, compile_in_place, compile_forward], ids=lambda f: f.__name__)
def test_a_compiled_part(kit, plugin, compiled):
    def program(*plugins):
        module = compiled(kit.Net())
        kit.fit(module, *([Plugins(plugins, report=False)] if plugins else []), val=kit.loader(), max_epochs=2)
        return module

    same(kit, program, plugin)


@pytest.mark.parametrize("plugin", [Idle, Replay], ids=["idle", "replay"])
def test_a_compiled_lightning_module(kit, plugin):
    class Module(kit.Net):
        def training_step(self, batch, batch_idx):  # Lightning and torch cannot compile self.log
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def program(*plugins):
        module = Module()
        kit.fit(torch.compile(module, backend="eager"), *plugins)
        return module

    same(kit, program, plugin)


def test_a_learning_rate_that_a_tuner_found_is_used_with_a_plugin_in_the_run(kit):
    module, trainer = tuned(kit), kit.trainer(Idle(), max_epochs=1)
    finder = Tuner(trainer).lr_find(module, num_training=8)
    assert module.lr == finder.suggestion() or finder.suggestion() is None
    trainer.fit(module)
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.lr
    assert isinstance(module, pl.LightningModule)
