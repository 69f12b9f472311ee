"""The head is found on common models, can be named, and is refused where it is ambiguous."""

import lightning.pytorch as pl
import pytest
import torch
from core_model_plugins import Observer
from torch import nn

from groundwire import Plugin, PluginError, Plugins, hookimpl
from groundwire.services.scores.head import find_head

HEADS = {
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "2"),
    "one_logit_squeezed": (lambda: Lambda(nn.Linear(4, 1), lambda f, x: f(x).squeeze(1)), "f"),
    "log_softmax_after": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)), "0"),
    "registered_first": (lambda: First(), "classifier"),
    "frozen_head": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3).requires_grad_(False)), "1"),
    "auxiliary_in_training_only": (lambda: Auxiliary(), "main"),
    "attention_before_it": (lambda: Attention(), "fc"),
    "output_in_a_dict": (lambda: Lambda(nn.Linear(4, 3), lambda f, x: {"logits": f(x)}), "f"),
}


class Lambda(nn.Module):
    def __init__(self, f, call):
        super().__init__()
        self.f, self.call = f, call

    def forward(self, x):
        return self.call(self.f, x)


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier, self.body, self.pooler = nn.Linear(8, 3), nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.classifier(self.pooler(self.body(x)))


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.aux = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return (self.main(x), self.aux(x)) if self.training else self.main(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.att = nn.Linear(4, 3), nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        return self.fc(self.att(x[:, None], x[:, None], x[:, None])[0].squeeze(1))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return nn.functional.linear(self.body(x), self.w)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.h1, self.h2 = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.h1(x), self.h2(x)


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("inference", [False, True])
def test_the_head_is_found(case, inference):
    make, name = HEADS[case]
    net = make().train()
    flags = [p.requires_grad for p in net.parameters()]
    with torch.inference_mode(inference):
        assert find_head(net, torch.randn(5, 4)).name == name
    assert net.training
    assert flags == [p.requires_grad for p in net.parameters()]
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("net", "text"),
    [(Functional(), "body and from a parameter of no layer"), (TwoHeads(), "h1, h2"), (nn.ReLU(), "no Linear")],
)
def test_an_ambiguous_head_is_refused_with_the_candidates(net, text):
    with pytest.raises(PluginError, match=rf"{text}.*Plugins\(head="):
        find_head(net, torch.randn(2, 4))


def test_the_head_can_be_named_and_a_wrong_name_lists_the_candidates(kit):
    observer = Observer()
    kit.trainer(Plugins([observer], head="net.0")).validate(kit.Net(), kit.loader(), verbose=False)
    assert observer.seen[0][2].shape == (8, 16)
    with pytest.raises(PluginError, match=r"head='net.9'.*\['net.0', 'net.3'\]"):
        kit.trainer(Plugins([Observer()], head="net.9")).validate(kit.Net(), kit.loader(), verbose=False)


def test_a_module_without_forward_needs_a_name_and_says_so(kit):
    class Module(kit.Net):
        forward = pl.LightningModule.forward

        def validation_step(self, batch, batch_idx):
            self.net(batch[0])

    with pytest.raises(PluginError, match=r"its forward\(inputs\) failed"):
        kit.trainer(Observer()).validate(Module(), kit.loader(), verbose=False)
    kit.trainer(Plugins([Observer()], head="net.3")).validate(Module(), kit.loader(), verbose=False)


def test_a_wrong_head_is_raised_together_with_other_problems(kit):
    from groundwire import Problem

    class Unhappy(Plugin):
        @hookimpl
        def gw_check(self, run):
            return [Problem("unhappy", "is unhappy")] if run.ready else []

    with pytest.raises(PluginError, match=r"(?s)head='nope'.*unhappy|unhappy.*head='nope'"):
        kit.fit(kit.Net(), Plugins([Unhappy()], head="nope"))
