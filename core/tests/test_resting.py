"""An idle plugin costs little: Lightning passes the host by where the run has nothing to do, and only there."""

import lightning.pytorch as pl
import pytest

from groundwire import Plugin, hookimpl
from groundwire._lightning import BATCH_HOOKS, skip_hooks
from groundwire.host import host_of

GRADIENT = {"on_before_zero_grad", "on_before_backward", "on_before_optimizer_step"}
WINDOW = {"on_before_zero_grad", "on_before_backward"}
BATCH = {"on_train_batch_end"}


class Idle(Plugin):
    pass


class Owner(Plugin):
    @hookimpl
    def gw_gradient(self, step):
        return None


class Editor(Plugin):
    @hookimpl
    def gw_gradient_edit(self, step):
        return None


class Finisher(Plugin):
    @hookimpl
    def gw_backward_done(self, phase):
        return None


class TrainObserver(Plugin):
    score_stages = ("train",)

    @hookimpl
    def gw_scores(self, scores):
        return None


class Observer(Plugin):
    @hookimpl
    def gw_scores(self, scores):
        return None


CASES = {
    Idle: GRADIENT | BATCH,
    Observer: GRADIENT | BATCH,
    Owner: BATCH,
    Editor: BATCH | WINDOW,
    Finisher: BATCH | WINDOW,
    TrainObserver: GRADIENT,
}


@pytest.mark.parametrize("plugin", CASES)
def test_the_host_rests_only_where_nobody_needs_it(kit, plugin):
    resting = set()

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            host = host_of(trainer)
            resting.update(name for name in GRADIENT | BATCH if getattr(host, name) is None)

    kit.fit(kit.Net(), plugin(), Look(), max_steps=1)
    assert resting == CASES[plugin]


def test_lightning_passes_a_resting_callback_by(kit):
    called = []

    class Counting(pl.Callback):
        def on_train_batch_start(self, *args):
            called.append("start")

        def on_train_batch_end(self, *args):
            called.append("end")

    callback = Counting()
    skip_hooks(callback, "on_train_batch_start")
    kit.fit(kit.Net(), callback, max_steps=1)
    assert called == ["end"]


def test_a_plugin_rests_at_the_hooks_of_a_batch_that_it_does_not_have_and_only_during_the_run(kit):
    called, resting = [], set()

    class Ending(Plugin):
        def on_train_batch_end(self, *args):
            called.append("end")

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            resting.update(name for name in BATCH_HOOKS if getattr(plugin, name) is None)

    plugin = Ending()
    kit.fit(kit.Net(), plugin, Look(), max_steps=1)
    assert resting == set(BATCH_HOOKS) - {"on_train_batch_end"}
    assert called == ["end"]
    assert not set(BATCH_HOOKS) & set(vars(plugin))


def test_a_hook_that_was_set_on_the_plugin_itself_is_called(kit):
    called = []
    plugin = Idle()
    plugin.on_after_backward = lambda *args: called.append("backward")
    kit.fit(kit.Net(), plugin, max_steps=1)
    assert called == ["backward"]
