"""One-shot pruning and recalibration after training."""

import math
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from groundwire import PluginError
from groundwire_cram import Magnitude, prune, recalibrate_batchnorm
from groundwire_cram.pruning import compressed
from groundwire_cram.threshold import exact_masks, published_masks

sparsities = st.floats(0, 1, exclude_max=True)
shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


def tensors(shapes, values):
    generator = torch.Generator().manual_seed(0)
    return {
        str(i): torch.randint(-values, values + 1, shape, generator=generator).float() for i, shape in enumerate(shapes)
    }


@given(shapes, sparsities, st.integers(1, 50))
def test_exact_masks_drop_exactly_the_smallest(shapes, sparsity, values):
    weights = tensors(shapes, values)
    masks = exact_masks(weights, sparsity)
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    keep = torch.cat([m.flatten() for m in masks.values()])
    dropped = int((~keep).sum())
    assert dropped == math.floor(sparsity * len(flat))
    order = torch.argsort(flat, stable=True)
    assert sorted(order[:dropped].tolist()) == (~keep).nonzero().flatten().tolist()


@given(shapes, sparsities, st.integers(1, 50))
def test_published_masks_keep_what_is_strictly_above_the_mth_largest(shapes, sparsity, values):
    weights = tensors(shapes, values)
    flat = np.sort(np.concatenate([w.abs().numpy().ravel() for w in weights.values()]))[::-1]
    limit = -1 if sparsity == 0 else flat[math.ceil(len(flat) * (1 - sparsity)) - 1]
    masks = published_masks(weights, sparsity)
    assert all(torch.equal(masks[k], w.abs() > limit) for k, w in weights.items())


def test_the_published_rule_keeps_one_entry_fewer():
    weights = {"w": torch.randn(100, 100, generator=torch.Generator().manual_seed(0))}
    assert int(published_masks(weights, 0.9)["w"].sum()) == 999
    assert int(exact_masks(weights, 0.9)["w"].sum()) == 1000


def test_a_copy_is_pruned_globally_and_the_original_stays(kit):
    module = kit.Net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    twin = prune(module, 0.9)
    assert kit.difference(before, module.state_dict()) == 0.0
    weights = [p for p in twin.parameters() if p.dim() > 1]
    zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert zeros == math.floor(0.9 * total)
    assert all(torch.equal(p, before[k]) for k, p in twin.named_parameters() if p.dim() == 1)
    assert prune(module, 0.5, inplace=True) is module


def test_tied_weights_are_counted_once():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    assert int((prune(module, 0.5)[0].weight == 0).sum()) == 8


@pytest.mark.parametrize("sparsity", [90, 1, 1.0, -0.1, float("nan"), "0.9", True])
def test_bad_sparsities_are_refused(sparsity):
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\)") as caught:
        prune(nn.Linear(2, 2), sparsity)
    assert ("did you mean 0.9?" in str(caught.value)) == (sparsity == 90)


def test_a_module_with_nothing_to_prune_is_refused():
    with pytest.raises(ValueError, match="there is nothing to prune: of 2 parameters none"):
        prune(nn.BatchNorm1d(3), 0.5)


def test_pruned_restores_after_an_exception():
    module = nn.Linear(4, 4)
    before = module.weight.detach().clone()
    with pytest.raises(RuntimeError), compressed(module, Magnitude(0.5)):
        assert int((module.weight == 0).sum()) == 8
        raise RuntimeError
    assert torch.equal(module.weight, before)


class Norms(nn.Module):
    """Layers of all kinds around BatchNorm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.late = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm1d(4, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("counter", torch.zeros(1))
        self.calls = []

    def forward(self, x):
        self.counter += 1
        self.calls.append(len(x))
        torch.rand(1)
        return self.late(self.drop(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


def batches(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 1, 6, 6, generator=generator), torch.zeros(8)) for _ in range(n)]


def test_statistics_are_the_cumulative_average_and_nothing_else_changes():
    module = Norms()
    module.bn.eval()
    modes = [m.training for m in module.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    recalibrate_batchnorm(module, batches(), batches=3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert modes == [m.training for m in module.modules()]
    assert (module.bn.momentum, module.late.momentum) == (0.1, 0.3)
    assert (float(module.counter), module.calls) == (0.0, [])
    with torch.no_grad():
        outputs = [module.conv(x) for x, _ in batches(3)]
    expected_mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    expected_var = torch.stack([o.var((0, 2, 3)) for o in outputs]).mean(0)
    torch.testing.assert_close(module.bn.running_mean, expected_mean)
    torch.testing.assert_close(module.bn.running_var, expected_var)
    assert int(module.bn.num_batches_tracked) == 3


def test_a_lightning_module_without_forward_runs_its_training_step():
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Norms()

        def training_step(self, batch):
            assert not torch.is_grad_enabled()
            loss = self.net(batch[0]).sum()
            self.log("loss", loss)
            return loss

    module, plain = Module(), Norms()
    plain.load_state_dict(module.net.state_dict())
    recalibrate_batchnorm(module, batches())
    recalibrate_batchnorm(plain, batches())
    assert torch.equal(module.net.late.running_var, plain.late.running_var)
    assert "log" not in vars(module)


def test_no_batchnorm_warns_and_changes_nothing():
    module = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="Linear has no BatchNorm"):
        assert recalibrate_batchnorm(module, []) is module


def test_empty_loaders_and_unreadable_batches_are_refused_and_statistics_stay():
    module = Norms()
    recalibrate_batchnorm(module, batches())
    before = module.bn.running_mean.clone()
    with pytest.raises(PluginError, match="is empty"):
        recalibrate_batchnorm(module, [])
    with pytest.raises(PluginError, match="cannot tell what this batch holds"):
        recalibrate_batchnorm(module, [{"unknown": torch.zeros(1)}])
    with pytest.raises(ValueError, match="at least 1"):
        recalibrate_batchnorm(module, batches(), batches=0)
    assert torch.equal(module.bn.running_mean, before)
    assert module.training
