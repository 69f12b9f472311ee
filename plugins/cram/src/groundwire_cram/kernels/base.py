r"""Interface of the kernel backends, and the record of what one call works on.

Everything is about moved weights :math:`v = w + s\,g`, where the product is rounded to the parameter's dtype before the
sum, as in the published code: a fused multiply-add would differ in the last bit. No backend stores ``v`` or a mask;
both are computed again where they are needed, so a step keeps one copy of the weights and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from groundwire_cram.operators import check_nm
from groundwire_cram.threshold import OrderStatistics

#: What is set to zero: entries with ``|v|`` at most a threshold, or all but the N largest of M consecutive entries
#: along the input channels, or nothing.
Pattern = float | tuple[int, int] | None


@dataclass(frozen=True)
class Part:
    """Weights that a step moves and compresses together; autograd must be told apart that they are written.

    Attributes:
        weights: Dense tensors of any layout, on the backend's device, written in place.
        grads: One for each weight; None leaves its weight where it is. None for all: no weight moves.
        scale: What gradients are multiplied with; rounded to f32 unless the dtype is f64.

    Raises:
        ValueError: There are more or fewer gradients than weights.

    Example:
        >>> import torch
        >>> Part([torch.ones(2)], None, 0.0).grads
        [None]
    """

    weights: Sequence[Tensor]
    grads: Sequence[Tensor | None] | None
    scale: float

    def __post_init__(self) -> None:
        grads = [None] * len(self.weights) if self.grads is None else self.grads
        if len(grads) != len(self.weights):
            raise ValueError(f"{len(grads)} gradients go with {len(self.weights)} weights; they must match")
        object.__setattr__(self, "grads", [g if g is None else g.detach() for g in grads])

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor | None]]:
        """Each weight with its gradient."""
        return list(zip(self.weights, self.grads or (), strict=True))

    def check_ranks(self, ranks: Sequence[int]) -> None:
        """Raise if a rank is not that of one of the entries.

        Example:
            >>> import torch
            >>> Part([torch.ones(2, 2)], None, 0.0).check_ranks([1, 4])
        """
        entries = sum(w.numel() for w in self.weights)
        for rank in ranks:
            if not 1 <= rank <= entries:
                raise ValueError(f"rank must be in 1..{entries}, the number of entries, got {rank}")

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise if an N:M pattern does not apply to one of the weights."""
        if isinstance(pattern, tuple):
            for w in self.weights:
                check_nm(w, *pattern)


class Kernels(Protocol):
    """One implementation. All agree bit for bit with :class:`~groundwire_cram.kernels.reference.Reference`.

    Sequences run in parallel: entry i of each belongs to weight i of the part.
    """

    name: str

    def thresholds(self, part: Part, ranks: Sequence[int]) -> OrderStatistics:
        """Return for each rank m the m-th smallest ``|w + scale * g|`` over all weights of the part together.

        Args:
            part: n entries in all.
            ranks: Each in 1..n; none to learn only whether all moved weights are finite.

        Raises:
            ValueError: A rank is outside 1..n.
        """
        ...

    def perturb(self, part: Part, pattern: Pattern, saved: Sequence[Tensor]) -> None:
        """Set ``saved <- w`` and ``w <- v``, or 0 where the pattern says so, in place.

        For a threshold these are the entries with ``|v| <= threshold``; NaN is kept, so that nothing hides it. For
        (n, m) they are all but the n largest of each group: m consecutive entries along dimension 1, the input
        channels; for convolutions, of the weight with that dimension moved last, where a group may reach over into
        the next position. Of equal magnitudes the earlier is pruned first; NaN counts as largest.

        Args:
            part: What to move.
            pattern: What becomes zero.
            saved: Of the shapes and dtypes of the weights.

        Raises:
            ValueError: For (n, m), a weight has fewer than two dimensions or a size that m does not divide, or not
                0 < n < m. Then nothing was written.
        """
        ...

    def combine(
        self, part: Part, pattern: Pattern, saved: Sequence[Tensor], second: Sequence[Tensor | None], *, plus: bool
    ) -> None:
        """Undo the move and make the step's gradient: ``w <- saved``, ``second <- second * mask (+ first)``, in place.

        The mask is that of ``perturb`` with the same part and pattern, computed from ``saved``. A pruned entry of
        ``second`` counts as +0, even if it is NaN. Where ``second`` is None only the weight is restored.

        Args:
            part: What ``perturb`` moved; its gradients are the first ones.
            pattern: As given to ``perturb``, or None for a mask of ones.
            saved: What ``perturb`` saved.
            second: Gradients of the compressed model.
            plus: Whether to add the first gradients.
        """
        ...
