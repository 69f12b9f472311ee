"""The kernels in Numba. They release the GIL and never call Python.

Tensors come as a table, so that one call works on hundreds of small ones: each row has the addresses of the tensors
that belong together and, last, how many entries they have. ``like`` tells the type of the entries: float32, or uint16
for the bits of bf16. Nothing is compiled with fastmath: every product is
rounded before it is added.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types

from groundwire_cram.kernels.jit import intrinsic, jit, overload

carray: Any = numba.carray  # type: ignore[attr-defined]

#: Entries in a block that stays in the innermost cache between two loops over it.
BLOCK = 1024
#: Entries that are looked at together for one of a rare kind.
GLANCE = 64
#: Bits of a magnitude that is not a number, for one that counts as largest.
_NAN = 0x7F800001


@intrinsic
def _bits(typing_context: Any, value: Any) -> Any:
    """Reinterpret an f32 as its bits."""
    return types.uint32(types.float32), lambda _context, builder, _type, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _f32(typing_context: Any, bits: Any) -> Any:
    """Reinterpret bits as an f32."""
    return types.float32(types.uint32), lambda _context, builder, _type, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """Return ``address`` as the place of an entry of the type of ``like``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    pointer: Any = types.CPointer(like)  # type: ignore[no-untyped-call]
    return pointer(address, like), generate


@jit
def _tensor(row: Any, index: int, like: Any) -> Any:
    return carray(_pointer(row[index], like), (row[-1],))


def _number(entry: Any) -> Any:
    """Return an entry as f32."""


def _entry(number: Any, like: Any) -> Any:
    """Return an f32 as an entry of the type of ``like``, rounded to nearest, ties to even."""


@overload(_number)
def _typed_number(entry: Any) -> Any:
    if entry == types.float32:
        return lambda entry: entry
    return lambda entry: _f32(np.uint32(entry) << np.uint32(16))


@overload(_entry)
def _typed_entry(number: Any, like: Any) -> Any:
    if like == types.float32:
        return lambda number, like: number
    return lambda number, like: _bf16(number)


@jit
def _bf16(number: Any) -> Any:
    bits = _bits(number)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)) if number == number else np.uint16(0x7FC0)


@jit
def _sum(a: Any, b: Any) -> Any:
    return _entry(_number(a) + _number(b), a)


@jit
def _moved(w: Any, g: Any, scale: Any) -> Any:
    """Return an entry of ``w + scale * g``, product and sum each rounded to the type of the entries."""
    return _sum(w, _entry(_number(g) * scale, g))


@jit
def _magnitude(v: Any) -> Any:
    return _bits(_number(v)) & np.uint32(0x7FFFFFFF)


@jit
def _masked(entry: Any, v: Any, threshold: Any) -> Any:
    """Return ``entry``, or zero where ``|v| <= threshold``, so not where v is NaN."""
    return _entry(np.float32(0), entry) if abs(_number(v)) <= threshold else entry


@jit
def perturb(table: Any, like: Any, scale: Any, threshold: Any) -> None:
    """Set ``saved <- w``, ``w <- v if |v| > threshold else 0``; rows are w, g, saved."""
    for row in table:
        w, g, saved = _tensor(row, 0, like), _tensor(row, 1, like), _tensor(row, 2, like)
        for i in range(len(w)):
            v = _moved(w[i], g[i], scale)
            saved[i] = w[i]
            w[i] = _masked(v, v, threshold)


@jit
def combine(table: Any, like: Any, scale: Any, threshold: Any, plus: bool) -> None:
    """Set ``w <- saved``, ``second <- second * mask (+ first)``; rows are w, saved, first, second."""
    for row in table:
        w, saved = _tensor(row, 0, like), _tensor(row, 1, like)
        first, second = _tensor(row, 2, like), _tensor(row, 3, like)
        if plus:
            for i in range(len(w)):
                masked = _masked(second[i], _moved(saved[i], first[i], scale), threshold)
                w[i] = saved[i]
                second[i] = _sum(masked, first[i])
        else:
            for i in range(len(w)):
                second[i] = _masked(second[i], _moved(saved[i], first[i], scale), threshold)
                w[i] = saved[i]


@jit
def count_high(table: Any, like: Any, scale: Any, counts: Any) -> None:
    """Add to ``counts`` how many magnitudes have each upper half; rows are w, g."""
    upper = np.empty(BLOCK, np.uint16)
    for row in table:
        w, g = _tensor(row, 0, like), _tensor(row, 1, like)
        for start in range(0, len(w), BLOCK):
            # A slice has no negative indices, which the compiler would otherwise have to allow for.
            w_block, g_block = w[start : start + BLOCK], g[start : start + BLOCK]
            for i in range(len(w_block)):
                upper[i] = _magnitude(_moved(w_block[i], g_block[i], scale)) >> np.uint32(16)
            for i in range(len(w_block)):
                counts[upper[i]] += 1


@jit
def count_low(table: Any, like: Any, scale: Any, uppers: Any, counts: Any) -> None:
    """Add to ``counts[j]`` how many magnitudes with the upper half ``uppers[j]`` have each lower half."""
    block = np.empty(GLANCE, np.uint32)
    for row in table:
        w, g = _tensor(row, 0, like), _tensor(row, 1, like)
        for start in range(0, len(w), GLANCE):
            w_block, g_block = w[start : start + GLANCE], g[start : start + GLANCE]
            for i in range(len(w_block)):
                block[i] = _magnitude(_moved(w_block[i], g_block[i], scale))
            for j in range(len(uppers)):
                _count_rare(block[: len(w_block)], uppers[j], counts[j])


@jit
def _count_rare(magnitudes: Any, upper: Any, counts: Any) -> None:
    found = np.uint32(0)
    for i in range(len(magnitudes)):
        found += np.uint32(magnitudes[i] >> np.uint32(16) == upper)
    if found:
        for i in range(len(magnitudes)):
            if magnitudes[i] >> np.uint32(16) == upper:
                counts[magnitudes[i] & np.uint32(0xFFFF)] += 1


@jit
def mask_groups(table: Any, like: Any, n: int, m: int) -> None:
    """Set zeros in a target at all but the n largest magnitudes of some groups of ``v``.

    Rows are v, target, input channels, positions, first group, number of groups. Groups are counted in the order
    (output, position, input channel), memory is (output, input channel, position). Ranks come from comparing each
    pair; an earlier entry of the same magnitude ranks lower.
    """
    zero = _entry(np.float32(0), like)
    at, magnitudes, ranks = np.empty(m, np.int64), np.empty(m, np.uint32), np.empty(m, np.int64)
    for v_at, target_at, channels, positions, first, groups in table:
        size = (first + groups) * m
        v, target = carray(_pointer(v_at, like), (size,)), carray(_pointer(target_at, like), (size,))
        line, channel = divmod(first * m, channels)
        output, position = divmod(line, positions)
        for _ in range(groups):
            for j in range(m):
                at[j] = (output * channels + channel) * positions + position
                magnitudes[j] = min(_magnitude(v[at[j]]), np.uint32(_NAN))
                ranks[j] = 0
                channel += 1
                if channel == channels:
                    channel = 0
                    position += 1
                    if position == positions:
                        position = 0
                        output += 1
            _rank(magnitudes, ranks)
            for j in range(m):
                if ranks[j] < m - n:
                    target[at[j]] = zero


@jit
def _rank(magnitudes: Any, ranks: Any) -> None:
    for late in range(1, len(magnitudes)):
        for early in range(late):
            smaller = magnitudes[early] <= magnitudes[late]
            ranks[late] += smaller
            ranks[early] += not smaller
