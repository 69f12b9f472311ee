"""A plugin that replays each step and throws the result away, and runs with and without it."""

import random

import numpy as np
import torch
from torch.utils.data import DataLoader

from groundwire import Plugin, hookimpl


class Twice(Plugin):
    """Replays at the same weights and throws the result away: nothing may differ from a run without it."""

    @hookimpl
    def gw_gradient(self, step):
        step.replay()
        return


def both(kit, make, **options):
    """(module, trainer) without and with the replay."""
    results = []
    for callbacks in ([], [Twice()]):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        module = make()
        loader = DataLoader(kit.data(), 8, shuffle=True)
        trainer = kit.fit(module, *callbacks, loader=loader, val=kit.loader(), max_epochs=3, **options)
        results.append((module, trainer))
    return results
