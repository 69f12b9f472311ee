"""Compression operators: what CrAM trains for, as small objects that anybody can write.

An operator says what has to change; who applies it (a training step, a variant, :func:`~groundwire_cram.compress`)
changes it. So an operator never edits a tensor.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from groundwire_cram.threshold import check_sparsity, published_masks


@runtime_checkable
class Operator(Protocol):
    """Something that compresses weights: ``apply`` and a readable ``str()``, which names its variant of the model."""

    def apply(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Say what to change in ``params``, by name; a tensor left out stays.

        Returns:
            Tensors of the shapes of ``params``. One of dtype bool is a mask: entries that are False become zero, and
            with ``sparse_grad`` get no gradient from the compressed model. Any other is a residual that is added; its
            gradient passes straight through.
        """


@dataclass(frozen=True)
class Layout:
    """Where a weight has the inputs of its product.

    Attributes:
        inputs: Dimension 1 as in (out, in, ...), or 0 as in (in, out / groups, ...).
        groups: Into how many groups the inputs are divided, if they are dimension 0.
    """

    inputs: int = 1
    groups: int = 1

    def inputs_second(self, tensor: Tensor) -> Tensor:
        """Return a view whose dimension 1 are the inputs."""
        return tensor if self.inputs == 1 else tensor.transpose(0, 1)

    def row(self, tensor: Tensor) -> int:
        """Return how many weights one output has."""
        outputs = tensor.shape[0] if self.inputs == 1 else tensor.shape[1] * self.groups
        return tensor.numel() // max(1, outputs)


class Weights(dict[str, Tensor]):
    """Weights by name, as operators get them, with what their layers say of them.

    Attributes:
        layouts: By name, of those whose inputs are not dimension 1.
        published: Whether groups of N:M may reach from one output of a matrix to the next, as published.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout] | None = None, published: bool = False
    ) -> None:
        super().__init__(tensors)
        self.layouts, self.published = layouts or {}, published


def layout_of(params: Mapping[str, Tensor], name: str) -> Layout:
    """Return the layout of a weight; (out, in, ...) where nothing is known.

    Example:
        >>> layout_of({"w": torch.ones(2, 3)}, "w")
        Layout(inputs=1, groups=1)
    """
    return params.layouts.get(name, Layout()) if isinstance(params, Weights) else Layout()


def apply_changes(params: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> None:
    """Apply what an operator returned, in place.

    Raises:
        ValueError: A name is not in ``params``, or a shape or the kind of a tensor is wrong.
    """
    for name, change in changes.items():
        if name not in params or not isinstance(change, Tensor) or change.shape != params[name].shape:
            raise ValueError(
                f"an operator's change for {name!r} must be a tensor of the parameter's shape; the parameters are "
                f"{ {key: tuple(p.shape) for key, p in params.items()} }"
            )
        if change.dtype == torch.bool:
            params[name].masked_fill_(~change, 0)
        else:
            params[name].add_(change)


def apply_operator(params: Mapping[str, Tensor], operator: Operator) -> dict[str, Tensor]:
    """Compress ``params`` in place; returns the masks, by name, of those that have one.

    Example:
        >>> weight = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
        >>> masks = apply_operator({"w": weight}, Magnitude(0.5))
        >>> weight, masks["w"]
        (tensor([[ 0.,  0.,  0., -4.]]), tensor([[False, False, False,  True]]))
    """
    masks: dict[str, Tensor] = {}
    for part in operator.operators if isinstance(operator, Chain) else (operator,):
        changes = part.apply(params)
        apply_changes(params, changes)
        for name, change in changes.items():
            if change.dtype == torch.bool:
                masks[name] = masks[name] & change if name in masks else change
    return masks


@dataclass(frozen=True)
class Magnitude:
    """Keep the entries of largest magnitude, by the published rule: those strictly above the m-th largest.

    m is ``ceil(n * (1 - sparsity))`` of n entries, so without ties one entry fewer than m stays. For an exact count
    there is :func:`~groundwire_cram.prune`.

    Args:
        sparsity: Fraction in [0, 1).
        scope: "global" takes one threshold over all tensors, "layerwise" one for each.

    Raises:
        ValueError: An argument is outside its range.

    Example:
        >>> str(Magnitude(0.9)), str(Magnitude(0.9, "layerwise"))
        ('0.9', '0.9 layerwise')
    """

    sparsity: float
    scope: Literal["global", "layerwise"] = "global"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", check_sparsity(self.sparsity))
        if self.scope not in ("global", "layerwise"):
            raise ValueError(f'scope must be "global" or "layerwise", got {self.scope!r}')

    def apply(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return masks of what stays."""
        if self.scope == "global":
            return published_masks(params, self.sparsity)
        return {name: published_masks({name: p}, self.sparsity)[name] for name, p in params.items()}

    def __str__(self) -> str:
        return f"{self.sparsity:g}" + (" layerwise" if self.scope == "layerwise" else "")


