"""Products of a sparse matrix by small C kernels that are compiled when they are first needed.

Column indices are uint16, so a nonzero entry takes 6 bytes to read and not 8. Each product runs on one thread, and
without the GIL. Built with AVX-512 they are 1.4 to 2.5 times as fast as MKL's product.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groundwire_cram.sparse import compiler
from groundwire_cram.sparse.csr import CSR, encode, narrowed
from groundwire_cram.sparse.source import SOURCE

MOST_COLUMNS = 2**16
#: Neighbouring columns that a kernel takes at once, at most.
LANES = 16
_Call = Callable[..., None]


class Kernels(NamedTuple):
    """The C functions: one row, rows (B, in), and columns (in, B) of at least 16."""

    gather: _Call
    rows: _Call
    columns: _Call


def suits(columns: int, dtype: torch.dtype) -> bool:
    """Whether the kernels can take a matrix of that many columns and that type.

    Example:
        >>> suits(4096, torch.float32), suits(4096, torch.float64), suits(100_000, torch.float32)
        (True, False, False)
    """
    return columns <= MOST_COLUMNS and dtype == torch.float32


@functools.cache
def load() -> Kernels | str:
    """The kernels, compiled at the first call on this machine; or why there are none."""
    library = compiler.library("sparse", SOURCE)
    if isinstance(library, str):
        return library
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    common = [pointer] * 3 + [size] + [pointer] * 3
    library.gather_product.argtypes = common
    library.rows_product.argtypes = [*common, size, size, pointer]
    library.columns_product.argtypes = [*common, size]
    kernels = Kernels(library.gather_product, library.rows_product, library.columns_product)
    for function in kernels:
        function.restype = None  # type: ignore[attr-defined]
    return kernels if _correct(kernels) else "the compiled kernels compute wrongly -> name another compiler in CC"


def ready() -> bool:
    """Whether there are kernels."""
    return not isinstance(load(), str)


def times_rows(csr: CSR, bias: Tensor | None, x: Tensor) -> Tensor:
    """``x @ W.T + bias`` for a float32 W (out, in) of at most 65536 columns.

    Args:
        csr: W, its columns narrowed.
        bias: (out,) or None.
        x: (B, in), float32.

    Returns:
        (B, out), contiguous.
    """
    return _rows(_kernels(), csr, bias, x)


def times_columns(csr: CSR, bias: Tensor | None, x: Tensor) -> Tensor:
    """``W @ x[n] + bias[:, None]`` for each image n.

    Args:
        csr: W (out, in), its columns narrowed.
        bias: (out,) or None.
        x: (N, in, B), float32, B at least 16.

    Returns:
        (N, out, B), contiguous.
    """
    return _columns(_kernels(), csr, bias, x)


def _kernels() -> Kernels:
    kernels = load()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    return kernels


def _rows(kernels: Kernels, csr: CSR, bias: Tensor | None, x: Tensor) -> Tensor:
    csr, x, bias = _flat(csr), x.contiguous(), None if bias is None else bias.contiguous()
    batch, into = x.shape
    y = torch.empty(batch, csr.rows.shape[0] - 1)
    if batch == 1:
        kernels.gather(*_weight(csr, bias), x.data_ptr(), y.data_ptr())
    else:
        work = torch.empty(LANES * into)
        kernels.rows(*_weight(csr, bias), x.data_ptr(), y.data_ptr(), into, batch, work.data_ptr())
    return y


def _columns(kernels: Kernels, csr: CSR, bias: Tensor | None, x: Tensor) -> Tensor:
    csr, x, bias = _flat(csr), x.contiguous(), None if bias is None else bias.contiguous()
    count, _, batch = x.shape
    y = torch.empty(count, csr.rows.shape[0] - 1, batch)
    for image, result in zip(x.unbind(), y.unbind(), strict=True):
        kernels.columns(*_weight(csr, bias), image.data_ptr(), result.data_ptr(), batch)
    return y


def _flat(csr: CSR) -> CSR:
    return CSR(csr.values.contiguous(), csr.columns.contiguous(), csr.rows.contiguous())


def _weight(csr: CSR, bias: Tensor | None) -> tuple[Any, ...]:
    shift = None if bias is None else bias.data_ptr()
    return csr.values.data_ptr(), csr.columns.data_ptr(), csr.rows.data_ptr(), csr.rows.shape[0] - 1, shift


def _correct(kernels: Kernels) -> bool:
    """A compiler with a fault must not decide what a model says: small integers have one exact answer."""
    weight = (torch.arange(21 * 45) % 5).view(21, 45).float()
    csr, bias = encode(weight), torch.arange(21.0)
    csr = csr._replace(columns=narrowed(csr.columns))
    for batch in (1, 3, 5, 30):
        x = (torch.arange(batch * 45.0) % 7).view(batch, 45)
        wanted = (weight[None] * x[:, None]).sum(2) + bias
        if not torch.equal(_rows(kernels, csr, bias, x), wanted):
            return False
    return torch.equal(_columns(kernels, csr, bias, x.t()[None])[0], wanted.t())
