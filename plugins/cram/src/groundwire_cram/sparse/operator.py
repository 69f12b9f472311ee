"""The sparse product as an operator of torch, so that ``torch.compile`` and ``torch.export`` take it as one step."""

from __future__ import annotations

import torch
from torch import Tensor

from groundwire_cram.sparse import compiled
from groundwire_cram.sparse import csr as formats


@torch.library.custom_op("groundwire_cram::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    tile: int | None,
) -> Tensor:
    """``x @ W.T + bias`` as :class:`~groundwire_cram.sparse.SparseLinear` computes it.

    Args:
        x: (B, in).
        values: Nonzero weights, row by row.
        columns: Their columns: narrowed to take the compiled product, int32 for that of MKL.
        row_starts: Where each row starts, int32 (out + 1,).
        bias: (out,) or None.
        tile: Rows per product of MKL, None for all at once.

    Returns:
        (B, out).
    """
    csr = formats.CSR(values, columns, row_starts)
    if columns.dtype == torch.int16 and x.dtype == values.dtype == torch.float32 and compiled.ready():
        return compiled.times_rows(csr, bias, x)
    return formats.times_rows(formats.matrix(csr, x.shape[1]), bias, x, tile)


@sparse_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_starts: Tensor,
    bias: Tensor | None,
    tile: int | None,
) -> Tensor:
    return x.new_empty(x.shape[0], row_starts.shape[0] - 1)
