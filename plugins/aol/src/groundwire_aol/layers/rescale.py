r"""The almost-orthogonal (AOL) rescale in pure torch (Prach and Lampert, 2022).

For any matrix P, with ``D = diag(sum_j |P^T P|_ij + eps)``, the matrix ``W = P D^{-1/2}`` has spectral norm at most 1:
``D - P^T P`` is diagonally dominant, so ``P^T P <= D``. For a convolution the sum also runs over all lags of the
kernel's autocorrelation. Here the same rule covers every geometry, because

* a convolution of stride s is one of stride 1 on the polyphase components of its input, so the rule is applied to the
  kernel's polyphase form (*phase-wise* AOL). Dilation d only relabels taps: ``s / gcd(s, d)`` phases remain;
* groups are blocks of a block-diagonal matrix;
* a transposed convolution is the adjoint of one with the same weight, and has its norm;
* ``||P|| = ||P^T||``, so either side may be scaled;
* ``(P^T P)^2 <= D^2`` implies ``P^T P <= D`` (Löwner-Heinz), which is ``steps=2``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from groundwire_aol.layers.autocorrelation import autocorrelation, lag_sums

Side: TypeAlias = Literal["auto", "in", "out"]
#: Added under the square root, as published: keeps empty columns finite and absorbs rounding in float32.
EPS = 1e-6


@dataclass(frozen=True)
class Geometry:
    """How a kernel's taps meet the pixels of its input.

    Attributes:
        stride: Per axis; empty for a dense layer.
        dilation: Per axis.
        groups: Number of blocks.
        transposed: The weight is that of a transposed convolution, of shape (in, out / groups, ...).
        circular: The padding wraps around. Phases then depend on the input's size, so they are not used.

    Example:
        >>> Geometry(stride=(2, 2), dilation=(2, 1)).phases
        (1, 2)
    """

    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    circular: bool = False

    @property
    def phases(self) -> tuple[int, ...]:
        """Number of input phases per axis whose taps never meet: ``s / gcd(s, d)``."""
        if self.circular:
            return (1,) * len(self.stride)
        return tuple(s // math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True))


def rescale(
    weight: Tensor,
    geometry: Geometry | None = None,
    *,
    steps: int = 1,
    side: Side = "auto",
    eps: float = EPS,
    compat: Literal["reference"] | None = None,
) -> Tensor:
    """Return the weight with spectral norm at most 1, for zero padding of any amount (section 3 of the paper).

    Args:
        weight: Shape (out, in / groups, ...) or, transposed, (in, out / groups, ...); any floating dtype.
        geometry: Of the convolution; a dense layer or a convolution of stride 1 without groups when left out.
        steps: 1 is the published rule; 2 sums the squared Gram kernel, which is tighter and costs about four times as
            much.
        side: Which channels to scale. "auto" takes the cheaper side, which is also the tighter one.
        eps: Added to the sums.
        compat: "reference" is the published rule to the letter: input side, no phases.

    Returns:
        Shape and dtype of ``weight``; differentiable.

    Raises:
        ValueError: ``steps`` is neither 1 nor 2, or another argument is out of range.

    Example:
        >>> w = rescale(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))
        >>> bool(torch.linalg.matrix_norm(w, 2) <= 1)
        True
    """
    geometry = _complete(weight, geometry)
    if compat == "reference":
        geometry, side, steps = published(geometry), "in", 1
    side = chosen_side(weight, geometry, side)
    sums = squared_scale(weight, geometry, steps=steps, side=side, eps=eps)
    return apply_scale(weight, sums.rsqrt(), geometry, side)


def squared_scale(weight: Tensor, geometry: Geometry, *, steps: int, side: Side, eps: float = EPS) -> Tensor:
    """Return the diagonal D with ``J^T J <= D`` (input side) or ``J J^T <= D`` (output side), J being the operator.

    Returns:
        Shape (groups, channels * phases) for the side that carries phases, (groups, channels) for the other.
    """
    if steps not in (1, 2):
        raise ValueError(f"steps must be 1 or 2, got {steps!r}")
    blocks = canonical(weight, geometry, side)
    if steps == 1:
        return lag_sums(blocks) + eps
    # Fourth powers leave the range of float32 sooner than squares do.
    unit = blocks.detach().abs().amax().clamp_min(torch.finfo(blocks.dtype).tiny)
    squared = lag_sums(autocorrelation(blocks / unit))
    return (squared + (eps / unit.square()).square()).sqrt() * unit.square()


def canonical(weight: Tensor, geometry: Geometry, side: Side) -> Tensor:
    """Return the kernel as (groups, scaled channels, contracted channels, taps...), in polyphase form.

    Example:
        >>> canonical(torch.zeros(8, 4, 3, 3), Geometry((2, 2), (1, 1)), "in").shape
        torch.Size([1, 16, 8, 2, 2])
    """
    blocks = weight.reshape(geometry.groups, -1, *weight.shape[1:])
    blocks = _polyphase(blocks, geometry.phases)
    return blocks.transpose(1, 2) if _scales_columns(geometry, side) else blocks


def apply_scale(weight: Tensor, scale: Tensor, geometry: Geometry, side: Side) -> Tensor:
    """``weight`` with every channel of ``side`` multiplied by its entry of ``scale``, see :func:`squared_scale`."""
    blocks = weight.reshape(geometry.groups, -1, *weight.shape[1:])
    taps = blocks.shape[3:]
    if not _scales_columns(geometry, side):
        return (blocks * scale[..., None].reshape(*scale.shape, 1, *(1 for _ in taps))).reshape(weight.shape)
    columns = scale.reshape(geometry.groups, 1, blocks.shape[2], *geometry.phases)
    for axis, (size, phases) in enumerate(zip(taps, geometry.phases, strict=True), start=3):
        columns = columns.index_select(axis, torch.arange(size, device=weight.device) % phases)
    return (blocks * columns).reshape(weight.shape)


def chosen_side(weight: Tensor, geometry: Geometry, side: Side = "auto") -> Side:
    """Return the side that "auto" stands for: the one with fewer channels, which is cheaper and tighter.

    Raises:
        ValueError: ``side`` is none of the three.
    """
    if side in ("in", "out"):
        return side
    if side != "auto":
        raise ValueError(f"side must be 'auto', 'in' or 'out', got {side!r}")
    rows, columns = weight.shape[0] // geometry.groups, weight.shape[1]
    phases = math.prod(geometry.phases)
    if all(k <= p for k, p in zip(weight.shape[2:], geometry.phases, strict=True)):
        columns *= phases  # No two windows overlap: a dense matrix of that many columns.
    # Of two equal sides, phases make the columns the looser one.
    fewer_columns = columns < rows or (columns == rows and phases == 1 and not geometry.transposed)
    return "in" if fewer_columns != geometry.transposed else "out"


def _scales_columns(geometry: Geometry, side: Side) -> bool:
    """Dimension 1 of a weight is the input of a convolution and the output of a transposed one."""
    return (side == "in") != geometry.transposed


def _polyphase(blocks: Tensor, phases: Sequence[int]) -> Tensor:
    """Taps (g, a, b, k...) to (g, a, b * phases, ceil(k / phases)...): taps of one phase meet, others never do."""
    if max(phases, default=1) == 1:
        return blocks
    pads = [(-k) % p for k, p in zip(blocks.shape[3:], phases, strict=True)]
    blocks = nn.functional.pad(blocks, [n for pad in reversed(pads) for n in (0, pad)])
    for axis, p in enumerate(phases):
        # Each axis becomes (taps, phase); the phase moves right behind the channels and the earlier phases.
        blocks = blocks.unflatten(3 + 2 * axis, (-1, p)).movedim(4 + 2 * axis, 3 + axis)  # type: ignore[no-untyped-call]
    return blocks.flatten(2, 2 + len(phases))


def _complete(weight: Tensor, geometry: Geometry | None) -> Geometry:
    axes = weight.dim() - 2
    if axes < 0:
        raise ValueError(f"a weight has at least two dimensions, got shape {tuple(weight.shape)}")
    if geometry is None:
        return Geometry((1,) * axes, (1,) * axes)
    if len(geometry.stride) != axes or len(geometry.dilation) != axes:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has {axes} axes, got {geometry}")
    return geometry


def published(geometry: Geometry) -> Geometry:
    """Return the geometry as the published rule sees it: without phases."""
    ones = (1,) * len(geometry.stride)
    return Geometry(ones, ones, geometry.groups, geometry.transposed)