def parse_pattern(pattern: str) -> tuple[int, int]:
    """Return ``"2:4"`` as (2, 4).

    Raises:
        ValueError: Not of that form, or not 0 < N < M.

    Example:
        >>> parse_pattern("4:8")
        (4, 8)
    """
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < n < m:
        raise ValueError(f'an N:M pattern is two numbers 0 < N < M, such as "2:4", got {pattern!r}')
    return n, m


def check_nm(tensor: Tensor, n: int, m: int) -> None:
    """Raise if the pattern n:m does not apply to ``tensor``.

    Example:
        >>> check_nm(torch.ones(3, 8), 2, 4)
    """
    if not 0 < n < m:
        raise ValueError(f"an N:M pattern needs 0 < N < M, got {n}:{m}")
    size = tensor.numel()
    reason = "fewer than two dimensions" if tensor.dim() < 2 else f"{size} weights are not divided by {m} into groups"
    if tensor.dim() < 2 or size % m:
        raise ValueError(f"{n}:{m} does not fit the shape {tuple(tensor.shape)}: {reason} -> leave this tensor out")


def nm_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Return what an N:M pattern keeps: in each group of ``m`` the ``n`` entries of largest magnitude.

    Groups are consecutive entries of the weight with its input channels moved last, as the sparse tensor cores want
    them and as the published rule counts them. Of equal magnitudes the first in its group go first.

    Args:
        weight: (O, I, ...), with a number of entries that ``m`` divides.
        n: How many of a group stay, 0 < n < m.
        m: Size of a group.

    Returns:
        bool, the shape of ``weight``.

    Raises:
        ValueError: ``m`` does not divide the number of entries, or there are no input channels.

    Example:
        >>> nm_mask(torch.tensor([[1.0, -4.0, 3.0, 2.0]]), 2, 4)
        tensor([[False,  True,  True, False]])
    """
    check_nm(weight, n, m)
    moved = weight.detach().movedim(1, -1).abs()
    groups = moved.reshape(-1, m)
    # A stable ascending sort puts the earlier of equals first, so they are among the m - n that go.
    order = groups.sort(dim=1, stable=True).indices[:, m - n :]
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return keep.reshape(moved.shape).movedim(-1, 1)


@dataclass(frozen=True)
class NM:
    """Keep the N largest magnitudes of every M consecutive input channels (:func:`~groundwire_cram.operators.nm_mask`).

    A matrix stays dense if M does not divide its rows: groups do not reach from one output to the next. In a
    convolution they may, as in the published code; so it stays dense only if M does not divide all of its weights.

    Args:
        pattern: "2:4", "4:8" or any other with 0 < N < M.

    Raises:
        ValueError: The pattern is not of that form.

    Example:
        >>> NM("2:4").apply({"w": torch.tensor([[1.0, -4.0, 3.0, 2.0]])})
        {'w': tensor([[False,  True,  True, False]])}
    """

    pattern: str = "2:4"

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)

    @property
    def sizes(self) -> tuple[int, int]:
        """(N, M)."""
        return parse_pattern(self.pattern)

    def undivided(self, params: Mapping[str, Tensor]) -> list[str]:
        """Return the names of the tensors that stay dense."""
        published, m = isinstance(params, Weights) and params.published, self.sizes[1]
        rows = {name: layout_of(params, name).row(p) for name, p in params.items() if p.dim() == 2 and not published}
        return [name for name, p in params.items() if rows.get(name, p.numel()) % m]

    def check(self, params: Mapping[str, Tensor], strict: bool, stacklevel: int = 2) -> None:
        """Warn of each tensor that stays dense.

        Raises:
            ValueError: With ``strict``, if there is one, or one whose groups reach from one output to the next.
        """
        undivided = self.undivided(params)
        for name, p in params.items():
            row = layout_of(params, name).row(p)
            text = f"{self.sizes[1]} does not divide the {row} weights of an output"
            if strict and row % self.sizes[1]:
                text = f"{name} of shape {tuple(p.shape)} stays dense: {text}"
                raise ValueError(f"{text} -> name it in skip, or leave strict off")
            if name in undivided:
                text = f"{name} of shape {tuple(p.shape)} stays dense: {text}, so it is not pruned to {self}"
                warnings.warn(text, stacklevel=stacklevel + 1)

    def apply(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return masks of what stays."""
        undivided, masks = self.undivided(params), {}
        for name, p in params.items():
            if name not in undivided:
                layout = layout_of(params, name)
                masks[name] = layout.inputs_second(nm_mask(layout.inputs_second(p), *self.sizes))
        return masks

    def __str__(self) -> str:
        return self.pattern


