"""What ``_lightning.py`` takes for granted about Lightning. A release that moves something fails here, by name."""

import inspect
from importlib import import_module

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from groundwire import _lightning
from groundwire.modules import overrides
from groundwire.undo.loggers import MutedLogger


@pytest.fixture
def running(kit):
    """A Trainer and a module in the middle of a fit."""
    found = {}

    class Look(pl.Callback):
        def __init__(self, look):
            self.look = look

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found["result"] = self.look(trainer, pl_module, batch, batch_idx)

    def run(look, module=None, **options):
        kit.fit(module or kit.Net(), Look(look), max_steps=1, **options)
        return found["result"]

    return run


def test_names_on_modules():
    assert {"_parameters", "_buffers", "_modules", "training"} <= _lightning.MODULE_NAMES
    assert {"_trainer", "_current_fx_name", "_metric_attributes"} <= _lightning.LIGHTNING_MODULE_NAMES


def test_rng_states_come_back():
    states = _lightning.collect_rng_states()
    first = torch.rand(1)
    _lightning.set_rng_states(states)
    assert torch.equal(first, torch.rand(1))


def test_step_arguments_follow_the_users_signature(kit, running):
    assert running(lambda t, m, b, i: len(_lightning.step_arguments(t, b, i))) == 2
    one = type("One", (kit.Net,), {"training_step": lambda self, batch: kit.Net.training_step(self, batch, 0)})
    assert running(lambda t, m, b, i: len(_lightning.step_arguments(t, b, i)), one()) == 1


def test_closure_loss_is_lightnings_rule():
    from lightning.pytorch.loops.optimization.automatic import ClosureResult

    for output in (torch.tensor(3.0), {"loss": torch.tensor(3.0), "x": 1}):
        theirs = ClosureResult.from_training_step_output(output, 4).closure_loss
        assert torch.equal(theirs, _lightning.closure_loss(output) / 4)
    assert _lightning.closure_loss(None) is None


def test_the_action_before_a_step_is_called_right_before_it(kit):
    calls = []

    class Module(kit.Net):
        def on_train_batch_start(self, batch, batch_idx):
            calls.append("module")

        def training_step(self, batch, batch_idx):
            calls.append("step")
            assert len(_lightning.step_arguments(trainer, batch, batch_idx)) == 2
            return super().training_step(batch, batch_idx)

    trainer = kit.trainer(max_steps=1)
    with _lightning.before_training_step(trainer, lambda batch, batch_idx: calls.append("action")):
        trainer.fit(Module(), kit.loader())
    assert calls == ["module", "action", "step"]
    assert "_build_kwargs" not in vars(trainer.fit_loop.epoch_loop)


def test_loggers_can_be_replaced_and_come_back(kit):
    logger = pl.loggers.CSVLogger(kit.path)
    trainer = kit.trainer(logger=logger)
    with _lightning.loggers_replaced(trainer, MutedLogger):
        [mute] = trainer.loggers
        assert list(mute.experiment.config.update({"a": 1})) == []
        assert mute.log_metrics({"a": 1.0}) is None
        assert isinstance(mute, pl.loggers.CSVLogger)
        assert trainer.log_dir == logger.log_dir
    assert trainer.loggers == [logger]


def test_state_keys_are_spelled_as_lightning_does():
    class Mine(pl.Callback):
        @property
        def state_key(self):
            return self._generate_state_key(name="a")

    assert _lightning.state_key(Mine(), "a") == Mine().state_key
    assert "Mine" in Mine().state_key


def test_the_hooks_that_can_be_passed_by_are_lightnings_own_and_called_in_one_way(kit):
    hooks = set(_lightning.CALLBACK_HOOKS)
    assert hooks <= set(vars(pl.Callback))
    others = {"setup", "teardown", "on_exception", "on_fit_start", "on_fit_end", "state_dict", "load_state_dict"}
    others |= {"on_save_checkpoint", "on_load_checkpoint", "state_key", "on_train_batch_start"}
    known = {name for name in vars(pl.Callback) if name.startswith("on_")}
    assert known - hooks - others == set()
    empty = pl.Callback()
    _lightning.skip_hooks(empty, *hooks)
    module = kit.Net()
    trainer = kit.fit(module, empty, val=kit.loader(), num_sanity_val_steps=1)
    trainer.validate(module, kit.loader(), verbose=False)
    trainer.test(module, kit.loader(), verbose=False)
    trainer.predict(module, kit.loader())


def test_log_of_nested_modules_is_redirected(kit):
    class Outer(kit.Net):
        def __init__(self):
            super().__init__()
            self.inner = kit.Net()

    found, module = [], Outer()
    with _lightning.logging_to(module, lambda name, value, **kw: found.append(name)):
        module.log("a", 1)
        module.inner.log_dict({"b": 1, "c": 2})
    assert found == ["a", "b", "c"]
    assert "log" not in vars(module)


def test_the_evaluation_loop_in_use(kit):
    found = {}

    class Look(pl.Callback):
        def on_validation_batch_start(self, trainer, *args):
            found[trainer.state.fn.value] = _lightning.evaluation_loop(trainer)._data_fetcher is not None

        on_test_batch_start = on_validation_batch_start

    trainer = kit.fit(kit.Net(), Look(), val=kit.loader())
    trainer.validate(kit.Net(), kit.loader(), verbose=False)
    trainer.test(kit.Net(), kit.loader(), verbose=False)
    assert found == {"fit": True, "validate": True, "test": True}


