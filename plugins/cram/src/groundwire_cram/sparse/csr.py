"""Compressed sparse rows: the format of a pruned weight."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor


class CSR(NamedTuple):
    """Matrix as its nonzero ``values`` row by row, their ``columns``, and where each row starts (int32).

    The columns are int32, or uint16 for the Numba products (:func:`narrowed`).
    """

    values: Tensor
    columns: Tensor
    rows: Tensor


def encode(weight: Tensor) -> CSR:
    """Return the nonzero entries of ``weight`` (out, in); NaN counts as nonzero.

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
    """Return int32 columns below 65536 as uint16, seen as int16 because torch cannot pickle the former.

    Example:
        >>> narrowed(torch.tensor([1, 40000], dtype=torch.int32))
        tensor([     1, -25536], dtype=torch.int16)
    """
    return columns.to(torch.uint16).view(torch.int16)


def widened(columns: Tensor) -> Tensor:
    """Return columns as int32, from either form.

    Example:
        >>> widened(torch.tensor([1, -25536], dtype=torch.int16))
        tensor([    1, 40000], dtype=torch.int32)
    """
    return columns.view(torch.uint16).to(torch.int32) if columns.dtype == torch.int16 else columns


def decode(csr: CSR, columns: int) -> Tensor:
    """Return the dense matrix (out, columns).

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
    """Return a torch sparse CSR tensor, on the same memory if the columns are int32; its invariants are not checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            csr.rows, widened(csr.columns), csr.values, (len(csr.rows) - 1, columns), check_invariants=False
        )


def problem(csr: CSR, out_features: int, in_features: int) -> str | None:
    """Say what is wrong with ``csr`` as a matrix of that shape, or None. A wrong index would read at random.

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
