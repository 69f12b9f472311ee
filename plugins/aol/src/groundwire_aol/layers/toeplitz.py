"""Products with block Toeplitz matrices from few matrix products, by evaluation at points (Toom and Cook).

Over n taps, ``y(t) = sum_u H(u - t) x(u)`` is the adjoint of multiplying two polynomials of degree n - 1. Their product
is known from its values at 2n - 1 points, one of which is infinity; so 2n - 1 matrix products do for n * n, and 25 for
81 with a kernel of 3 x 3. Beyond three taps the evaluation would lose digits.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

#: Besides infinity; the first 2n - 2 of them for n taps. Of simple numbers, these keep rounding smallest.
POINTS = (0.0, 1.0, -0.5, -2.0)
#: Taps per axis for which there are enough points.
MOST_TAPS = len(POINTS) // 2 + 1


@cache
def evaluation(taps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the matrices that evaluate x at all points, and that make of all lags of H its factor at each point.

    Returns:
        Float64, shapes (points, taps) and (points, lags, ascending), with all axes flat.

    Example:
        >>> evaluation((2,))[0].tolist()
        [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
    """
    of_taps = of_lags = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for size in taps:
        of_taps = torch.kron(of_taps, _powers(size, 2 * size - 2))
        of_lags = torch.kron(of_lags, torch.linalg.inv(_powers(2 * size - 1, 2 * size - 2)).mT.contiguous())
    return of_taps, of_lags


def _powers(size: int, points: int) -> Tensor:
    """Row by row, 1, p, p^2, ... at each point, and the leading coefficient for infinity."""
    rows = [[p**k for k in range(size)] for p in POINTS[:points]] + [[0.0] * (size - 1) + [1.0]]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def toeplitz_product(signs: Tensor, factors: Tensor, blocks: Tensor, taps: tuple[int, ...]) -> Tensor:
    """``y(t) = sum_u (factors * S(u - t)) @ x(u)``, also where autocast is on.

    Args:
        signs: S for lag zero and one of each two opposite lags, in ascending order, shape (lags, ..., c, c); the
            opposite ones are ``S(-lag) = S(lag)^T``.
        factors: Symmetric, shape (..., c, c).
        blocks: x, shape (taps, ..., c, r), with the axes of taps flat.
        taps: Their sizes, each at most :data:`MOST_TAPS`.

    Returns:
        Shape of ``blocks``.

    Example:
        >>> one = torch.ones(1, 1)
        >>> toeplitz_product(torch.tensor([2.0, 1.0]).view(2, 1, 1), one, one.expand(2, 1, 1), (2,)).flatten().tolist()
        [3.0, 3.0]
    """
    of_taps, of_lags = (matrix.to(blocks.dtype) for matrix in evaluation(taps))
    half = signs.to(blocks.dtype)
    with torch.autocast(blocks.device.type, enabled=False):
        at_points = _combined(of_lags, torch.cat((half[1:].flip(0).mT, half))).mul_(factors)
        if blocks.stride(-1) > blocks.stride(-2):  # Transposed planes stay so, which saves copies.
            return _combined(of_taps.mT.flip(0), _combined(of_taps, blocks.mT) @ at_points.mT).mT
        return _combined(of_taps.mT.flip(0), at_points @ _combined(of_taps, blocks))


def _combined(matrix: Tensor, planes: Tensor) -> Tensor:
    return (matrix @ planes.flatten(1)).view(-1, *planes.shape[1:])
