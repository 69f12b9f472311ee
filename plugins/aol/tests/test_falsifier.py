"""The second witness finds what a wrong rule would let through, and leaves no trace."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from aol_written import Apply
from torch import nn
from torch.nn.utils import parametrize

from groundwire_aol import AOLConv2d, AOLLinear, MaxMin, UnsoundError, lipschitz_bound
from groundwire_aol.certify import bound as bound_module
from groundwire_aol.certify import operations
from groundwire_aol.certify.falsifier import search
from groundwire_aol.certify.rounding import Rounding
from groundwire_aol.certify.shape_rules import measured
from groundwire_aol.layers.normalization import BatchCentering

EXACT = Rounding(0.0, 0.0, (0.0, 1.0), torch.float32)


def without_shape_rules(monkeypatch, *names):
    for table in (operations.FUNCTIONS, operations.LAYERS):
        for name, entry in list(table.items()):
            if name in names:
                monkeypatch.setitem(table, name, replace(entry, shape=measured))


def without_comparison(monkeypatch):
    monkeypatch.setattr(bound_module, "refuse_other_results", lambda *a: None)


@pytest.mark.parametrize("name", ["clamp", "clamp_min"])
def test_it_would_have_found_a_limit_that_broadcasts(name, monkeypatch):
    without_shape_rules(monkeypatch, name)
    limit = torch.randn(1, 3, 8, 8)
    model = Apply(lambda m, x: getattr(x.mean((2, 3), keepdim=True), name)(limit))
    with pytest.raises(UnsoundError, match="contradicted by two inputs") as raised:
        lipschitz_bound(model, torch.rand(1, 3, 8, 8))
    x, y = raised.value.counterexample
    assert (model(x[None]) - model(y[None])).norm() > 0.126 * (x - y).norm()


def test_it_would_have_found_a_layer_that_broadcasts(monkeypatch):
    without_shape_rules(monkeypatch, BatchCentering)
    monkeypatch.setattr(BatchCentering, "forward", lambda self, x: x - self.running_mean.view(1, -1, 1, 1))
    monkeypatch.setattr(operations, "_FOLDERS", ("",))
    monkeypatch.setattr("groundwire_aol.certify.plain_copy.is_original", lambda _: True)
    with pytest.raises(UnsoundError, match="contradicted"):
        lipschitz_bound(nn.Sequential(BatchCentering(64)), torch.rand(1, 1, 4, 4))


def test_it_would_have_found_parametrizations_that_are_drawn_or_count(monkeypatch):
    class Noise(nn.Module):
        def forward(self, weight):
            return weight * (8 * torch.rand(())).exp()

    class Counter(nn.Module):
        calls = 0

        def forward(self, weight):
            Counter.calls += 1
            return weight * min(Counter.calls, 10)

    without_comparison(monkeypatch)
    for kind in (Noise, Counter):
        layer = nn.Linear(6, 4)
        layer.weight.data.mul_(0.01)
        parametrize.register_parametrization(layer, "weight", kind())
        with pytest.raises(UnsoundError, match="contradicted"):
            lipschitz_bound(nn.Sequential(layer), torch.rand(1, 6))


def test_a_bound_that_is_a_little_too_small_is_found_for_a_linear_model():
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    norm = float(torch.linalg.matrix_norm(model.weight.detach().double(), 2))
    assert 0.98 * norm < search(model, torch.rand(1, 30), norm, EXACT, seconds=60.0) <= norm * (1 + 1e-9)
    with pytest.raises(UnsoundError):
        search(model, torch.rand(1, 30), 0.98 * norm, EXACT, seconds=60.0)


def test_a_model_that_cannot_run_in_float64_is_searched_in_its_own_precision():
    model = Apply(lambda m, x: m.weight @ x.float().mT, weight=None)
    model.weight = torch.full((3, 3), 0.1)
    with pytest.raises(UnsoundError):
        search(model, torch.rand(1, 2, 3), 0.2, Rounding(1e-6, 1e-6, (0.0, 1.0), torch.float32))


def test_it_is_seeded_and_restores_random_states():
    model = nn.Sequential(AOLConv2d(1, 4, 3), MaxMin(), nn.Flatten(), AOLLinear(36, 4))
    x = torch.rand(1, 1, 5, 5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    lipschitz_bound(model, x)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    ratios = {search(model.eval(), x, 1.001, EXACT, seed=seed, seconds=0.0) for seed in (1, 1, 2)}
    assert len(ratios) == 2


def test_it_can_be_left_out(monkeypatch):
    monkeypatch.setattr(bound_module, "search", lambda *a, **k: pytest.fail("searched"))
    lipschitz_bound(nn.Sequential(nn.Linear(3, 3)), torch.rand(1, 3), falsify=False)


def test_it_stops_in_time():
    model = nn.Sequential(nn.Linear(50, 50))
    started = time.perf_counter()
    search(model, torch.rand(1, 50), 100.0, EXACT, seconds=0.0)
    assert time.perf_counter() - started < 5
