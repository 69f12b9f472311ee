"""Opening and closing a run: stages, exceptions, and nothing left behind."""

import lightning.pytorch as pl
import pytest
import torch
from core_recorders import Forgetful, Recorder, state
from torch import nn

from groundwire import Plugin, PluginError, Plugins, Problem, hookimpl, require_run
from groundwire.host import host_of
from groundwire.testing.traces import stays


def test_all_stages_leave_nothing_behind(kit):
    module, plugin = kit.Net(), Forgetful()
    trainer = kit.trainer(plugin, max_epochs=2)
    before = state(trainer, module)
    trainer.fit(module, kit.loader(), kit.loader())
    assert state(trainer, module) == before
    trainer.validate(module, kit.loader(), verbose=False)
    trainer.test(module, kit.loader(), verbose=False)
    trainer.predict(module, kit.loader())
    trainer.fit(module, kit.loader(), kit.loader())
    assert state(trainer, module) == before
    expected = []
    for stage in ("fit", "validate", "test", "predict", "fit"):
        shown = "train" if stage == "fit" else stage
        expected += [("check", False, shown), ("setup", stage), ("check", True, shown), ("teardown", stage)]
    assert [event for event in plugin.events if event[0] != "findings"] == expected


def test_check_is_called_twice_a_run_and_tells_when_it_is_ready(kit):
    plugin = Recorder()
    kit.fit(kit.Net(), plugin)
    assert [e for e in plugin.events if e[0] == "check"] == [("check", False, "train"), ("check", True, "train")]


def test_findings_are_asked_at_the_end_of_each_validation_and_of_training(kit):
    plugin = Recorder()
    kit.fit(kit.Net(), plugin, val=kit.loader(), max_epochs=2)
    stages = [e[1] for e in plugin.events if e[0] == "findings"]
    assert stages == ["validate", "validate", "train"]


def test_an_author_who_forgets_super_loses_nothing(kit):
    calls = []

    class Rude(Plugin):
        def setup(self, trainer, pl_module, stage):
            calls.append("setup")

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            calls.append("mine")

        @hookimpl
        def gw_gradient(self, step):
            calls.append("gradient")

    kit.fit(kit.Net(), Rude(), max_steps=1)
    assert calls == ["setup", "gradient", "mine"]


def test_a_setup_inherited_from_a_mixin_opens_the_run_too(kit):
    class Mixin:
        def setup(self, trainer, pl_module, stage):
            self.was_open = host_of(trainer) is not None

    class Mixed(Mixin, Plugin):
        pass

    plugin = Mixed()
    kit.fit(kit.Net(), plugin, max_steps=1)
    assert plugin.was_open


@pytest.mark.parametrize(
    "place",
    [
        "setup",
        "on_fit_start",
        "on_train_start",
        "on_train_batch_end",
        "on_validation_epoch_end",
        "on_train_end",
        "on_fit_end",
        "teardown",
    ],
)
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_an_exception_anywhere_closes_the_run_and_the_next_fit_works(kit, place, error):
    class Breaks(pl.Callback):
        broken = True

        def fail(self, *args, **kwargs):
            if self.broken:
                raise error

    breaks = type("Breaks", (Breaks,), {place: Breaks.fail})()
    module, recorder = kit.Net(), Recorder()
    trainer = kit.trainer(recorder, kit.SAM(), breaks)
    before = state(trainer, module)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(module, kit.loader(), kit.loader())
    assert state(trainer, module) == before
    Breaks.broken = False
    module.train()  # Lightning leaves evaluation mode behind after an exception in validation
    again = kit.fit(module, recorder, kit.SAM(), breaks, val=kit.loader())
    assert again.global_step == 5


def test_one_plugin_object_in_two_trainers(kit):
    sam = kit.SAM()
    results = []
    for _ in range(2):
        module = kit.Net()
        kit.fit(module, sam)
        results.append(module.state_dict())
    assert kit.difference(*results) == 0.0


def test_fast_dev_run_overfit_batches_and_limits(kit):
    for options in ({"fast_dev_run": True}, {"overfit_batches": 2}, {"limit_train_batches": 2}, {"max_steps": 3}):
        kit.fit(kit.Net(), kit.SAM(), Recorder(), val=kit.loader(), **options)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_barebones(kit):
    off = dict.fromkeys(kit.QUIET.keys() - {"accelerator"})
    kit.fit(kit.Net(), kit.SAM(), Recorder(), val=kit.loader(), barebones=True, **off)


@pytest.mark.filterwarnings("ignore:.*Could not find.*")
@pytest.mark.filterwarnings("ignore:LearningRateFinder searches without callbacks")
def test_lr_find_leaves_nothing_behind(kit):
    from lightning.pytorch.tuner import Tuner

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module, plugin = Module(), kit.SAM()
    trainer = kit.trainer(plugin, max_epochs=20)
    names = set(vars(trainer.strategy))
    Tuner(trainer).lr_find(module, kit.loader(), num_training=20, update_attr=False)
    assert trainer.callbacks == [plugin]
    assert {name for name, value in vars(trainer.strategy).items() if not stays(value)} == names
    assert "configure_model" not in vars(module)


def test_optimizers_that_carry_hooks_join_the_run(kit):
    class HookedSGD(torch.optim.SGD):
        name = "hooked"
        calls = 0

        def __init__(self, params, lr):
            super().__init__(params, lr)
            require_run(self)

        @hookimpl
        def gw_gradient(self, step, run):
            type(self).calls += 1
            assert run.owner == "hooked"

        @hookimpl
        def gw_check(self, run):
            return None if run.ready else [Problem("hooked", "is never asked before it exists")]

    class Module(kit.Net):
        def configure_optimizers(self):
            return HookedSGD(self.parameters(), lr=0.1)

    kit.fit(Module(), Plugins())
    assert HookedSGD.calls == 5
    with pytest.raises(PluginError, match=r"HookedSGD implements groundwire hooks.*add groundwire\.Plugins\(\)"):
        kit.fit(Module())
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    HookedSGD([parameter], lr=0.5).step()  # without Lightning it is the optimizer that it is built on
    assert parameter.item() == 0.5
    with pytest.raises(PluginError, match="'hooked' and 'sam' both own"):
        kit.fit(Module(), kit.SAM())


def test_a_plain_module_is_not_asked_for_hooks_by_property(kit):
    class Module(kit.Net):
        @property
        def dangerous(self):
            raise AssertionError("evaluated")

    kit.fit(Module(), Recorder(), max_steps=1)
    assert isinstance(Module().net, nn.Sequential)
