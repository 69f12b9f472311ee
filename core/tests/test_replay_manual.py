"""The replay under manual optimization: what made the gradient, for the optimizer that steps."""

import pytest
import torch
from torch import nn

from groundwire import Plugin, PluginError, hookimpl


def test_manual_optimization_needs_a_loss_function(kit):
    with pytest.raises(PluginError, match=r"sam: .*manual optimization.*loss_fn"):
        kit.fit(manual(kit)(), kit.SAM())


def test_manual_optimization_with_a_loss_function_equals_the_reference(kit):
    module = manual(kit)()
    kit.fit(module, kit.SAM(loss_fn=lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1])))
    assert kit.difference(module.net.state_dict(), kit.sam_loop(kit.data())) == 0.0


def manual(kit):
    class Module(kit.Net):
        def setup(self, stage):
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    return Module


def test_two_optimizers_under_manual_optimization_replay_their_own_parameters(kit):
    names = []

    class Spy(kit.SAM):
        @hookimpl
        def gw_gradient(self, step, run):
            names.append(sorted(step.parameters))
            assert len(step.micro_batches) == 1
            return super().gw_gradient(step, run)

    class Module(kit.Net):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 3)]

    kit.fit(Module(), Spy(loss_fn=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])))
    assert names == [["net.0.bias", "net.0.weight"], ["net.3.bias", "net.3.weight"]] * 5


@pytest.mark.parametrize("every", [1, 2, 3])
def test_manual_optimization_replays_what_made_the_gradient(kit, every):
    """Batches whose gradient was thrown away are not in the window; accumulated ones are."""
    differences = []

    class Look(Plugin):
        loss_fn = staticmethod(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))

        @hookimpl
        def gw_gradient(self, step):
            found = step.replay()
            differences.append(max(float((found[n] - g).abs().max()) for n, g in step.grads.items()))

    class Discards(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            if batch_idx % every == every - 1:
                optimizer.step()

    class Accumulates(Discards):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            if batch_idx % every == every - 1:
                optimizer.step()
                optimizer.zero_grad()

    for module in (Discards(), Accumulates()):
        kit.fit(module, Look())
        assert "zero_grad" not in {**vars(module), **vars(module.optimizers()), **vars(module.optimizers().optimizer)}
    assert len(differences) == 2 * (5 // every)
    assert max(differences) < 1e-6


def test_optimizers_that_share_a_backward_both_get_their_window(kit):
    names = []

    class Spy(kit.SAM):
        loss_fn = staticmethod(lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))

        def __init__(self):
            self.rho = 0.05

        @hookimpl
        def gw_gradient(self, step):
            names.append((len(step.parameters), len(step.micro_batches)))
            return step.replay()

    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            first.step()
            second.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 3)]

    kit.fit(Module(), Spy())
    assert names == [(2, 1), (2, 1)] * 5


def test_a_loss_function_that_returns_nothing_is_refused(kit):
    with pytest.raises(PluginError, match="loss_fn must return the loss, one number with a gradient, got None"):
        kit.fit(manual(kit)(), kit.SAM(loss_fn=lambda module, batch: None))


def test_steps_that_lightning_does_not_see_are_told(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    with pytest.warns(UserWarning, match="'sam' had no effect"):
        kit.fit(Module(), kit.SAM(loss_fn=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])))


def test_validation_does_not_ask_for_what_only_training_needs(kit):
    kit.trainer(kit.SAM()).validate(manual(kit)(), kit.loader(), verbose=False)
