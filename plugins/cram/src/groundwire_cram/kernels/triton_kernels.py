# Triton reads the annotations of parameters, so there are only its own.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: ANN001, ANN201, ANN202, N803
"""The kernels in Triton, over dense tensors of one dtype.

Products are rounded to the tensors' dtype before they are added; launch with ``enable_fp_fusion=False``, without which
the compiler would fuse the two in f32. A program works on BLOCK entries (or groups) from its number times BLOCK on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def jit(function: Callable[..., Any]) -> Any:
    """Compile for a GPU when first launched, or interpret if TRITON_INTERPRET=1 was set before this is imported."""
    return triton.jit(function)


@jit
def _rounded(v, like):
    """Return an f32 as one of those that the type of ``like`` has, the nearest, ties to even."""
    if like.dtype == tl.bfloat16:  # Triton's interpreter truncates to bf16.
        bits = v.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        v = tl.where(v == v, nearest.to(tl.float32, bitcast=True), v)
    return v.to(like.dtype).to(tl.float32)


@jit
def _moved(w, g, scale):
    """Return ``w + scale * g`` as f32, product and sum each rounded to the type of ``w``."""
    return _rounded(w.to(tl.float32) + _rounded(g.to(tl.float32) * scale, w), w)


@jit
def _bits(v):
    """Return the bits of the magnitude of an f32."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def perturb(w_at, g_at, saved_at, size, scale, threshold, BLOCK: tl.constexpr):
    """Set ``saved <- w``, ``w <- v if |v| > threshold else 0``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    w = tl.load(w_at + i, inside)
    v = _moved(w, tl.load(g_at + i, inside), scale)
    tl.store(saved_at + i, w, inside)
    tl.store(w_at + i, tl.where(tl.abs(v) <= threshold, 0.0, v).to(w.dtype), inside)


@jit
def combine(w_at, saved_at, first_at, second_at, size, scale, threshold, PLUS: tl.constexpr, BLOCK: tl.constexpr):
    """Set ``w <- saved``, ``second <- second * mask (+ first)``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    saved, first = tl.load(saved_at + i, inside), tl.load(first_at + i, inside)
    second = tl.load(second_at + i, inside).to(tl.float32)
    result = tl.where(tl.abs(_moved(saved, first, scale)) <= threshold, 0.0, second)
    if PLUS:
        result += first.to(tl.float32)
    tl.store(w_at + i, saved, inside)
    tl.store(second_at + i, _rounded(result, saved).to(saved.dtype), inside)


@jit
def count_high(w_at, g_at, size, scale, counts_at, COPIES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Add to one of COPIES of counts how many magnitudes have each upper half. Copies keep programs apart."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    upper = _bits(_moved(tl.load(w_at + i, inside), tl.load(g_at + i, inside), scale)) >> 16
    tl.atomic_add(counts_at + (program % COPIES) * BINS + upper, 1, inside, sem="relaxed")


@jit
def count_low(w_at, g_at, size, scale, upper, counts_at, BLOCK: tl.constexpr):
    """Add to counts how many magnitudes with this upper half have each lower half."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    bits = _bits(_moved(tl.load(w_at + i, inside), tl.load(g_at + i, inside), scale))
    tl.atomic_add(counts_at + (bits & 0xFFFF), 1, inside & (bits >> 16 == upper), sem="relaxed")


@jit
def mask_groups(
    v_at, target_at, groups, channels, positions, N: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Set zeros in a target at all but the N largest magnitudes of each group of M of ``v``.

    Groups are counted in the order (output, position, input channel), memory is (output, input channel, position).
    PADDED is the next power of two from M.
    """
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    member = tl.arange(0, PADDED)
    inside = (group < groups)[:, None] & (member < M)[None, :]
    place = group[:, None] * M + member[None, :]
    line = place // channels
    at = (line // positions * channels + place % channels) * positions + line % positions
    bits = tl.minimum(_bits(tl.load(v_at + at, inside).to(tl.float32)), 0x7F800001)
    mine, other = bits[:, :, None], bits[:, None, :]
    earlier = (member[None, :] < member[:, None])[None, :, :]
    lower = (other < mine) | ((other == mine) & earlier)
    rank = tl.sum((lower & (member < M)[None, None, :]).to(tl.int32), axis=2)
    tl.store(target_at + at, tl.zeros_like(rank).to(target_at.dtype.element_ty), inside & (rank < M - N))
