"""Plugins that change the model's structure, watch its scores, or move its head."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from groundwire import Plugin, hookimpl


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


class Offset(Plugin):
    def __init__(self, value=1.0, name="offset"):
        self.value, self.name = value, name

    def on_train_start(self, trainer, pl_module):
        pass

    @hookimpl
    def gw_check(self, run):
        if run.ready:
            run.offset(self.name, torch.full((3,), self.value))

    @hookimpl
    def gw_scores(self, scores, run):
        self.scores, self.raw = scores, run.raw_scores
