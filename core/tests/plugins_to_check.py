"""Plugins that keep the contract or break one point of it, and what the checks say of them."""

import torch
from torch.utils.data import DataLoader

from groundwire import Plugin, hookimpl
from groundwire.testing import Classifier
from groundwire.testing.contract import CHECKS, run_checks
from groundwire.testing.loaders import Rows


class Idle(Plugin):
    """Does nothing."""


def failures(factory, *only, **options):
    report, errors = run_checks(factory, only=only or CHECKS, **options)
    assert len(errors) == len(report.failed)
    return {outcome.name: outcome.reason for outcome in report.failed}


class LeavesAttribute(Plugin):
    def on_fit_start(self, trainer, pl_module):
        pl_module.leftover = 1


class Counting(Plugin):
    """Scales gradients by a count of its own."""

    def __init__(self):
        self.count = 0

    @hookimpl
    def gw_gradient_edit(self, step):
        self.count += 1
        for grad in step.grads.values():
            grad.mul_(1 / self.count)


class Remembering(Counting):
    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Unmakeable(Plugin):
    def __init__(self, strength=1.0):
        self._function = lambda: strength


class Own(Classifier):
    """A module with its own loaders, which draws randomly in a way that no resume can repeat."""

    def train_dataloader(self):
        return DataLoader(Rows(32), 8, shuffle=True)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0 * torch.rand(1).sum()

    def configure_gradient_clipping(self, *args, **kwargs):
        next(self.parameters()).grad.add_(torch.rand(1))
