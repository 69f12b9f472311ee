"""The layer that gives the scores is found in models as people write them."""

from collections import UserDict

import pytest
import torch
from programs_harness import Idle
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from groundwire import Fields, Plugin, PluginError, Plugins, hookimpl


class Scores(Plugin):
    """Keeps the scores that core hands out."""

    def __init__(self):
        self.seen = []

    @hookimpl
    def gw_scores(self, scores, run):
        self.seen.append(scores.clone())
        self.found = run.head.name


class OwnLinear(nn.Module):
    """A library's own linear layer."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Matmul(OwnLinear):
    def forward(self, x):
        return x @ self.weight.t() + self.bias


class Transposed(nn.Module):
    """As GPT-2's Conv1D: the weight stands the other way round."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def module_of(kit, head=None, forward=None, read=None):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            if head is not None:
                self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), head(16, 3))
            self.given = []

        def validation_step(self, batch, batch_idx):
            scores = self(*read(batch)) if read is not None else self(batch[0])
            self.given.append(scores.detach().clone())

        def training_step(self, batch, batch_idx):
            raise NotImplementedError

    if forward is not None:
        Module.forward = forward
    return Module()


def validated(kit, module, loader=None, **settings):
    scores = Scores()
    trainer = kit.trainer(Plugins([scores], report=False, **settings))
    trainer.validate(module, kit.loader() if loader is None else loader, verbose=False)
    assert len(scores.seen) == len(module.given) == 5
    assert all(torch.equal(a, b) for a, b in zip(scores.seen, module.given, strict=True))
    return scores


@pytest.mark.parametrize("head", [OwnLinear, Matmul, Transposed], ids=lambda head: head.__name__)
def test_a_layer_with_its_own_weight_is_a_head(kit, head):
    assert validated(kit, module_of(kit, head)).found == "net.2"


def test_torchs_own_layer_is_found_behind_layers_of_another_library(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(OwnLinear(8, 16), nn.ReLU(), nn.Linear(16, 3))
            self.given = []

        def validation_step(self, batch, batch_idx):
            self.given.append(self(batch[0]).clone())

    assert validated(kit, Module()).found == "net.2"


class TwoParameters(nn.Module):
    """A weight that no layer is named for, twice: nothing tells which product the scores come from."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        return x @ self.first.t() + x.exp() @ self.second.t()


def test_a_refusal_names_the_layers_that_could_be_meant(kit):
    module = kit.Net()
    module.net = nn.Sequential(OwnLinear(8, 8), TwoParameters(), nn.Softplus())
    with pytest.raises(PluginError, match=r"candidates: \['net\.0'"):
        kit.trainer(Scores()).validate(module, kit.loader(), verbose=False)


def keyworded(self, input_ids, attention_mask=None, labels=None):
    return {"loss": None, "logits": self.net(input_ids * attention_mask)}


def anything(self, **inputs):
    return self.net(inputs["input_ids"] * inputs["attention_mask"])


def dicts(kind):
    def collate(rows):
        x, y = (torch.stack(part) for part in zip(*rows, strict=True))
        return kind({"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y})

    return collate


@pytest.mark.parametrize("kind", [dict, UserDict], ids=["dict", "UserDict"])
@pytest.mark.parametrize("forward", [keyworded, anything], ids=["keywords", "any keywords"])
def test_a_dict_batch_reaches_forward_by_its_keys(kit, forward, kind):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.given = []

        def validation_step(self, batch, batch_idx):
            output = self(**batch)
            self.given.append((output["logits"] if isinstance(output, dict) else output).clone())

    Module.forward = forward
    loader = DataLoader(kit.data(), 8, collate_fn=dicts(kind))
    assert validated(kit, Module(), loader).found == "net.3"


def test_a_forward_that_takes_the_dict_gets_the_dict(kit):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.given = []

        def forward(self, inputs):
            return self.net(inputs["a"] + inputs["b"])

        def validation_step(self, batch, batch_idx):
            self.given.append(self(batch["inputs"]).clone())

    def collate(rows):
        x, y = (torch.stack(part) for part in zip(*rows, strict=True))
        return {"inputs": {"a": x, "b": x}, "y": y}

    assert validated(kit, Module(), DataLoader(kit.data(), 8, collate_fn=collate)).found == "net.3"


class Held:
    """A batch of the user's own class, made by collate where validation is: in inference mode."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device, **_):
        return Held(self.x.to(device), self.y.to(device))


@pytest.mark.parametrize("kind", ["object", "UserDict"])
def test_tensors_of_inference_mode_inside_an_object_of_the_users_own(kit, kind):
    class Module(kit.Net):
        def __init__(self):
            super().__init__()
            self.given = []

        def forward(self, held):
            return self.net(held.x if isinstance(held, Held) else held["x"])

        def validation_step(self, batch, batch_idx):
            self.given.append(self(batch).clone())

    def collate(rows):
        x, y = (torch.stack(part) for part in zip(*rows, strict=True))
        return Held(x, y) if kind == "object" else UserDict(x=x, y=y)

    def fields(batch):
        return Fields(batch, batch.y if isinstance(batch, Held) else batch["y"])

    loader = DataLoader(kit.data(), 8, collate_fn=collate)
    assert validated(kit, Module(), loader, fields=fields).found == "net.3"


def test_an_idle_plugin_looks_for_no_head(kit):
    module = module_of(kit, forward=lambda self, x: self.net(x))
    kit.trainer(Idle()).validate(module, kit.loader(), verbose=False)
    assert len(module.given) == 5
