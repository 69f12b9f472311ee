"""Each variant of CrAM through Lightning equals a loop written from the published description."""

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.undo.random_states import derive_seed
from groundwire_cram import NM, Chain, CrAM, CrAMOptimizer, Magnitude, Quantize
from groundwire_cram.kernels import forced

RHO = 0.05


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )  # fmt: skip


def digits():
    data = load_digits()
    return torch.tensor(data.images[:256] / 16, dtype=torch.float32)[:, None], torch.tensor(data.target[:256])


def groups_of(net):
    matrices = [p for p in net.parameters() if p.dim() > 1]
    return [{"params": matrices[:1]}, {"params": [p for p in net.parameters() if p is not matrices[0]], "lr": 0.05}]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


class Classifier(pl.LightningModule):
    def __init__(self, grouped=False, wrap=None):
        super().__init__()
        self.net, self.grouped, self.wrap = network(), grouped, wrap

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = sgd(groups_of(self.net) if self.grouped else self.net.parameters())
        return optimizer if self.wrap is None else self.wrap(optimizer)


def threshold_masks(arrays, sparsity):
    """The published rule on all of ``arrays`` together: strictly above the m-th largest, m = ceil(n (1 - s))."""
    flat = np.sort(np.concatenate([np.abs(a).ravel() for a in arrays]))[::-1]
    limit = -1.0 if sparsity == 0 else flat[math.ceil(len(flat) * (1 - sparsity)) - 1]
    return [(np.abs(a) > limit).astype(np.float32) for a in arrays]


def nm_mask(array, n, m):
    """In each group of m consecutive inputs the m - n smallest go, by argsort, as published."""
    moved = np.moveaxis(array, 1, -1)
    groups = np.abs(moved).reshape(-1, m)
    mask = np.ones_like(groups)
    np.put_along_axis(mask, np.argsort(groups, axis=1, kind="stable")[:, : m - n], 0, axis=1)
    return np.moveaxis(mask.reshape(moved.shape), -1, 1)


def on_grid(array, bits):
    """Each output channel's largest magnitude is the largest integer; every weight rounds to its nearest multiple."""
    largest = np.float32(2 ** (bits - 1) - 1)
    out = np.zeros_like(array)
    for row, values in enumerate(array):
        scale = np.abs(values).max() / largest
        out[row] = np.clip(np.rint(values / scale), -largest, largest) * scale if scale else 0
    return out


def prune_with(rule):
    """Compression that multiplies by masks."""

    def compress(arrays):
        masks = rule(arrays)
        return [a * mask for a, mask in zip(arrays, masks, strict=True)], masks

    return compress


def quantize_with(bits):
    return lambda arrays: ([on_grid(a, bits) for a in arrays], [np.ones_like(a) for a in arrays])


def chained(first, second):
    def compress(arrays):
        arrays, masks = first(arrays)
        arrays, more = second(arrays)
        return arrays, [a * b for a, b in zip(masks, more, strict=True)]

    return compress


def globally(s):
    return prune_with(lambda arrays: threshold_masks(arrays, s))


def reference(compressions, *, grad_norm=False, sparse_grad=True, spared=(), grouped=False):
    """The published optimizer around SGD, one of ``compressions`` drawn for each step."""
    net = network()
    opt = sgd(groups_of(net) if grouped else net.parameters())
    params = list(net.parameters())
    x, y = digits()
    for step in range(4):
        xb, yb = x[64 * step : 64 * step + 64], y[64 * step : 64 * step + 64]
        compress = compressions[derive_seed(0, derive_seed(0, step)) % len(compressions)]
        opt.zero_grad()
        nn.functional.cross_entropy(net(xb), yb).backward()
        buffers, old = [b.clone() for b in net.buffers()], [p.detach().clone() for p in params]
        g1 = [p.grad.clone() for p in params]
        scale = RHO
        if grad_norm:
            scale = RHO / (math.sqrt(sum(float(g.square().sum()) for g in g1)) + 1e-12)
        masks = {}
        with torch.no_grad():
            for p, g in zip(params, g1, strict=True):
                p.add_(g * scale)
            for group in opt.param_groups if grouped else [{"params": params}]:
                chosen = [
                    p
                    for p in group["params"]
                    if p.dim() > 1 and not any(p is q for q in map(params.__getitem__, spared))
                ]
                values, found = compress([p.numpy().copy() for p in chosen])
                for p, value, mask in zip(chosen, values, found, strict=True):
                    p.copy_(torch.from_numpy(value))
                    masks[id(p)] = torch.from_numpy(np.ascontiguousarray(mask))
        opt.zero_grad()
        nn.functional.cross_entropy(net(xb), yb).backward()
        with torch.no_grad():
            for p, w, g in zip(params, old, g1, strict=True):
                second = p.grad * masks[id(p)] if sparse_grad and id(p) in masks else p.grad
                p.copy_(w)
                p.grad = second + g
            for b, saved in zip(net.buffers(), buffers, strict=True):
                b.copy_(saved)
        opt.step()
    return net.state_dict()


