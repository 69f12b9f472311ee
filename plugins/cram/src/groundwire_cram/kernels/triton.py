"""The kernels as Triton programs, for f32, bf16 and f16 on a CUDA device.

With TRITON_INTERPRET=1 in the environment before the first import, they run on CPU tensors, slowly: that is for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire_cram.kernels import triton_kernels
from groundwire_cram.kernels.base import Part
from groundwire_cram.kernels.compiled import Compiled, Together
from groundwire_cram.kernels.reference import moved
from groundwire_cram.threshold import HIGH_BINS, LOW_BINS, Histogram

#: Entries of one program.
BLOCK = 1024
#: Histograms side by side, so that programs seldom wait for each other to count.
COPIES = 8


class Triton(Compiled):
    """Triton programs; see :class:`~groundwire_cram.kernels.base.Kernels`."""

    name = "triton"
    dtypes = frozenset({torch.float32, torch.bfloat16, torch.float16})

    def __init__(self) -> None:
        super().__init__()
        self.devices = frozenset({"cpu" if interpreted() else "cuda"})

    def _high(self, ours: list[Together], scale: float) -> Histogram:
        counts = {device: torch.zeros(COPIES, HIGH_BINS, dtype=torch.int32, device=device) for device in _devices(ours)}
        for w, g in ours:
            _launch(triton_kernels.count_high, w, g, w.numel(), scale, counts[w.device], COPIES=COPIES, BINS=HIGH_BINS)
        return sum((c.sum(0).cpu().numpy() for c in counts.values()), np.zeros(HIGH_BINS, np.int64))

    def _low(self, ours: list[Together], scale: float, bins: list[int]) -> Histogram:
        counts = {
            device: torch.zeros(len(bins), LOW_BINS, dtype=torch.int32, device=device) for device in _devices(ours)
        }
        for w, g in ours:
            for upper, row in zip(bins, counts[w.device], strict=True):
                _launch(triton_kernels.count_low, w, g, w.numel(), scale, upper, row)
        return sum((c.cpu().numpy() for c in counts.values()), np.zeros((len(bins), LOW_BINS), np.int64))

    def _other_high(self, others: Part) -> Histogram:
        return self._high(_moved_densely(others), 0.0)

    def _other_low(self, others: Part, bins: list[int]) -> Histogram:
        return self._low(_moved_densely(others), 0.0, bins)

    def _perturb(self, ours: list[Together], scale: float, threshold: float) -> None:
        for w, g, saved in ours:
            _launch(triton_kernels.perturb, w, g, saved, w.numel(), scale, threshold)

    def _combine(self, ours: list[Together], scale: float, threshold: float, plus: bool) -> None:
        for w, saved, first, second in ours:
            _launch(triton_kernels.combine, w, saved, first, second, w.numel(), scale, threshold, PLUS=plus)

    def _mask_groups(self, v: Tensor, target: Tensor, channels: int, positions: int, n: int, m: int) -> None:
        padded = 1 << (m - 1).bit_length()
        fixed = {"N": n, "M": m, "PADDED": padded}
        groups = v.numel() // m
        block = max(1, BLOCK // padded**2)
        _launch(triton_kernels.mask_groups, v, target, groups, channels, positions, items=groups, block=block, **fixed)


def interpreted() -> bool:
    """Return whether programs run in Triton's interpreter."""
    return "Interpreted" in type(triton_kernels.perturb).__name__


def _launch(
    program: Any, first: Tensor, *args: Any, items: int | None = None, block: int = BLOCK, **fixed: Any
) -> None:
    count = first.numel() if items is None else items
    if count:
        with _on(first.device):
            program[(-(-count // block),)](first, *args, **fixed, BLOCK=block, enable_fp_fusion=False)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device current: Triton launches on the current device, not on that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _devices(ours: list[Together]) -> set[torch.device]:
    return {together[0].device for together in ours}


def _moved_densely(others: Part) -> list[Together]:
    """Return moved weights where memory has no gaps, each with itself as gradient, to be counted at scale 0."""
    dense = (moved(w.detach(), g, others.scale).contiguous() for w, g in others.pairs)
    return [(v, v) for v in dense]
