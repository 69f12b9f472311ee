"""A replay begins where the step began: with the counters, queues and teachers that the first pass found."""

import copy

import pytest
import torch
from programs_harness import Replay
from torch.nn.functional import cross_entropy

LATER = "a replay begins with what the step left behind, not with what it found (not named by the issue)"


class Anneals:
    """A weight that grows with each step, counted by the module itself."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx) * min(1.0, self.steps / 4)


class Queue:
    """Contrast against a queue of earlier rows, to which this batch is added when its loss is known."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.randn(16, 3, generator=torch.Generator().manual_seed(4)))

    def training_step(self, batch, batch_idx):
        scores = self(batch[0])
        loss = cross_entropy(scores, batch[1]) + (scores @ self.queue.clone().t()).logsumexp(1).mean()
        with torch.no_grad():
            self.queue.copy_(torch.cat([self.queue[len(scores) :], scores]))
        return loss


class Teacher:
    """A teacher that follows at the beginning of the step, as some libraries' examples do it."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net)
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.mul_(0.5).add_(new, alpha=0.5)
            wanted = self.teacher(batch[0]).softmax(1)
        return cross_entropy(self(batch[0]), wanted)


@pytest.mark.parametrize("kind", [Anneals, Queue, Teacher], ids=lambda kind: kind.__name__)
@pytest.mark.xfail(strict=True, reason=LATER)
def test_the_second_gradient_is_of_the_same_loss(kit, kind):
    states = []
    for plugins in ([], [Replay()]):
        module = type("Module", (kind, kit.Net), {})()
        kit.fit(module, *plugins)
        states.append(module.state_dict())
    assert kit.difference(*states) == 0.0


@pytest.mark.parametrize("kind", [Anneals, Queue, Teacher], ids=lambda kind: kind.__name__)
def test_and_what_it_leaves_behind_is_put_back(kit, kind):
    """At a rate of 0 the weights say nothing, and everything else must be as without a replay."""
    seen = []
    for plugins in ([], [Replay()]):
        module = type("Module", (kind, kit.Net), {"configure_optimizers": still})()
        kit.fit(module, *plugins)
        seen.append((module.state_dict(), getattr(module, "steps", None)))
    assert kit.difference(seen[0][0], seen[1][0]) == 0.0
    assert seen[0][1] == seen[1][1]


def still(self):
    return torch.optim.SGD(self.parameters(), lr=0.0)