def check_bits(bits: int) -> int:
    """Return ``bits`` if it is a whole number from 2 to 8.

    Raises:
        ValueError: It is not.

    Example:
        >>> check_bits(4)
        4
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be a whole number from 2 to 8, got {bits!r}")
    return bits


def quantized(weight: Tensor, bits: int, layout: Layout | None = None) -> Tensor:
    r"""Return the nearest values that ``bits``-bit integers with one scale per output channel can express.

    .. math:: q = s\,\mathrm{round}(w / s), \qquad s = \max|w| / (2^{bits-1} - 1)

    Args:
        weight: (O, ...); dimension 0 is that of the channels (embeddings: rows), unless ``layout`` says otherwise.
        bits: 2 to 8. The integers are symmetric, from ``-(2**(bits-1) - 1)`` to ``2**(bits-1) - 1``; 0 stays 0.
        layout: Where the inputs are.

    Returns:
        The shape and dtype of ``weight``; computed in float32 (float64 for float64).

    Example:
        >>> quantized(torch.tensor([[0.0, 0.4, -1.4, 7.0]]), 4)
        tensor([[ 0.,  0., -1.,  7.]])
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if layout is not None and layout.inputs == 0:
        wide = wide.reshape(layout.groups, -1, *wide.shape[1:]).transpose(
            1, 2
        )  # (groups, out / groups, in / groups, ...)
    channels = 1 if layout is None or layout.inputs == 1 else 2
    largest = 2 ** (check_bits(bits) - 1) - 1
    scale = wide.abs().amax(dim=tuple(range(channels, wide.dim())), keepdim=True) / largest
    steps = torch.where(scale > 0, wide / scale, 0).round().clamp(-largest, largest)
    nearest: Tensor = steps * scale
    return (nearest if channels == 1 else nearest.transpose(1, 2).flatten(0, 1)).to(weight.dtype)


def residual(weight: Tensor, bits: int, layout: Layout | None = None) -> Tensor:
    """Return what has to be added to ``weight`` for :func:`quantized`.

    The sum is exact: a value and the grid point nearest to it are within a factor of two of each other or the grid
    point is 0, and then their difference is a floating-point number (Sterbenz' lemma).

    Example:
        >>> residual(torch.tensor([[0.5, -1.5, 7.0]]), 4)
        tensor([[-0.5000, -0.5000,  0.0000]])
    """
    return quantized(weight, bits, layout) - weight.detach()


@dataclass(frozen=True)
class Quantize:
    """Round to ``bits``-bit integers, one scale per channel (:func:`~groundwire_cram.operators.quantized`).

    Args:
        bits: 2 to 8.

    Raises:
        ValueError: ``bits`` is not.

    Example:
        >>> str(Quantize(4))
        'int4'
    """

    bits: int = 8

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def apply(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return residuals to the nearest grid point."""
        return {name: residual(p, self.bits, layout_of(params, name)) for name, p in params.items()}

    def __str__(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True)
class Chain:
    """Several operators, each applied to what the one before it left: ``Chain([Magnitude(0.9), Quantize(8)])``.

    Args:
        operators: At least one.

    Example:
        >>> str(Chain([Magnitude(0.9), Quantize(8)]))
        '0.9+int8'
    """

    operators: Sequence[Operator]

    def __post_init__(self) -> None:
        if not self.operators:
            raise ValueError("a Chain needs at least one operator")
        object.__setattr__(self, "operators", tuple(_flat(self.operators)))

    def apply(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the sum of all changes, as residuals (:func:`apply_operator` keeps the masks apart)."""
        copies: Mapping[str, Tensor] = {name: p.detach().clone() for name, p in params.items()}
        if isinstance(params, Weights):
            copies = Weights(copies, params.layouts, params.published)
        apply_operator(copies, self)
        return {name: copy - params[name].detach() for name, copy in copies.items()}

    def __str__(self) -> str:
        return "+".join(str(operator) for operator in self.operators)


def _flat(operators: Iterable[Operator]) -> list[Operator]:
    empty: list[Operator] = []
    return reduce(lambda found, o: [*found, *(o.operators if isinstance(o, Chain) else (o,))], operators, empty)


def operators_of(sparsities: Sequence[float], pattern: str) -> tuple[Operator, ...]:
    """Return what ``CrAM(sparsities, pattern=...)`` draws from.

    Raises:
        ValueError: The pattern is unknown, or a sparsity outside [0, 1).

    Example:
        >>> [str(operator) for operator in operators_of((0.5, 0.9), "layerwise")]
        ['0.5 layerwise', '0.9 layerwise']
        >>> [str(operator) for operator in operators_of((), "n:m mix")]
        ['2:4', '4:8']
    """
    if pattern in ("global", "layerwise"):
        return tuple(Magnitude(s, pattern) for s in sparsities)  # type: ignore[arg-type]
    if pattern == "n:m mix":
        return (NM("2:4"), NM("4:8"))
    try:
        return (NM(pattern),)
    except ValueError:
        known = '"global", "layerwise", "n:m mix" or an N:M pattern such as "2:4"'
        raise ValueError(f"pattern must be {known}, got {pattern!r}") from None
