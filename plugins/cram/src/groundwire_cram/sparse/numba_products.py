"""Products of a sparse matrix by a dense one in Numba, for f32 on a CPU, on one thread and without the GIL.

Column indices are uint16, so a nonzero entry takes 6 bytes to read and not 8. Tensors come as the addresses of their
first entries. A vector type as wide as the batch tile lets the compiler use what the processor has. Several sums
run side by side, because one alone would wait for the latency of each addition. Product and sum may be fused.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import models, register_model

from groundwire_cram.kernels.jit import intrinsic, jit

#: Neighbouring columns taken at once. A vector wider than a register is kept in memory, which costs more than it gains.
_FEATURES = binding.get_host_cpu_features()
_WIDE = 16 if _FEATURES.get("avx512f") else 8 if _FEATURES.get("avx") else 4

_F32, _U16, _I32 = np.float32(0), np.uint16(0), np.int32(0)
_fused = partial(jit, fastmath={"contract"})


class _Vector(types.Type):
    """Numbers of type f32 side by side."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(f"f32x{lanes}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: _Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(ir.FloatType(), vector.lanes))  # type: ignore[no-untyped-call]


@partial(intrinsic, prefer_literal=True)
def _zeros(typing_context: Any, lanes: Any) -> Any:
    """Return a vector of zeros."""
    vector = _Vector(lanes.literal_value)
    return vector(lanes), lambda context, *_: ir.Constant(context.get_value_type(vector), [0.0] * vector.lanes)


@intrinsic
def _lanes(typing_context: Any, like: Any) -> Any:
    """Return the length of a vector."""
    return types.int64(like), lambda *_: ir.Constant(ir.IntType(64), like.lanes)


@intrinsic
def _vector(typing_context: Any, address: Any, like: Any) -> Any:
    """Load the vector at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], args[1].type.as_pointer()), align=4)

    return like(types.int64, like), generate


@intrinsic
def _put_vector(typing_context: Any, address: Any, vector: Any) -> Any:
    """Store a vector at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic
def _filled(typing_context: Any, value: Any, like: Any) -> Any:
    """Return a vector of ``value`` in every place."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        undefined = ir.Constant(args[1].type, ir.Undefined)
        index = ir.VectorType(ir.IntType(32), args[1].type.count)
        first = builder.insert_element(undefined, args[0], ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(index, None))

    return like(types.float32, like), generate


@intrinsic
def _plus(typing_context: Any, a: Any, b: Any) -> Any:
    """Return ``a + b``."""
    return a(a, b), lambda _context, builder, _signature, args: builder.fadd(*args)


@intrinsic
def _plus_product(typing_context: Any, total: Any, a: Any, b: Any) -> Any:
    """Return ``total + a * b``, by one instruction where there is one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], builder.fmul(args[1], args[2], flags=["contract"]), flags=["contract"])

    return total(total, a, b), generate


