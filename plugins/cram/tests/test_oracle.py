"""CrAM through Lightning equals a loop written from the paper, bit for bit."""

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.undo.random_states import derive_seed
from groundwire_cram import CrAM


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return sgd(self.parameters())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)


def digits(n):
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images[:n] / 16, dtype=torch.float32)[:, None]
    return TensorDataset(x, torch.tensor(data.target[:n]))


def loss_of(net, x, y, bf16):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        return nn.functional.cross_entropy(net(x), y)


def reference_step(net, opt, batches, divisor, rho, sparsity, plus=True, sparse_grad=True, clip=None, bf16=False):
    """One step of the published optimizer, written from its description: one threshold, strict, no shared code."""
    params = list(net.parameters())
    opt.zero_grad()
    for x, y in batches:
        (loss_of(net, x, y, bf16) / divisor).backward()
    buffers = [b.clone() for b in net.buffers()]
    old = [p.detach().clone() for p in params]
    g1 = [p.grad.clone() for p in params]
    with torch.no_grad():
        for p, g in zip(params, g1, strict=True):
            p.add_(g * rho)
        matrices = [p for p in params if p.dim() > 1]
        flat = np.sort(np.concatenate([p.detach().abs().numpy().ravel() for p in matrices]))[::-1]
        kept = math.ceil(len(flat) * (1 - sparsity))
        limit = -1.0 if sparsity == 0 else float(flat[kept - 1])
        masks = {id(p): (p.abs() > limit).float() for p in matrices}
        for p in matrices:
            p.mul_(masks[id(p)])
    opt.zero_grad()
    for x, y in batches:
        (loss_of(net, x, y, bf16) / divisor).backward()
    with torch.no_grad():
        for p, w, g in zip(params, old, g1, strict=True):
            g2 = p.grad * masks[id(p)] if sparse_grad and id(p) in masks else p.grad
            p.copy_(w)
            p.grad = g2 + g if plus else g2
        for b, saved in zip(net.buffers(), buffers, strict=True):
            b.copy_(saved)
    if clip:
        nn.utils.clip_grad_norm_(params, clip)
    opt.step()


def reference_loop(dataset, *, batch_size, accumulate=1, seed=0, sparsities, **options):
    net = network()
    opt = sgd(net.parameters())
    batches = [dataset[i : i + batch_size] for i in range(0, len(dataset), batch_size)]
    for step, start in enumerate(range(0, len(batches), accumulate)):
        draw = derive_seed(seed, derive_seed(0, step)) % len(sparsities)
        reference_step(net, opt, batches[start : start + accumulate], accumulate, sparsity=sparsities[draw], **options)
    return net.state_dict()


def lightning_loop(dataset, callback, *, batch_size, **trainer):
    module = Classifier()
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **trainer,
    ).fit(module, DataLoader(dataset, batch_size))
    return module.net.state_dict()


def max_difference(a, b):
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


CASES = {
    "cram_plus_multi": ({}, {}, {}),
    "one_sparsity": ({"sparsities": (0.9,)}, {}, {}),
    "plain_cram": ({"plus": False}, {}, {}),
    "dense_gradients": ({"sparse_grad": False}, {}, {}),
    "accumulation_with_a_partial_last_window": ({}, {"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "clipping_the_sum_once": ({}, {"gradient_clip_val": 0.5}, {"clip": 0.5}),
    "bf16": ({}, {"precision": "bf16-mixed"}, {"bf16": True}),
    "no_sparsity": ({"sparsities": (0.0,)}, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_step_bit_for_bit(case, tmp_path):
    options, trainer, extra = CASES[case]
    options = {"sparsities": (0.5, 0.7, 0.9), "rho": 0.05, **options}
    dataset = digits(64 * 4)
    ours = lightning_loop(dataset, CrAM(**options), batch_size=64, default_root_dir=tmp_path, **trainer)
    expected = reference_loop(dataset, batch_size=64, **options, **extra)
    assert max_difference(ours, expected) == 0.0


def test_without_cram_the_oracle_differs(tmp_path):
    """The comparison above can fail."""
    dataset = digits(64 * 4)
    plain = lightning_loop(dataset, pl.Callback(), batch_size=64, default_root_dir=tmp_path)
    assert max_difference(plain, reference_loop(dataset, batch_size=64, sparsities=(0.5,), rho=0.05)) > 1e-3
