"""An offset of the head acts, leaves nothing, and is refused where it would be bypassed."""

import copy
import pickle

import pytest
import torch
from core_model_plugins import Observer, Offset
from torch.utils.data import DataLoader

from groundwire import Plugin, PluginError, Plugins, hookimpl


def test_an_offset_moves_the_scores_and_leaves_no_key(kit):
    module = kit.Net()
    keys = list(module.state_dict())
    plugin = Offset()
    trainer = kit.trainer(Plugins([plugin], head="net.3"))
    [shifted] = trainer.predict(module, DataLoader(kit.data(), 40))
    [plain] = kit.trainer().predict(module, DataLoader(kit.data(), 40))
    assert torch.equal(shifted, plain + 1)
    assert list(module.state_dict()) == keys
    assert not hasattr(module.net[3], "gw_offset")
    trainer.validate(module, kit.loader(), verbose=False)
    assert torch.equal(plugin.scores, plugin.raw + 1)


def test_copies_and_pickles_of_a_module_in_a_run_take_nothing_along(kit):
    copies = []

    class Copies(Observer):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            copies.append(copy.deepcopy(pl_module))
            pickle.dumps(pl_module.net)

    plugins = Plugins([Copies(), Offset()], head="net.3")
    kit.trainer(plugins, limit_val_batches=1).validate(kit.Net(), kit.loader(), verbose=False)
    [twin] = copies
    assert twin._trainer is None
    with torch.inference_mode():
        assert twin(torch.zeros(1, 8)).shape == (1, 3)


def test_two_corrections_of_one_head_are_an_error_naming_both(kit):
    plugins = Plugins([Offset(name="one"), Offset(name="two")], head="net.3")
    with pytest.raises(PluginError, match=r"'two' and 'one' both correct the head 'net\.3'|'one' and 'two'"):
        kit.trainer(plugins).validate(kit.Net(), kit.loader(), verbose=False)


def test_an_offset_of_the_wrong_shape_or_without_a_head_is_refused(kit):
    class Wrong(Offset):
        @hookimpl
        def gw_check(self, run):
            return run.offset(self.name, torch.zeros(5)) if run.ready else None

    with pytest.raises(PluginError, match=r"shape \(5,\)"):
        kit.trainer(Plugins([Wrong()], head="net.3")).validate(kit.Net(), kit.loader(), verbose=False)
    with pytest.raises(PluginError, match=r"needs the head"):
        kit.trainer(Offset()).validate(kit.Net(), kit.loader(), verbose=False)


@pytest.mark.parametrize("called_before", [False, True])
def test_an_offset_that_a_compiled_model_would_bypass_is_refused(kit, called_before):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    module = Module().eval()
    torch.compiler.reset()
    if called_before:
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                module(torch.zeros(8, 8))
    trainer = kit.trainer(Plugins([Offset()], head="net._orig_mod.3"))
    if called_before:
        with pytest.raises(PluginError, match=r"'offset' cannot correct the scores.*compiled"):
            trainer.validate(module, kit.loader(), verbose=False)
    else:
        trainer.validate(module, kit.loader(), verbose=False)


def test_a_bypassed_offset_is_refused_in_training_too(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    class Late(Plugin):
        name = "late"

        @hookimpl
        def gw_check(self, run):
            return run.offset("late", torch.ones(3)) if run.ready else None

    torch.compiler.reset()
    module = Module()
    for train in (False, True):
        module.train(train)(torch.randn(8, 8))
        with torch.no_grad():
            module(torch.randn(8, 8))
    with pytest.raises(PluginError, match="'late' cannot correct the scores"):
        kit.fit(module, Plugins([Late()], head="net._orig_mod.3"))
