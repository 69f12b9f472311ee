"""What a plugin leaves behind, after success or an exception, is named by the contract."""

import threading

import pytest
import torch
from core_plugins_to_check import LeavesAttribute, failures

from groundwire import Plugin, hookimpl
from groundwire.testing import check_plugin


class LeavesHook(Plugin):
    def on_fit_start(self, trainer, pl_module):
        pl_module.net.register_forward_hook(lambda layer, arguments, output: None)


class LeavesGlobalHook(Plugin):
    def on_fit_start(self, trainer, pl_module):
        self.handle = torch.nn.modules.module.register_module_forward_hook(lambda layer, arguments, output: None)


class LeavesBuffer(Plugin):
    def on_fit_start(self, trainer, pl_module):
        pl_module.net.register_buffer("leftover", torch.zeros(1), persistent=False)


class LeavesWrapper(Plugin):
    """Changes training and forgets to undo it."""

    def on_fit_start(self, trainer, pl_module):
        original = pl_module.training_step
        pl_module.training_step = lambda batch, batch_idx: 2 * original(batch, batch_idx)


class LeavesStrategyWrapper(Plugin):
    def on_fit_start(self, trainer, pl_module):
        trainer.strategy.leftover = trainer.strategy.backward


class LeavesSaving(Plugin):
    """Where core's own stays, somebody else's must not pass for it."""

    def on_fit_start(self, trainer, pl_module):
        original = trainer.strategy.save_checkpoint
        trainer.strategy.save_checkpoint = lambda *arguments, **options: original(*arguments, **options)


class LeavesOptimizerHook(Plugin):
    def on_fit_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_post_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("plugin", "named"),
    [
        (LeavesAttribute, "attribute module.leftover was left"),
        (LeavesHook, "hook in module.net._forward_hooks was left"),
        (LeavesBuffer, "buffer module.net.leftover was left"),
        (LeavesWrapper, "attribute module.training_step was left"),
        (LeavesStrategyWrapper, "attribute trainer.strategy.leftover was left"),
        (LeavesSaving, "attribute trainer.strategy.save_checkpoint was left"),
        (LeavesOptimizerHook, "hook in trainer.optimizers[0]._optimizer_step_post_hooks was left"),
    ],
)
def test_what_a_plugin_leaves_behind_is_named(plugin, named):
    found = failures(plugin, "clean_after_fit", "clean_after_exception")
    assert found.keys() >= {"clean_after_fit"}
    assert named in found["clean_after_fit"]


def test_a_hook_left_on_all_modules_of_torch_is_named():
    plugin = LeavesGlobalHook()
    try:
        assert (
            "hook in torch._global_forward_hooks was left"
            in failures(lambda: plugin, "clean_after_fit")["clean_after_fit"]
        )
    finally:
        plugin.handle.remove()


class CleansAfterSuccessOnly(Plugin):
    """Lightning does not call ``teardown`` when a step raises."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.scratch = 1

    def teardown(self, trainer, pl_module, stage):
        del pl_module.scratch


def test_cleaning_up_in_teardown_alone_is_not_enough():
    found = failures(CleansAfterSuccessOnly, "clean_after_fit", "clean_after_exception")
    assert list(found) == ["clean_after_exception"]
    assert "after an exception in call 2 of training_step: attribute module.scratch" in found["clean_after_exception"]


class Swallows(Plugin):
    def on_fit_start(self, trainer, pl_module):
        original = pl_module.training_step

        def step(batch, batch_idx):
            try:
                return original(batch, batch_idx)
            except RuntimeError:
                return 0 * pl_module(batch[0]).sum()

        pl_module.training_step = step


def test_a_swallowed_exception_is_told():
    assert "did not reach" in failures(Swallows, "clean_after_exception")["clean_after_exception"]


class Perturbs(Plugin):
    """Moves the weights without ``step.perturbed()``, so nobody moves them back when the replay raises."""

    @hookimpl
    def gw_gradient(self, step):
        with torch.no_grad():
            for weight in step.parameters.values():
                weight.add_(1)
            second = step.replay()
            for weight in step.parameters.values():
                weight.sub_(1)
        return second


def test_weights_left_perturbed_by_an_exception_are_told():
    assert "net.0.weight differs by up to 1" in failures(Perturbs, "clean_after_exception")["clean_after_exception"]


class BoundHook(Plugin):
    """A bound method as a hook: a deep copy of the module copies the plugin."""

    def on_fit_start(self, trainer, pl_module):
        self.handle = pl_module.net.register_forward_hook(self.look)

    def look(self, layer, arguments, output):
        pass

    def on_fit_end(self, trainer, pl_module):
        self.handle.remove()


class BoundHookWithLock(BoundHook):
    """The copied plugin would bring a lock, which cannot be copied."""

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        self.lock = threading.Lock()


class HidesInClosure(Plugin):
    """A deep copy shares functions, so the copy's hook still reports to this plugin."""

    def on_validation_start(self, trainer, pl_module):
        self.handle = pl_module.net.register_forward_hook(lambda *_: print(self.name))

    def on_validation_end(self, trainer, pl_module):
        self.handle.remove()


class KeepsTrainer(Plugin):
    def teardown(self, trainer, pl_module, stage):
        pl_module.net.owner = trainer


@pytest.mark.parametrize(
    ("plugin", "named"),
    [
        (BoundHook, "a deep copy made in training holds a BoundHook"),
        (BoundHookWithLock, "a deep copy made in training fails"),
        (HidesInClosure, "a deep copy made in validation holds a HidesInClosure"),
        (KeepsTrainer, "a deep copy made after the run holds a Trainer"),
    ],
)
def test_what_a_deep_copy_takes_along_is_named(plugin, named):
    assert named in failures(plugin, "copies_hold_nothing")["copies_hold_nothing"]


class Halves(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


class Parametrizes(Plugin):
    """Changes the model's structure for good, as a plugin of this kind must."""

    @hookimpl
    def gw_transform_model(self, module):
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear) and not torch.nn.utils.parametrize.is_parametrized(layer):
                torch.nn.utils.parametrize.register_parametrization(layer, "weight", Halves())


@pytest.mark.ddp
def test_a_change_of_structure_may_stay():
    report = check_plugin(Parametrizes)
    assert {o.status for o in report.outcomes if o.name != "neutral_changes_nothing"} == {"passed"}
