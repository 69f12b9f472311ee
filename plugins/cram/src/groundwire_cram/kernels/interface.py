r"""What a kernel backend computes.

Everything is about moved weights :math:`v = w + s\,g`, where the product is rounded to the parameter's dtype before the
sum, as in the published code: a fused multiply-add would differ in the last bit. No backend stores ``v`` or a mask;
both are computed again where they are needed, so a step keeps one copy of the weights and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

#: What is set to zero: entries with ``|v|`` at most a threshold, or all but the N largest of M consecutive entries
#: along the input channels, or nothing.
Pattern = float | tuple[int, int] | None


@dataclass(frozen=True)
class Selection:
    """Order statistics of the magnitudes of moved weights.

    Attributes:
        values: The m-th smallest magnitude for each rank m that was asked for; NaN if not ``finite``.
        finite: Whether every moved weight is a finite number.
    """

    values: tuple[float, ...]
    finite: bool


class Kernels(Protocol):
    """One implementation. All agree bit for bit with :class:`~groundwire_cram.kernels.reference.Reference`.

    Tensors are dense, of any layout, on the backend's device; sequences run in parallel, entry i of each belongs to
    weight i. A gradient that is None leaves its weight where it is. Autograd must be told apart: weights are written
    in place whether or not they require a gradient.
    """

    name: str

    def thresholds(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor | None] | None, scale: float, ranks: Sequence[int]
    ) -> Selection:
        """For each rank m the m-th smallest ``|w + scale * g|`` over all tensors together.

        Args:
            weights: Tensors that are pruned together, n entries in all.
            grads: Their gradients; None for none at all.
            scale: What gradients are multiplied with; rounded to f32 unless the dtype is f64.
            ranks: Each in 1..n; none to learn only whether all moved weights are finite.

        Raises:
            ValueError: A rank is outside 1..n.
        """
        ...

    def perturb(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None] | None,
        scale: float,
        threshold: float | None,
        saved: Sequence[Tensor],
    ) -> None:
        """``saved <- w`` and ``w <- v if |v| > threshold else 0``, in place; without a threshold ``w <- v``.

        NaN is kept, so that nothing hides it. ``saved`` has the shapes and dtypes of ``weights``.
        """
        ...

    def perturb_nm(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor | None] | None,
        scale: float,
        n: int,
        m: int,
        saved: Sequence[Tensor],
    ) -> None:
        """``saved <- w`` and ``w <- v`` where ``|v|`` is among the n largest of its group of m, else 0.

        Groups are m consecutive entries along dimension 1, the input channels; for convolutions, of the weight with
        that dimension moved last, where a group may reach over into the next position. Of equal magnitudes the
        earlier is pruned first; NaN counts as largest.

        Raises:
            ValueError: A tensor has fewer than two dimensions or a size that m does not divide, or not 0 < n < m.
        """
        ...

    def combine(
        self,
        weights: Sequence[Tensor],
        saved: Sequence[Tensor],
        first: Sequence[Tensor | None] | None,
        second: Sequence[Tensor | None],
        scale: float,
        pattern: Pattern,
        *,
        plus: bool,
    ) -> None:
        """Undo the move and make the step's gradient: ``w <- saved``, ``second <- second * mask (+ first)``, in place.

        The mask is that of ``perturb`` with the same gradients, scale and pattern, computed from ``saved``. A pruned
        entry of ``second`` counts as +0, even if it is NaN. Where ``second`` is None only the weight is restored.

        Args:
            weights: Perturbed weights.
            saved: What ``perturb`` saved.
            first: The gradients that ``perturb`` was given.
            second: Gradients of the compressed model.
            scale: As in ``perturb``.
            pattern: A threshold, (n, m), or None for a mask of ones.
            plus: Whether to add ``first``.
        """
        ...


def check_ranks(ranks: Sequence[int], entries: int) -> None:
    """Raise if a rank is not that of one of ``entries``.

    Example:
        >>> check_ranks([1, 4], 4)
    """
    for rank in ranks:
        if not 1 <= rank <= entries:
            raise ValueError(f"rank must be in 1..{entries}, the number of entries, got {rank}")


def check_nm(tensor: Tensor, n: int, m: int) -> None:
    """Raise if the pattern n:m does not apply to ``tensor``.

    Example:
        >>> import torch
        >>> check_nm(torch.ones(3, 8), 2, 4)
    """
    if not 0 < n < m:
        raise ValueError(f"an N:M pattern needs 0 < N < M, got {n}:{m}")
    if tensor.dim() < 2 or tensor.numel() % m:
        raise ValueError(
            f"the pattern {n}:{m} needs two or more dimensions and a size that {m} divides, got the shape "
            f"{tuple(tensor.shape)} -> leave this tensor out"
        )


def gradients(weights: Sequence[Tensor], grads: Sequence[Tensor | None] | None) -> list[Tensor | None]:
    """One gradient or None for each weight.

    Example:
        >>> import torch
        >>> gradients([torch.ones(2)], None)
        [None]
    """
    return [None] * len(weights) if grads is None else [g if g is None else g.detach() for g in grads]