def test_batches_are_moved_as_the_loops_do(kit, running):
    class Module(kit.Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 1, batch[1]]

    batch = next(iter(kit.loader()))
    moved = running(lambda t, m, b, i: _lightning.move_batch(t, batch, 0), Module())
    assert torch.equal(moved[0], batch[0] + 1)


def test_launchers_and_averaging_callbacks_are_known_by_name(kit):
    assert _lightning.spawns_processes(kit.trainer(strategy="ddp_fork", devices=1))
    assert not _lightning.spawns_processes(kit.trainer())
    assert _lightning.is_averaging(EMAWeightAveraging())
    assert _lightning.is_averaging(StochasticWeightAveraging(0.1))
    assert not _lightning.is_averaging(pl.Callback())


def test_ddp_has_the_names_that_are_used():
    assert "gradient_as_bucket_view" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
    assert callable(DDPStrategy.block_backward_sync)
    assert callable(DDPStrategy.pre_backward)


def test_the_precision_plugin_has_a_scaler_in_fp16_only(kit):
    from lightning.pytorch.plugins import MixedPrecision

    assert _lightning.gradient_scaler(kit.trainer()) is None
    plugin = MixedPrecision("16-mixed", "cuda", scaler=torch.amp.GradScaler("cpu"))
    assert isinstance(plugin.scaler, torch.amp.GradScaler)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_overrides_are_told_from_both_packages_own_methods(package):
    base = import_module(package).LightningModule
    own = type("Own", (base,), {"setup": lambda self, stage: None})()
    assert overrides(own, "setup")
    assert not overrides(own, "configure_model")


def test_weights_are_loaded_after_on_load_checkpoint(kit):
    order = []

    class Module(kit.Net):
        def load_state_dict(self, *args, **kwargs):
            order.append("load_state_dict")
            return super().load_state_dict(*args, **kwargs)

    path = kit.path / "x.ckpt"
    kit.fit(Module()).save_checkpoint(path)
    with _lightning.before_restoring(Module, lambda module: order.append("before")):
        Module.load_from_checkpoint(path)
    assert order == ["before", "load_state_dict"]
    assert "on_load_checkpoint" not in vars(Module)


def test_users_reach_their_optimizers_through_lightnings_wrapper(kit, running):
    pairs = running(lambda t, m, b, i: [(raw, face, m, m.optimizers()) for raw, face in _lightning.zeroing_objects(t)])
    raw, _, module, wrapper = pairs[0]
    assert [face for _, face, _, _ in pairs] == [raw, wrapper, module]
    assert wrapper is not raw


def test_the_training_loader_is_asked_for_through_setup_data(kit):
    asked, reload = [], []

    def choose(loader):
        asked.append(loader)
        if len(asked) == 1:
            reload.append(trainer.current_epoch)
        return loader

    trainer = kit.trainer(max_epochs=3)
    with _lightning.choosing_train_loader(trainer, choose, reload):
        trainer.fit(kit.Net(), kit.loader())
    assert len(asked) == 2
    assert not {"setup_data"} & set(vars(trainer.fit_loop))
    assert "dataloader" not in vars(trainer.fit_loop._data_source)


def test_evaluation_arguments_follow_the_users_signature(kit):
    found = []

    class Look(pl.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            loop = _lightning.evaluation_loop(trainer)
            found.append(len(_lightning.evaluation_arguments(trainer, loop, batch, batch_idx, dataloader_idx)))

    class Several(kit.Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            pass

    kit.trainer(Look(), limit_val_batches=1).validate(kit.Net(), kit.loader(), verbose=False)
    kit.trainer(Look(), limit_val_batches=1).validate(Several(), [kit.loader(), kit.loader()], verbose=False)
    assert found == [2, 3, 3]


def test_steps_on_the_loaders_iterator_are_known_by_their_argument(kit):
    taking = type("Taking", (kit.Net,), {"training_step": lambda self, dataloader_iter: None})()
    assert _lightning.takes_dataloader_iter(taking)
    assert not _lightning.takes_dataloader_iter(kit.Net())


def test_a_fresh_pass_is_that_of_the_loop(kit):
    found = []

    class Look(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            found.append(len(list(_lightning.fresh_pass(trainer))))

    kit.trainer(Look(), limit_val_batches=3).validate(kit.Net(), kit.loader(), verbose=False)
    assert found == [3]


@pytest.mark.parametrize("package", ["lightning.fabric", "lightning_fabric"])
def test_misconfigurations_of_both_packages_are_known(package):
    module = import_module(f"{package}.utilities.exceptions")
    assert _lightning.is_misconfiguration(module.MisconfigurationException())
    assert not _lightning.is_misconfiguration(ValueError())


def test_a_trainers_optimizer_step_is_known_by_its_closure(kit):
    found = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            found.append(_lightning.is_lightnings_step({"closure": closure}))
            return super().step(closure)

    module = type("Module", (kit.Net,), {"configure_optimizers": lambda self: Spy(self.parameters(), lr=0.1)})()
    kit.fit(module, max_steps=1)
    assert found == [True]
    assert not _lightning.is_lightnings_step({"closure": lambda: None})
    assert not _lightning.is_lightnings_step({})
