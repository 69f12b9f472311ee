"""A shift of the head's scores acts, leaves nothing, and a hook that would be bypassed is found."""

import copy
import pickle

import pytest
import torch
from core_model_plugins import Observer, Probing, Shift
from torch.utils.data import DataLoader

from groundwire import PluginError, Plugins


def test_a_shift_moves_the_scores_and_leaves_no_key(kit):
    module = kit.Net()
    keys = list(module.state_dict())
    plugin = Shift()
    trainer = kit.trainer(Plugins([plugin], head="net.3"))
    [shifted] = trainer.predict(module, DataLoader(kit.data(), 40))
    [plain] = kit.trainer().predict(module, DataLoader(kit.data(), 40))
    assert torch.equal(shifted, plain + 1)
    assert list(module.state_dict()) == keys
    assert not module.net[3]._forward_hooks
    trainer.validate(module, kit.loader(), verbose=False)
    assert torch.equal(plugin.scores, plugin.raw + 1)


def test_copies_and_pickles_of_a_module_in_a_run_take_nothing_along(kit):
    copies = []

    class Copies(Observer):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            copies.append(copy.deepcopy(pl_module))
            pickle.dumps(pl_module.net)

    plugins = Plugins([Copies(), Shift()], head="net.3")
    kit.trainer(plugins, limit_val_batches=1).validate(kit.Net(), kit.loader(), verbose=False)
    [twin] = copies
    assert twin._trainer is None
    with torch.inference_mode():
        assert twin(torch.zeros(1, 8)).shape == (1, 3)


class Compiled:
    """A module whose network was compiled by the user, and called before the run or not."""

    @staticmethod
    def made(kit, *modes):
        module = kit.Net()
        module.net = torch.compile(module.net, backend="eager")
        torch.compiler.reset()
        for train, without_graph in modes:
            module.train(train)
            with without_graph():
                module(torch.randn(8, 8))
        return module


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("plugin", [Shift, Probing])
def test_a_shift_that_a_compiled_model_would_bypass_is_refused(kit, called_before, plugin):
    modes = [(False, torch.no_grad), (False, torch.inference_mode)] if called_before else []
    module = Compiled.made(kit, *modes)
    trainer = kit.trainer(Plugins([plugin()], head="net._orig_mod.3"))
    if called_before:
        with pytest.raises(PluginError, match=r"compiled module|'shift' cannot shift the scores"):
            trainer.validate(module, kit.loader(), verbose=False)
    else:
        trainer.validate(module, kit.loader(), verbose=False)


@pytest.mark.parametrize("plugin", [Shift, Probing])
def test_a_bypassed_shift_is_refused_in_training_too(kit, plugin):
    module = Compiled.made(kit, (False, torch.enable_grad), (False, torch.no_grad), (True, torch.enable_grad))
    with pytest.raises(PluginError, match=r"compiled module|'shift' cannot shift the scores"):
        kit.fit(module, Plugins([plugin()], head="net._orig_mod.3"))


def test_scores_of_a_compiled_head_are_raw_and_final(kit):
    shift = Shift()
    kit.trainer(Plugins([shift], head="net._orig_mod.3")).validate(Compiled.made(kit), kit.loader(), verbose=False)
    assert torch.allclose(shift.scores, shift.raw + 1)
