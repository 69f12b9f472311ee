"""After a replay every buffer and tensor attribute is the same object with the same value and the same version."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from programs_harness import Replay
from torch import nn
from torch.nn import functional as F

from groundwire import Plugin, hookimpl

WRONG = "item 4: Snapshot.restore copies into every buffer and tensor attribute, which raises its version"


def tensors_of(module):
    found = dict(module.named_buffers())
    for name, part in module.named_modules():
        found |= {f"{name}.{key}": value for key, value in vars(part).items() if isinstance(value, torch.Tensor)}
    return found


class Probe(Plugin):
    """Compares what a replay leaves behind with what it found."""

    def __init__(self):
        self.identity, self.values, self.versions = [], [], []

    @hookimpl
    def gw_gradient(self, step, run):
        before = {name: (t, t.data_ptr(), t.detach().clone(), t._version) for name, t in tensors_of(run.module).items()}
        found = step.replay(same_rng=True)
        after = tensors_of(run.module)
        assert after.keys() == before.keys()
        for name, (tensor, place, value, version) in before.items():
            if after[name] is not tensor or after[name].data_ptr() != place:
                self.identity.append(name)
            if not torch.equal(after[name], value):
                self.values.append(name)
            if after[name]._version != version:
                self.versions.append(name)
        return found


class Buffers:
    """BatchNorm, a counter, a queue, and tensors that are plain attributes."""

    def build(self):
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("queue", torch.zeros(4, 3))
        self.scale, self.total = torch.ones(3), torch.zeros(3)
        self.latest = torch.zeros(3)

    def forward(self, x):
        return self.net(x) * self.scale

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.count += 1
            self.queue[int(self.count) % 4] = self(batch[0])[0]
            self.total += 1
            self.latest = self.total + 0.5
        return loss


def module_of(kit):
    class Module(Buffers, kit.Net):
        def __init__(self):
            super().__init__()
            self.build()

    return Module()


def test_they_are_the_same_objects_with_the_same_values(kit):
    probe = Probe()
    kit.fit(module_of(kit), probe)
    assert (probe.identity, probe.values) == ([], [])


@pytest.mark.xfail(strict=True, reason=WRONG)
def test_they_have_the_same_versions(kit):
    probe = Probe()
    kit.fit(module_of(kit), probe)
    assert probe.versions == []


def test_averages_are_those_of_a_training_without_a_replay(kit):
    states = []
    for plugins in ([], [Replay()]):
        module = module_of(kit)
        kit.fit(module, *plugins, EMAWeightAveraging(decay=0.9), max_epochs=2)
        states.append(module.state_dict())
    assert kit.difference(*states) == 0.0


class Players(pl.LightningModule):
    """Two players of one set of images: their graph is still to be used when the first of them steps."""

    def __init__(self, norm):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), norm(8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        self.images = None

    def training_step(self, batch, batch_idx):
        of_generator, of_critic = self.optimizers()
        images = self.generator(torch.randn(len(batch[0]), 4))
        if self.keeps:
            self.images = images
        for optimizer, loss in ((of_critic, self.critic_loss), (of_generator, self.generator_loss)):
            optimizer.zero_grad()
            self.manual_backward(loss(batch, images))
            optimizer.step()

    def critic_loss(self, batch, images):
        return F.softplus(self.critic(images.detach())).mean() + F.softplus(-self.critic(batch[0])).mean()

    def generator_loss(self, batch, images):
        return F.softplus(-self.critic(images)).mean()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.generator, self.critic)]


def both_losses(module, batch):
    """No parameter learns from both, but the generator's gradient of the critic's step is nobody's."""
    images = module.generator(torch.randn(len(batch[0]), 4))
    for parameter in module.critic.parameters():
        parameter.requires_grad = False
    loss = module.generator_loss(batch, images)
    for parameter in module.critic.parameters():
        parameter.requires_grad = True
    return loss + module.critic_loss(batch, images)


@pytest.mark.parametrize(
    ("norm", "keeps"),
    [(nn.BatchNorm1d, False), (nn.LayerNorm, True), (nn.BatchNorm1d, True)],
    ids=["BatchNorm", "images kept on the module", "both"],
)
@pytest.mark.xfail(strict=True, reason=WRONG)
def test_a_graph_that_is_still_to_be_used_can_be_used(kit, norm, keeps):
    states = []
    for plugins in ([], [Replay(both_losses)]):
        torch.manual_seed(3)
        module = Players(norm)
        module.keeps = keeps
        kit.fit(module, *plugins)
        states.append(module.state_dict())
    assert kit.difference(*states) == 0.0


def test_a_graph_without_such_a_tensor_can_be_used_already(kit):
    states = []
    for plugins in ([], [Replay(both_losses)]):
        torch.manual_seed(3)
        module = Players(nn.LayerNorm)
        module.keeps = False
        kit.fit(module, *plugins)
        states.append(module.state_dict())
    assert kit.difference(*states) == 0.0
