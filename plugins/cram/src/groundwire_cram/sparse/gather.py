"""The product of a sparse matrix with one vector, by a small C kernel that is compiled when it is first needed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from groundwire_cram.sparse import compiler
from groundwire_cram.sparse.csr import CSR, encode

#: Column indices are uint16: the kernel reads 6 bytes for a nonzero entry, not 8.
MOST_COLUMNS = 2**16

#: Four sums, because one would wait for the latency of each addition.
SOURCE = r"""
#include <stdint.h>

void gather_product(const float *values, const uint16_t *columns, const int32_t *rows, int64_t count, const float *bias,
                    const float *x, float *y) {
    for (int64_t i = 0; i < count; i++) {
        float a = bias ? bias[i] : 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
        int64_t k = rows[i], end = rows[i + 1];
        for (; k + 4 <= end; k += 4) {
            a += values[k] * x[columns[k]];
            b += values[k + 1] * x[columns[k + 1]];
            c += values[k + 2] * x[columns[k + 2]];
            d += values[k + 3] * x[columns[k + 3]];
        }
        for (; k < end; k++) a += values[k] * x[columns[k]];
        y[i] = (a + b) + (c + d);
    }
}
"""


def suits(columns: int, dtype: torch.dtype) -> bool:
    """Whether the kernel can take a matrix of that many columns and that type.

    Example:
        >>> suits(4096, torch.float32), suits(4096, torch.float64), suits(100_000, torch.float32)
        (True, False, False)
    """
    return columns <= MOST_COLUMNS and dtype == torch.float32


@functools.cache
def load() -> Callable[..., None] | str:
    """The C function, compiled at the first call on this machine; or why there is none. Its calls release the GIL."""
    library = compiler.library("gather_product", SOURCE)
    if isinstance(library, str):
        return library
    function = library.gather_product
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] + [ctypes.c_void_p] * 3
    function.restype = None
    return function if _correct(function) else "the compiled kernel computes wrongly -> try another compiler with CC"


def ready() -> bool:
    """Whether there is a kernel."""
    return not isinstance(load(), str)


def narrowed(columns: Tensor) -> Tensor:
    """Column indices as the kernel takes them, uint16."""
    return columns.to(torch.uint16)


def product(csr: CSR, narrow: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """``x @ W.T + bias`` for one row, in float32.

    Args:
        csr: W (out, in), in float32 and with at most 65536 columns.
        narrow: Its columns as :func:`narrowed`.
        bias: (out,) or None.
        x: (1, in).

    Returns:
        (1, out).
    """
    function = load()
    if isinstance(function, str):
        raise RuntimeError(function)
    return _call(function, csr, narrow, bias, x)


def _call(function: Callable[..., None], csr: CSR, narrow: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    out = len(csr.rows) - 1
    y = torch.empty(1, out)
    shift = None if bias is None else bias.data_ptr()
    function(csr.values.data_ptr(), narrow.data_ptr(), csr.rows.data_ptr(), out, shift, x.data_ptr(), y.data_ptr())
    return y


def _correct(function: Callable[..., None]) -> bool:
    """A compiler with a fault must not decide what a model says: small integers have one exact answer."""
    weight = (torch.arange(7 * 45) % 5).view(7, 45).float()
    csr, x, bias = encode(weight), torch.arange(45.0), torch.arange(7.0)
    return torch.equal(_call(function, csr, narrowed(csr.columns), bias, x[None])[0], (weight * x).sum(1) + bias)
