"""Compressed sparse rows: the format, and the product that beats the dense one.

The product of a layer's weight W (out, in) with a batch x (B, in) is taken as ``W @ x.T``, W in CSR with int32 indices
and ``x.T`` made contiguous: then MKL streams over columns of the batch. ``F.linear(x, W)`` on the same W leaves x as it
is, and loses to dense. A batch larger than the tile goes in parts, because ``x.T`` of a part stays in the cache.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

#: Columns of ``x.T`` per product. Of 8 to 128, 32 was best or within 5 % of it for n = 1024 to 4096 at batch 128.
TILE = 32


class CSR(NamedTuple):
    """A matrix as its nonzero ``values`` row by row, their ``columns``, and where each row starts (int32).

    The columns are int32, or uint16 for the compiled products (:func:`narrowed`).
    """

    values: Tensor
    columns: Tensor
    rows: Tensor


def encode(weight: Tensor) -> CSR:
    """The nonzero entries of ``weight`` (out, in); NaN counts as nonzero.

    Example:
        >>> encode(torch.tensor([[0.0, 2.0], [0.0, 0.0], [3.0, 4.0]]))
        CSR(values=tensor([2., 3., 4.]), columns=tensor([1, 0, 1], dtype=torch.int32),
            rows=tensor([0, 1, 1, 3], dtype=torch.int32))
    """
    nonzero = weight.detach() != 0
    rows = torch.zeros(len(weight) + 1, dtype=torch.int32, device=weight.device)
    rows[1:] = nonzero.sum(1).cumsum(0)
    columns = nonzero.nonzero()[:, 1].to(torch.int32)
    return CSR(weight.detach()[nonzero].contiguous(), columns.contiguous(), rows)


def narrowed(columns: Tensor) -> Tensor:
    """Int32 columns below 65536 as uint16, seen as int16 because torch cannot pickle the former.

    Example:
        >>> narrowed(torch.tensor([1, 40000], dtype=torch.int32))
        tensor([     1, -25536], dtype=torch.int16)
    """
    return columns.to(torch.uint16).view(torch.int16)


def widened(columns: Tensor) -> Tensor:
    """Columns as int32, from either form.

    Example:
        >>> widened(torch.tensor([1, -25536], dtype=torch.int16))
        tensor([    1, 40000], dtype=torch.int32)
    """
    return columns.view(torch.uint16).to(torch.int32) if columns.dtype == torch.int16 else columns


def decode(csr: CSR, columns: int) -> Tensor:
    """The dense matrix (out, columns).

    Example:
        >>> decode(encode(torch.eye(2)), 2)
        tensor([[1., 0.],
                [0., 1.]])
    """
    dense = csr.values.new_zeros(len(csr.rows) - 1, columns)
    row = torch.repeat_interleave(torch.arange(len(dense)), csr.rows.diff().long())
    dense[row, widened(csr.columns).long()] = csr.values
    return dense


def matrix(csr: CSR, columns: int) -> Tensor:
    """A torch sparse CSR tensor, on the same memory if the columns are int32. The caller vouches for the invariants."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            csr.rows, widened(csr.columns), csr.values, (len(csr.rows) - 1, columns), check_invariants=False
        )


def problem(csr: CSR, out_features: int, in_features: int) -> str | None:
    """What is wrong with ``csr`` as a matrix (out_features, in_features), or None. A wrong index would read at random.

    Example:
        >>> problem(encode(torch.eye(2)), 2, 1)
        'a column index is outside [0, 1)'
    """
    values, columns, rows = csr
    if rows.dtype != torch.int32 or columns.dtype not in (torch.int32, torch.int16):
        return f"columns must be int32 or int16 and row starts int32, got {columns.dtype} and {rows.dtype}"
    columns = widened(columns)
    if rows.shape != (out_features + 1,):
        return f"{len(rows) - 1} rows where {out_features} are needed"
    if values.dim() != 1 or values.shape != columns.shape:
        return f"{tuple(values.shape)} values but {tuple(columns.shape)} columns"
    if rows[0] != 0 or rows[-1] != len(values) or bool((rows.diff() < 0).any()):
        return "row starts do not rise from 0 to the number of values"
    if len(columns) and (int(columns.min()) < 0 or int(columns.max()) >= in_features):
        return f"a column index is outside [0, {in_features})"
    return None


def times_columns(weight: Tensor, bias: Tensor | None, x: Tensor, tile: int | None = TILE) -> Tensor:
    """``weight @ x + bias[:, None]`` for a sparse weight (out, in) and x (in, B).

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


def times_rows(weight: Tensor, bias: Tensor | None, x: Tensor, tile: int | None = TILE) -> Tensor:
    """``x @ weight.T + bias`` for a sparse weight (out, in) and x (B, in), as :func:`times_columns` of the transposed.

    Returns:
        (B, out), contiguous as that of ``F.linear``.
    """
    y = torch.cat([(weight @ part.t().contiguous()).t() for part in _parts(x, 0, tile)])
    return y if bias is None else y.add_(bias)


def _parts(x: Tensor, dim: int, tile: int | None) -> tuple[Tensor, ...]:
    return (x,) if tile is None else x.chunk(max(1, -(-x.shape[dim] // tile)), dim)