def through_lightning(tmp_path, *callbacks, module=None):
    module = module or Classifier()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_epochs=1, callbacks=list(callbacks), default_root_dir=tmp_path, enable_model_summary=False, **options
    )
    trainer.fit(module, DataLoader(TensorDataset(*digits()), 64))
    return module.net.state_dict()


def difference(a, b):
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def layerwise(s):
    return prune_with(lambda arrays: [threshold_masks([a], s)[0] for a in arrays])


def nm(n, m):
    return prune_with(lambda arrays: [nm_mask(a, n, m) for a in arrays])


CASES = {
    "layerwise": ({"sparsities": (0.5, 0.9), "pattern": "layerwise"}, [layerwise(0.5), layerwise(0.9)], {}),
    "two_of_four": ({"pattern": "2:4"}, [nm(2, 4)], {}),
    "n_m_mix": ({"pattern": "n:m mix"}, [nm(2, 4), nm(4, 8)], {}),
    "skip": ({"sparsities": 0.8, "skip": ["net.6"]}, [globally(0.8)], {"spared": (6,)}),
    "int8": ({"compress": Quantize(8)}, [quantize_with(8)], {}),
    "pruned_then_int4": (
        {"compress": Chain([Magnitude(0.5), Quantize(4)])},
        [chained(globally(0.5), quantize_with(4))],
        {},
    ),
    "operators_drawn": (
        {"compress": [NM("2:4"), Magnitude(0.7)], "sparse_grad": False},
        [nm(2, 4), globally(0.7)],
        {"sparse_grad": False},
    ),
}


@pytest.mark.parametrize("backend", ["reference", "aten", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_every_variant_equals_its_description_bit_for_bit(case, backend, tmp_path):
    options, compressions, how = CASES[case]
    with forced(backend):
        ours = through_lightning(tmp_path, CrAM(rho=RHO, **options))
    assert difference(ours, reference(compressions, **how)) == 0.0


def test_the_normalised_move_equals_its_description_but_for_the_rounding_of_the_norm(tmp_path):
    ours = through_lightning(tmp_path, CrAM(0.8, RHO, grad_norm=True))
    assert difference(ours, reference([globally(0.8)], grad_norm=True)) < 1e-6


def test_parameter_groups_are_pruned_together_unless_the_reference_is_asked_for(tmp_path):
    together = through_lightning(tmp_path, CrAM(0.8, RHO), module=Classifier(grouped=True))
    apart = through_lightning(tmp_path, CrAM(0.8, RHO, compat="reference"), module=Classifier(grouped=True))
    published = reference([globally(0.8)], grouped=True)
    assert difference(apart, published) == 0.0
    assert difference(together, published) > 0


def test_the_optimizer_with_groundwires_bundle_trains_like_the_callback(tmp_path):
    from groundwire import Plugins

    wrapped = Classifier(wrap=lambda base: CrAMOptimizer(base, (0.5, 0.9), RHO))
    ours = through_lightning(tmp_path, Plugins(), module=wrapped)
    assert difference(ours, through_lightning(tmp_path, CrAM((0.5, 0.9), RHO))) == 0.0


@pytest.mark.parametrize("first_pass", ["present", "closure"])
def test_the_optimizer_in_a_plain_loop_is_the_published_one(first_pass):
    net = network()
    optimizer = CrAMOptimizer(sgd(net.parameters()), (0.9,), RHO, module=net, first_pass=first_pass)
    x, y = digits()
    for start in range(0, 256, 64):

        def closure(start=start):
            loss = nn.functional.cross_entropy(net(x[start : start + 64]), y[start : start + 64])
            loss.backward()
            return loss

        if first_pass == "present":
            closure()
        optimizer.step(closure)
        optimizer.zero_grad()
    assert difference(net.state_dict(), reference([globally(0.9)])) == 0.0


def test_a_mask_is_kept_for_interval_uses_of_its_sparsity(tmp_path, monkeypatch):
    taken = []
    apply = Magnitude.apply
    monkeypatch.setattr(Magnitude, "apply", lambda self, params: taken.append(self.sparsity) or apply(self, params))
    cram = CrAM((0.5, 0.9), RHO, interval=2)
    drawn = []
    draw, cram.minimizer.draw = cram.minimizer.draw, lambda seed: drawn.append(draw(seed)) or drawn[-1]
    through_lightning(tmp_path, cram)
    uses = [str(operator) for operator in drawn]
    assert sorted(map(str, taken)) == sorted(
        level for level in ("0.5", "0.9") for _ in range(math.ceil(uses.count(level) / 2))
    )
