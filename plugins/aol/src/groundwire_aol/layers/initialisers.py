"""Raw weights that the rescale leaves as they are, so that signals neither grow nor vanish at the start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from groundwire_aol.layers.rescale import Geometry, Side, chosen_side


def _centre(weight: Tensor) -> tuple[int, ...]:
    return tuple((size - 1) // 2 for size in weight.shape[2:])


def _matrices(weight: Tensor, groups: int) -> Tensor:
    """The centre tap, one matrix per group; a view."""
    return weight[(..., *_centre(weight))].unflatten(0, (groups, -1))  # type: ignore[index,no-any-return,no-untyped-call]


@torch.no_grad()
def identity_centre_(weight: Tensor, groups: int = 1) -> Tensor:
    """Zero everywhere, the identity at the centre tap (of the first channels, if the numbers differ).

    Args:
        weight: Of a Linear or convolution layer, changed in place.
        groups: Of the layer.

    Example:
        >>> identity_centre_(torch.empty(1, 1, 3)).flatten().tolist()
        [0.0, 1.0, 0.0]
    """
    weight.zero_()
    for matrix in _matrices(weight, groups):
        matrix.fill_diagonal_(1.0)
    return weight


@torch.no_grad()
def orthogonal_centre_(weight: Tensor, groups: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Zero everywhere, a random (semi-)orthogonal matrix at the centre tap.

    Example:
        >>> w = orthogonal_centre_(torch.empty(3, 2, 3, 3))[:, :, 1, 1]
        >>> bool(torch.allclose(w.T @ w, torch.eye(2), atol=1e-6))
        True
    """
    weight.zero_()
    for matrix in _matrices(weight, groups):
        matrix.copy_(
            nn.init.orthogonal_(torch.empty_like(matrix, memory_format=torch.contiguous_format), generator=generator)
        )
    return weight


@torch.no_grad()
def nearest_orthogonal_(weight: Tensor, geometry: Geometry | None = None, side: Side = "auto") -> Tensor:
    """Orthogonal on the smallest window of taps that meets every phase, zero elsewhere: the rescale changes nothing.

    Without stride that is the centre tap. The matrix is the orthogonal one nearest to what the weight holds there, so
    nothing is drawn: a model converted in several processes, or built late, begins with equal weights. Where more
    columns
    than rows are scaled, neighbouring columns share a direction, as in :func:`repeated_orthogonal_`.

    Args:
        weight: Of a Linear or convolution layer, changed in place. Not all zero.
        geometry: Of the layer; dense or stride 1 when left out.
        side: As for the rescale.

    Example:
        >>> nearest_orthogonal_(torch.tensor([[2.0, 0.0], [0.0, -3.0]]))
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    ones = (1,) * (weight.dim() - 2)
    geometry = geometry or Geometry(ones, ones)
    scales_columns = (chosen_side(weight, geometry, side) == "in") != geometry.transposed
    window = tuple(
        slice((k - min(k, p)) // 2, (k - min(k, p)) // 2 + min(k, p))
        for k, p in zip(weight.shape[2:], geometry.phases, strict=True)
    )
    kept = []
    for block in weight.unflatten(0, (geometry.groups, -1)):  # type: ignore[no-untyped-call]
        part = block[(slice(None), slice(None), *window)]
        kept.append(_orthogonal(part.flatten(1), block.flatten(1), scales_columns).reshape(part.shape))
    weight.zero_()
    weight[(slice(None), slice(None), *window)] = torch.cat(kept)
    return weight


def _orthogonal(matrix: Tensor, source: Tensor, scales_columns: bool) -> Tensor:
    rows, columns = matrix.shape
    if columns <= rows or not scales_columns:
        return _polar(matrix)
    order = torch.arange(columns, device=matrix.device) * rows // columns
    basis = _polar(source[:, :rows] if source.shape[1] >= rows else matrix[:, :rows])
    return basis[:, order] / torch.bincount(order, minlength=rows)[order].to(matrix.dtype).sqrt()


def _polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left @ right).to(matrix.dtype)  # type: ignore[no-any-return]


@torch.no_grad()
def repeated_orthogonal_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The published initialiser for changes of width: rows that are equal or orthogonal to each other.

    With n input entries (channels times taps) and m output channels: n orthonormal vectors if n <= m, else n draws from
    an orthonormal basis, each divided by the root of how often it was drawn. The published rescale of a dense layer or
    1 x 1 convolution is then 1.

    Args:
        weight: Shape (m, in, taps...), changed in place.
        generator: For the draws.

    Example:
        >>> w = repeated_orthogonal_(torch.empty(2, 6))
        >>> bool(torch.allclose((w.T @ w).abs().sum(1), torch.ones(6), atol=1e-5))
        True
    """
    outputs, entries = weight.shape[0], weight[0].numel()
    basis = torch.empty(outputs, outputs, dtype=weight.dtype, device=weight.device)
    nn.init.orthogonal_(basis, generator=generator)
    if entries <= outputs:
        rows = basis[:entries]
    else:
        drawn = torch.randint(outputs, (entries,), generator=generator, device=weight.device)
        rows = basis[drawn] / torch.bincount(drawn, minlength=outputs)[drawn].to(weight.dtype).sqrt()[:, None]
    weight.copy_(rows.T.reshape(weight.shape))
    return weight
