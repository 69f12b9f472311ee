"""Norms of linear operations in float64: exact where the operator is small, otherwise a proved upper bound.

Power iteration never appears here: what it returns is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from groundwire_aol.layers.autocorrelation import autocorrelation
from groundwire_aol.layers.rescale import Geometry, Side, apply_scale, canonical, chosen_side, squared_scale

#: Covers the rounding of the float64 computations here, whose relative error is far smaller.
ROUNDING = 1 + 1e-9
#: Largest number of columns of an operator that is written out, and of the smaller side of a matrix.
MAX_COLUMNS = 1024
#: Largest number of entries of an iterated Gram kernel, and of products that make it (a second).
MAX_ENTRIES, MAX_PRODUCTS = 2_000_000, 1_500_000_000


def rescaled_norm(weight: Tensor, squared: Tensor, geometry: Geometry, *, steps: int, side: Side) -> float:
    """Upper bound of the norm of a weight W that a rescale made, proved for its actual (rounded) entries.

    With ``P = W D^{1/2}`` and ``P^T P <= D'`` by the rule, ``W^T W <= D' / D``.

    Args:
        weight: W, float64.
        squared: D, as :func:`groundwire_aol.layers.rescale.squared_scale` gave it for the raw weight.
        geometry: Of the layer.
        steps: As for the rescale.
        side: The side that was scaled, not "auto".

    Example:
        >>> w = torch.eye(2, dtype=torch.float64)
        >>> round(rescaled_norm(w, torch.ones(1, 2, dtype=torch.float64), Geometry(), steps=1, side="in"), 6)
        1.0
    """
    raw = apply_scale(weight, squared.sqrt(), geometry, side)
    proved = squared_scale(raw, geometry, steps=steps, side=side, eps=0.0)
    return math.sqrt(float((proved / squared).max())) * ROUNDING


def matrix_norm(matrix: Tensor) -> tuple[float, str]:
    """Spectral norm of a float64 matrix, exact or bounded from above, and how.

    Example:
        >>> matrix_norm(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)))[1]
        'exact (singular values)'
    """
    if min(matrix.shape) == 0:
        return 0.0, "empty"
    if min(matrix.shape) <= MAX_COLUMNS:
        return _root_of_gram(matrix), "exact (singular values)"
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return _frobenius_of_powers(gram), "upper bound (Gram iteration)"


def _root_of_gram(matrix: Tensor) -> float:
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[-1]), 0.0)) * ROUNDING


def _frobenius_of_powers(gram: Tensor, squarings: int = 5) -> float:
    """``||G|| <= ||G^(2^k)||_F^(1 / 2^k)``, with the powers kept in range."""
    logarithm, power = 0.0, gram
    for _ in range(squarings):
        size = float(power.norm())
        if size == 0:
            return 0.0
        power = power / size
        logarithm = 2 * (logarithm + math.log(size))
        power = power @ power
    total = (logarithm + math.log(float(power.norm()))) / 2**squarings
    return math.exp(total / 2) * ROUNDING


def kernel_norm(weight: Tensor, geometry: Geometry) -> float:
    """Upper bound of the norm of a convolution at every input size, from absolute sums of iterated Gram kernels.

    Args:
        weight: Float64.
        geometry: Of the layer.

    Example:
        >>> round(kernel_norm(torch.ones(1, 1, 3, dtype=torch.float64), Geometry((1,), (1,))), 6)
        3.0
    """
    side = chosen_side(weight, geometry)
    power = canonical(weight, geometry, side)
    logarithm, bounds = 0.0, [math.inf]
    for squarings in range(5):
        entries = power.shape[0] * power.shape[1] ** 2 * math.prod(2 * k - 1 for k in power.shape[3:])
        products = entries * power.shape[2] * math.prod(power.shape[3:])
        if squarings and (entries > MAX_ENTRIES or products > MAX_PRODUCTS):
            break
        size = float(power.abs().max())
        if size == 0:
            return 0.0
        power = autocorrelation(power / size)
        logarithm = 2 * (logarithm + math.log(size))
        largest = float(power.abs().flatten(2).sum(2).max())
        bounds.append((logarithm + math.log(largest)) / 2 ** (squarings + 1))
    return math.exp(min(bounds)) * ROUNDING


def operator_norm(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """Exact norm of an affine ``function`` of one sample of ``shape``, in float64, from the matrix written out."""
    size = math.prod(shape)
    with torch.no_grad():
        basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
        columns = function(basis) - function(torch.zeros(1, *shape, dtype=torch.float64))
    return _root_of_gram(columns.flatten(1))


def nonnegative_norm(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    """Upper bound of the norm of an affine ``function`` whose matrix has no negative entry, by the Schur test.

    The root of its largest row sum times its largest column sum, both exact: one call with ones, one adjoint call. It
    is the norm for paddings, copies, slices, and for average pooling whose windows do not overlap.

    Args:
        function: Of a float64 batch of two; must treat the samples alike and apart.
        shape: Of one sample.

    Raises:
        ValueError: ``function`` mixes or moves the samples of a batch.

    Example:
        >>> nonnegative_norm(torch.nn.AvgPool1d(4), (1, 8))
        0.5000...
    """
    with torch.inference_mode(False), torch.enable_grad():
        ones = torch.ones(2, *shape, dtype=torch.float64, requires_grad=True)
        rows = function(ones)
        if not isinstance(rows, Tensor) or rows.dim() < 1 or rows.shape[0] != 2:
            raise ValueError("it moves the batch dimension")
        if rows[0].numel() == 0:
            return 0.0
        columns, others = (torch.autograd.grad(row.sum(), ones, retain_graph=True)[0] for row in rows)
    if bool(columns[1].any()) or bool(others[0].any()):
        raise ValueError("it mixes the samples of a batch")
    sums = (rows.detach() - function(torch.zeros_like(ones)).detach())[0]
    if float(sums.min()) < 0 or float(columns.min()) < 0:
        raise ValueError("it has negative factors")
    return math.sqrt(float(sums.max()) * float(columns[0].max())) * ROUNDING
