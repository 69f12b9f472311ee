"""Products of a pruned weight by a batch: by MKL, by kernels compiled with Numba, and as an operator of torch.

MKL takes the product of W (out, in) with a batch x (B, in) as ``W @ x.T``, W in CSR with int32 indices and ``x.T`` made
contiguous: then it streams over columns of the batch. ``F.linear(x, W)`` on the same W leaves x as it is, and loses to
dense. A batch larger than the tile goes in parts, because ``x.T`` of a part stays in the cache.

The Numba kernels read less, with columns of 16 bits, and take one row too. With AVX-512 they are 1.4 to 2.5 times as
fast as MKL's product. Each product runs on one thread.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from groundwire_cram.sparse.csr import CSR, matrix

#: Columns of ``x.T`` per product of MKL. Of 8 to 128, 32 was best or within 5 % of it for n = 1024 to 4096, batch 128.
TILE = 32
#: Columns that a 16-bit index can tell apart.
MOST_COLUMNS = 2**16
#: Neighbouring columns that a Numba kernel takes at once, at most.
LANES = 16


def mkl_times_columns(weight: Tensor, bias: Tensor | None, x: Tensor, tile: int | None = TILE) -> Tensor:
    """Return ``weight @ x + bias[:, None]`` for a sparse weight (out, in) and x (in, B).

    Args:
        weight: Sparse CSR tensor.
        bias: (out,) or None.
        x: Dense, any strides.
        tile: Columns per product; None for all at once.

    Returns:
        (out, B), contiguous.
    """
    parts = [weight @ part.contiguous() for part in _parts(x, 1, tile)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return y if bias is None else y.add_(bias[:, None])


def mkl_times_rows(weight: Tensor, bias: Tensor | None, x: Tensor, tile: int | None = TILE) -> Tensor:
    """Return ``x @ weight.T + bias`` for a sparse weight (out, in) and x (B, in), by columns of the transposed.

    Returns:
        (B, out), contiguous as that of ``F.linear``.
    """
    y = torch.cat([(weight @ part.t().contiguous()).t() for part in _parts(x, 0, tile)])
    return y if bias is None else y.add_(bias)


def _parts(x: Tensor, dim: int, tile: int | None) -> tuple[Tensor, ...]:
    return (x,) if tile is None else x.chunk(max(1, -(-x.shape[dim] // tile)), dim)


def suits_numba(columns: int, dtype: torch.dtype) -> bool:
    """Return whether the Numba kernels can take a matrix of that many columns and that type.

    Example:
        >>> suits_numba(4096, torch.float32), suits_numba(4096, torch.float64), suits_numba(100_000, torch.float32)
        (True, False, False)
    """
    return columns <= MOST_COLUMNS and dtype == torch.float32


@functools.cache
def load_numba() -> Any:
    """Return the module of the Numba kernels, which are compiled when they are first called; or why there is none."""
    try:
        import groundwire_cram.sparse.numba_products as kernels
    except ImportError as error:
        return f"numba cannot be imported here ({error}) -> pip install numba"
    return kernels


def has_numba() -> bool:
    """Return whether there are Numba kernels."""
    return not isinstance(load_numba(), str)


def numba_times_rows(csr: CSR, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return ``x @ W.T + bias`` for a float32 W (out, in) of at most 65536 columns.

    Args:
        csr: W, its columns narrowed.
        bias: (out,) or None.
        x: (B, in), float32.

    Returns:
        (B, out), contiguous.
    """
    kernels, x = load_numba(), x.contiguous()
    batch, into = x.shape
    y = torch.empty(batch, csr.rows.shape[0] - 1)
    weight, _held = _addresses(csr, bias)
    if batch == 1:
        kernels.gather_product(*weight, x.data_ptr(), y.data_ptr())
    else:
        work = torch.empty(LANES * (into + LANES))
        kernels.rows_product(*weight, x.data_ptr(), y.data_ptr(), into, batch, work.data_ptr())
    return y


def numba_times_columns(csr: CSR, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return ``W @ x[n] + bias[:, None]`` for each image n.

    Args:
        csr: W (out, in), its columns narrowed.
        bias: (out,) or None.
        x: (N, in, B), float32, B at least 16.

    Returns:
        (N, out, B), contiguous.
    """
    kernels, x = load_numba(), x.contiguous()
    count, _, batch = x.shape
    y = torch.empty(count, csr.rows.shape[0] - 1, batch)
    weight, _held = _addresses(csr, bias)
    for image, result in zip(x.unbind(), y.unbind(), strict=True):
        kernels.columns_product(*weight, image.data_ptr(), result.data_ptr(), batch)
    return y


def _addresses(csr: CSR, bias: Tensor | None) -> tuple[tuple[int, ...], Any]:
    """Return the arguments of a kernel that tell the weight, and the tensors that must live until it returns."""
    held = (csr.values.contiguous(), csr.columns.contiguous(), csr.rows.contiguous())
    shift = None if bias is None else bias.contiguous()
    address = 0 if shift is None else shift.data_ptr()
    return (*(t.data_ptr() for t in held), csr.rows.shape[0] - 1, address), (held, shift)


@torch.library.custom_op("groundwire_cram::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None, tile: int | None
) -> Tensor:
    """Return ``x @ W.T + bias``: one step for ``torch.compile`` and ``torch.export``.

    Args:
        x: (B, in).
        values: Nonzero weights, row by row.
        columns: Their columns: narrowed to take the Numba product, int32 for that of MKL.
        row_starts: Where each row starts, int32 (out + 1,).
        bias: (out,) or None.
        tile: Rows per product of MKL, None for all at once.

    Returns:
        (B, out).
    """
    csr = CSR(values, columns, row_starts)
    if columns.dtype == torch.int16 and x.dtype == values.dtype == torch.float32 and has_numba():
        return numba_times_rows(csr, bias, x)
    return mkl_times_rows(matrix(csr, x.shape[1]), bias, x, tile)


@sparse_linear.register_fake
def _(x: Tensor, values: Tensor, columns: Tensor, row_starts: Tensor, bias: Tensor | None, tile: int | None) -> Tensor:
    return x.new_empty(x.shape[0], row_starts.shape[0] - 1)
