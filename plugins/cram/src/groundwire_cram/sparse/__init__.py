"""Sparse inference: pruned layers that run faster than dense ones, on the machine where that was measured."""

from groundwire_cram.sparse.layers import SparseConv, SparseLinear
from groundwire_cram.sparse.report import LayerRow, SparsityReport
from groundwire_cram.sparse.sparsify import densify, sparsify, sparsity_report

__all__ = [
    "LayerRow",
    "SparseConv",
    "SparseLinear",
    "SparsityReport",
    "densify",
    "sparsify",
    "sparsity_report",
]
