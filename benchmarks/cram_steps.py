"""What a step of CrAM costs: the optimizer's part at 25.5 million parameters, and a whole step of a ResNet20."""

from __future__ import annotations

import time
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import torch
from cram_kernels import resnet50_shapes
from measure import Row, interleaved
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from groundwire_cram import CrAM, CrAMOptimizer


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without weights, as in the CIFAR ResNets."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x):
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(short, (0, 0, 0, 0, 0, out.shape[1] - x.shape[1])))


class ResNet20(pl.LightningModule):
    """The 272 474-parameter network of CIFAR-10; notes the seconds of its steps after the first."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        blocks = [Block(a, b) for a, b in pairwise(widths)]
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        self.seconds: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.body(self.stem(x)), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    def on_train_batch_start(self, batch, batch_idx):
        self.begin = time.perf_counter()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seconds.append(time.perf_counter() - self.begin)


def seconds_a_step(steps: int, batch: int, with_cram: bool) -> float:
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(batch * (steps + 1), 3, 32, 32), torch.randint(10, (batch * (steps + 1),)))
    model = ResNet20()
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[CrAM((0.5, 0.7, 0.9))] if with_cram else [],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=batch))
    return min(model.seconds[1:])


def optimizer_part(repeats: int) -> list[Row]:
    """All of ``CrAMOptimizer.step`` but its passes, with the user's fused SGD, beside copying the parameters once."""
    torch.manual_seed(0)
    weights, first, second = ([torch.randn(s) * 0.02 for s in resnet50_shapes()] for _ in range(3))
    parameters = [nn.Parameter(w) for w in weights]
    optimizer = CrAMOptimizer(torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=True), 0.9)
    source = torch.cat([w.flatten() for w in weights])
    target = torch.empty_like(source)
    kept = torch.cat([g.flatten() for g in second])

    def closure() -> None:
        for parameter, grad in zip(parameters, second, strict=True):
            parameter.grad = grad

    def step() -> float:
        for parameter, grad in zip(parameters, first, strict=True):
            parameter.grad = grad
        begin = time.perf_counter()
        optimizer.step(closure)
        seconds = time.perf_counter() - begin
        for grad, values in zip(second, kept.split([g.numel() for g in second]), strict=True):
            grad.copy_(values.view_as(grad))  # it was overwritten with the step's gradient
        return seconds

    def copy() -> float:
        begin = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - begin

    found = interleaved("CrAMOptimizer, 25.5 M parameters", repeats, {"copy": copy, "step": step})
    ratios = [whole / mc for whole, mc in zip(found["step"], found["copy"], strict=True)]
    return [Row("CrAMOptimizer.step without passes, fused SGD, 1 thread", "mc", ratios, 10.5)]


def measure(quick: bool) -> list[Row]:
    """The optimizer's part, and the ratio of a step with CrAM to one without, in the same run."""
    torch.set_num_threads(1)
    rows = optimizer_part(3 if quick else 15)
    steps, batch = (2, 32) if quick else (6, 128)
    ways = {str(cram): partial(seconds_a_step, steps, batch, cram) for cram in (False, True)}
    found = interleaved("ResNet20 steps", 2 if quick else 7, ways)
    ratios = [cram / sgd for sgd, cram in zip(found["False"], found["True"], strict=True)]
    return [*rows, Row(f"ResNet20, batch {batch}, step with CrAM / without", "", ratios, None if quick else 2.03)]