@intrinsic
def _entry(typing_context: Any, address: Any, index: Any, like: Any) -> Any:
    """Load entry ``index`` of those of the type of ``like`` from ``address`` on; an integer as int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = builder.load(builder.gep(builder.inttoptr(args[0], args[2].type.as_pointer()), [args[1]]))
        return found if result is like else context.cast(builder, found, like, result)

    result: Any = types.float32 if like == types.float32 else types.int64
    return result(types.int64, types.int64, like), generate


@intrinsic
def _put(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Store an f32 as entry ``index`` from ``address`` on."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], builder.gep(builder.inttoptr(args[0], args[2].type.as_pointer()), [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@_fused
def gather_product(values: Any, columns: Any, rows: Any, out: Any, bias: Any, x: Any, y: Any) -> None:
    """Set ``y <- W x + bias`` for one row x; an address 0 stands for no bias."""
    k = _entry(rows, 0, _I32)
    for i in range(out):
        a = _entry(bias, i, _F32) if bias else _F32
        b, c, d = _F32, _F32, _F32
        end = _entry(rows, i + 1, _I32)
        while k + 4 <= end:
            a += _entry(values, k, _F32) * _entry(x, _entry(columns, k, _U16), _F32)
            b += _entry(values, k + 1, _F32) * _entry(x, _entry(columns, k + 1, _U16), _F32)
            c += _entry(values, k + 2, _F32) * _entry(x, _entry(columns, k + 2, _U16), _F32)
            d += _entry(values, k + 3, _F32) * _entry(x, _entry(columns, k + 3, _U16), _F32)
            k += 4
        while k < end:
            a += _entry(values, k, _F32) * _entry(x, _entry(columns, k, _U16), _F32)
            k += 1
        _put(y, i, (a + b) + (c + d))


@_fused
def _term(values: Any, columns: Any, k: Any, x: Any, step: Any, total: Any) -> Any:
    """Return ``total`` plus entry k of W times its row of neighbouring columns of x."""
    neighbours = _vector(x + step * _entry(columns, k, _U16), total)
    return _plus_product(total, _filled(_entry(values, k, _F32), total), neighbours)


@_fused
def _row(values: Any, columns: Any, k: Any, end: Any, x: Any, step: Any, zero: Any) -> Any:
    """Return entries k to end of W times neighbouring columns of x (in, ...), whose rows are ``step`` bytes apart."""
    a, b, c, d = zero, zero, zero, zero
    while k + 4 <= end:
        a = _term(values, columns, k, x, step, a)
        b = _term(values, columns, k + 1, x, step, b)
        c = _term(values, columns, k + 2, x, step, c)
        d = _term(values, columns, k + 3, x, step, d)
        k += 4
    while k < end:
        a = _term(values, columns, k, x, step, a)
        k += 1
    return _plus(_plus(a, b), _plus(c, d))


@_fused
def _tile(
    values: Any,
    columns: Any,
    rows: Any,
    out: Any,
    bias: Any,
    x: Any,
    y: Any,
    into: Any,
    batch: Any,
    work: Any,
    zero: Any,
) -> None:
    """Multiply at most as many rows of x (batch, in) as ``zero`` is long; blocks of outputs fill whole cache lines.

    The rows are transposed into ``work`` (in, lanes), so that a nonzero weight meets its neighbours in the cache.
    """
    lanes = _lanes(zero)
    block = work + 4 * lanes * into
    for j in range(into):
        for t in range(lanes):
            _put(work, lanes * j + t, _entry(x, t * into + j, _F32) if t < batch else _F32)
    for i in range(0, out, lanes):
        count = min(lanes, out - i)
        for u in range(count):
            found = _row(
                values, columns, _entry(rows, i + u, _I32), _entry(rows, i + u + 1, _I32), work, 4 * lanes, zero
            )
            if bias:
                found = _plus(found, _filled(_entry(bias, i + u, _F32), zero))
            _put_vector(block + 4 * lanes * u, found)
        for t in range(batch):
            for u in range(count):
                _put(y, t * out + i + u, _entry(block, lanes * u + t, _F32))


@_fused
def rows_product(
    values: Any, columns: Any, rows: Any, out: Any, bias: Any, x: Any, y: Any, into: Any, batch: Any, work: Any
) -> None:
    """Set ``y <- x W^T + bias`` for x (batch, in) and y (batch, out); ``work`` has room for 16 * (in + 16)."""
    for b in range(0, batch, _WIDE):
        x_tile, y_tile, left = x + 4 * b * into, y + 4 * b * out, min(_WIDE, batch - b)
        if left <= 4:
            _tile(values, columns, rows, out, bias, x_tile, y_tile, into, left, work, _zeros(4))
        elif left <= 8:
            _tile(values, columns, rows, out, bias, x_tile, y_tile, into, left, work, _zeros(8))
        else:
            _tile(values, columns, rows, out, bias, x_tile, y_tile, into, left, work, _zeros(16))


@_fused
def columns_product(values: Any, columns: Any, rows: Any, out: Any, bias: Any, x: Any, y: Any, batch: Any) -> None:
    """Set ``y <- W x + bias`` for x (in, batch) and y (out, batch), batch >= 16; the last tile overlaps another."""
    zero = _zeros(_WIDE)
    for start in range(0, batch, _WIDE):
        b = min(start, batch - _WIDE)
        for i in range(out):
            found = _row(values, columns, _entry(rows, i, _I32), _entry(rows, i + 1, _I32), x + 4 * b, 4 * batch, zero)
            if bias:
                found = _plus(found, _filled(_entry(bias, i, _F32), zero))
            _put_vector(y + 4 * (i * batch + b), found)
