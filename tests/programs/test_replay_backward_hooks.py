"""What a user does to a gradient when its backward is over is done to the replay's gradient too."""

import lightning.pytorch as pl
import pytest
import torch
from programs_harness import Replay
from torch import nn

from groundwire_cram import CrAM

NOT_CALLED = "item 1: on_after_backward is not called for a replay"


def keep_row(module):
    module.net[3].weight.grad[1] = 0


class Callback(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        keep_row(pl_module)


def plain_sgd(parameters):
    """Without weight decay, which moves a row whose gradient is zero."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def trained(kit, who, plugin, **options):
    class Module(kit.Net):
        def on_after_backward(self):
            if who == "module":
                keep_row(self)

        def configure_optimizers(self):
            return plain_sgd(self.parameters())

    module = Module()
    kit.fit(module, plugin, *([Callback()] if who == "callback" else []), **options)
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("who", ["module", "callback"])
@pytest.mark.parametrize(
    "plugin", [lambda kit: kit.SAM(), lambda kit: CrAM(sparsities=0.0), lambda kit: CrAM(sparsities=0.5)]
)
@pytest.mark.xfail(strict=True, reason=NOT_CALLED)
def test_a_row_whose_gradient_is_zeroed_stays(kit, who, plugin, accumulate):
    module = trained(kit, who, plugin(kit), accumulate_grad_batches=accumulate)
    assert torch.equal(module.net[3].weight[1], kit.network()[3].weight[1])
    assert not torch.equal(module.net[3].weight[0], kit.network()[3].weight[0])


@pytest.mark.parametrize("who", ["module", "callback"])
@pytest.mark.xfail(strict=True, reason=NOT_CALLED)
def test_the_training_is_that_of_a_loop_that_edits_both_gradients(kit, who):
    net, data = kit.network(), kit.data()
    optimizer = plain_sgd(net.parameters())

    def gradient(x, y):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        net[3].weight.grad[1] = 0

    for start in range(0, len(data), 8):
        x, y = data[start : start + 8]
        gradient(x, y)
        weights = [p.detach().clone() for p in net.parameters()]
        buffers = [b.clone() for b in net.buffers()]
        norm = kit.total_norm([p.grad for p in net.parameters()])
        with torch.no_grad():
            for p in net.parameters():
                p.add_(p.grad * (0.05 / norm))
        gradient(x, y)
        with torch.no_grad():
            for old, new in zip([*weights, *buffers], [*net.parameters(), *net.buffers()], strict=True):
                new.copy_(old)
        optimizer.step()
    ours = trained(kit, who, kit.SAM())
    assert kit.difference(net.state_dict(), ours.net.state_dict()) == 0.0


def test_every_backward_of_the_user_is_replayed_by_the_users_own_backward(kit):
    class Doubled(kit.Net):
        def backward(self, loss):
            (2 * loss).backward()

    states = []
    for plugins in ([], [Replay()]):
        module = Doubled()
        kit.fit(module, *plugins)
        states.append(module.state_dict())
    assert kit.difference(*states) == 0.0
