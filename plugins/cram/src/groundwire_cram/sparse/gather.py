"""The product of a sparse matrix with one vector, by a small C kernel that is compiled when it is first needed."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from groundwire_cram.sparse import compiler
from groundwire_cram.sparse.csr import CSR

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


class Kernel(NamedTuple):
    """The compiled function. A call through ctypes releases the GIL."""

    function: ctypes._NamedFuncPointer


def suits(columns: int, dtype: torch.dtype) -> bool:
    """Whether the kernel can hold a matrix of that many columns and that type.

    Example:
        >>> suits(4096, torch.float32), suits(4096, torch.float64), suits(100_000, torch.float32)
        (True, False, False)
    """
    return columns <= MOST_COLUMNS and dtype == torch.float32


@functools.cache
def load() -> Kernel | str:
    """The kernel, compiled at the first call on this machine; or why there is none."""
    library = compiler.library("gather_product", SOURCE)
    if isinstance(library, str):
        return library
    function = library.gather_product
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] + [ctypes.c_void_p] * 3
    function.restype = None
    return Kernel(function)


class Vector:
    """``W @ x + bias`` for one float32 vector x (in,)."""

    def __init__(self, csr: CSR) -> None:
        kernel = load()
        if isinstance(kernel, str):
            raise RuntimeError(kernel)
        self._function = kernel.function
        self._columns = csr.columns.numpy().astype(np.uint16)
        self._values, self._rows = csr.values.contiguous(), csr.rows.contiguous()
        self._out = len(csr.rows) - 1

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """From x (in,) to (out,). It asks for the pointers anew: sharing a tensor between processes moves it."""
        x, y = x.contiguous(), torch.empty(self._out)
        bias = None if bias is None else bias.contiguous()
        self._function(
            self._values.data_ptr(),
            self._columns.ctypes.data,
            self._rows.data_ptr(),
            self._out,
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
        )
        return y
