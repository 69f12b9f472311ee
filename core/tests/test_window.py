"""The accumulation window holds the batches of the gradient that is being made, and no others."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from groundwire import Plugin, hookimpl

ROWS = 8 * 24


class Owner(Plugin):
    """Replays, and counts how many batches of the epoch still live."""

    name = "owner"

    def __init__(self, replays=True, loss_fn=None):
        self.replays, self.loss_fn = replays, loss_fn
        self.batches, self.alive = [], []

    @hookimpl
    def gw_gradient(self, step):
        return step.replay() if self.replays else None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.alive.append(sum(reference() is not None for reference in self.batches))
        self.batches.append(weakref.ref(batch[0]))

    def on_train_end(self, trainer, pl_module):
        self.ended = trainer


def cross_entropy(module, batch):
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


class Manual:
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self, batch)
        self.manual_backward(loss)
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Skips:
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 2 else cross_entropy(self, batch)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize(("kind", "accumulate"), [(None, 1), (None, 3), (Manual, 1), (Skips, 1)])
def test_a_window_forgets_its_batches(kit, replays, kind, accumulate):
    owner = Owner(replays, cross_entropy if kind is Manual else None)
    module = (kit.Net if kind is None else type("Module", (kind, kit.Net), {}))()
    options = {} if kind is Manual else {"accumulate_grad_batches": accumulate}
    kit.fit(module, owner, loader=DataLoader(kit.data(ROWS), 8), **options)
    window = 3 if kind is Manual else accumulate
    assert len(owner.alive) == 24
    # Those of the window, and the newest, which is recorded before anybody knows whether its backward comes.
    assert max(owner.alive[:12]) <= window + 1
    assert max(owner.alive[12:]) == max(owner.alive[6:12])
    assert not any(reference() is not None for reference in owner.batches)


def test_two_optimizers_keep_what_either_waits_for_and_no_more(kit):
    class Two(kit.Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.manual_backward(cross_entropy(self, batch))
            first.step()
            first.zero_grad()
            if batch_idx % 4 == 3:
                second.step()
                second.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[3])]

    owner = Owner(loss_fn=cross_entropy)
    kit.fit(Two(), owner, loader=DataLoader(kit.data(ROWS), 8))
    assert max(owner.alive) <= 5
    assert not any(reference() is not None for reference in owner.batches)


def test_a_window_is_the_batches_since_the_last_step_and_no_earlier_one(kit):
    windows = []

    class Sees(Plugin):
        name = "sees"

        @hookimpl
        def gw_gradient(self, step):
            windows.append([micro_batch.batch_idx for micro_batch in step.micro_batches])

    kit.fit(kit.Net(), Sees(), loader=DataLoader(kit.data(ROWS), 8), accumulate_grad_batches=3)
    assert windows == [[first, first + 1, first + 2] for first in range(0, 24, 3)]
