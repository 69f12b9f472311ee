"""Plugins that change the model's structure, watch its scores, or move its head."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from groundwire import Plugin, PluginError, hookimpl


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


class Surgery(Plugin):
    """Halves every Linear weight through a parametrization."""

    name = "surgery"

    @hookimpl
    def gw_transform_model(self, module):
        for child in list(module.modules()):
            if isinstance(child, nn.Linear) and not parametrize.is_parametrized(child):
                parametrize.register_parametrization(child, "weight", Half())

    @hookimpl
    def gw_export(self, module):
        for child in list(module.modules()):
            if parametrize.is_parametrized(child):
                parametrize.remove_parametrizations(child, "weight")


class Observer(Plugin):
    name = "observer"
    score_stages = ("validate", "test")

    def __init__(self, stages=None, features=False):
        self.score_stages = stages or self.score_stages
        self.needs_features = features
        self.seen = []

    @hookimpl
    def gw_scores(self, scores, fields, stage, variant, run):
        self.seen.append((stage, variant, scores, fields.targets, run.features, run.raw_scores, run.head.name))


class Adds:
    """A forward hook that adds the vector of now; a copy of it adds what the original added."""

    changes = "shift"

    def __init__(self):
        self.vector = None

    def __call__(self, layer, arguments, output):
        return output if self.vector is None else output + self.vector


class Shift(Plugin):
    """A plugin as a third party would write it: moves the scores by a hook of its own on the head.

    ``vector(batch, stage, variant)`` gives the vector, or one for each row of the batch.
    """

    name, changes = "shift", "shift"
    score_stages = ("train", "validate", "test", "predict")

    def __init__(self, vector=None, name="shift", head=None):
        self.vector = vector or (lambda batch, stage, variant: torch.ones(3))
        self.name, self.head = name, head
        self.calls = []

    @hookimpl
    def gw_batch_start(self, batch, stage, variant, first_result, run):
        self.calls.append((stage, variant, first_result))
        if not hasattr(self, "hook"):
            self.hook = Adds()
            handle = run.head.module.register_forward_hook(self.hook)
            run.on_close(handle.remove)
            run.on_close(lambda: delattr(self, "hook"))
        self.hook.vector = self.vector(batch, stage, variant) if first_result is None else first_result
        return self.hook.vector

    @hookimpl
    def gw_scores(self, scores, run):
        self.scores, self.raw = scores, run.raw_scores


class Probing(Shift):
    """Refuses a head that its hook does not reach."""

    score_stages = ()
    probed = False

    @hookimpl
    def gw_check(self, run):
        if run.ready:
            self.hook = Adds()
            run.on_close(run.head.module.register_forward_hook(self.hook).remove)
            run.on_close(lambda: delattr(self, "hook"))

    @hookimpl
    def gw_batch_start(self, batch, run):
        if not self.probed:
            plain = run.forward(batch)
            self.hook.vector = torch.ones(3)
            moved = run.forward(batch)
            self.probed = True
            if torch.equal(plain, moved):
                raise PluginError(f"{self.name!r} cannot shift the scores: its hook is not reached")
