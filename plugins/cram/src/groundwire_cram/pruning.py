"""Compression after training: the twins of what CrAM trains for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from groundwire_cram.operators import NM, Magnitude, Operator, Quantize, apply_changes, apply_operator, parse_pattern
from groundwire_cram.prunable import Skip, check_selection, weights_of
from groundwire_cram.threshold import check_sparsity, exact_masks

_Module = TypeVar("_Module", bound=nn.Module)


def prune(
    module: _Module,
    sparsity: float | None = None,
    pattern: str = "global",
    *,
    skip: Skip = (),
    compat: str | None = None,
    strict: bool = False,
    inplace: bool = False,
) -> _Module:
    """Set the floor(sparsity * n) weights of smallest magnitude to zero.

    Pruned are the weights of layers (first and last ones too; :func:`~groundwire_cram.prunable.describe` has the rule)
    that ``skip`` does not name; biases, normalisation layers, scales and tokens never. Of equal magnitudes the first
    go first. A model with BatchNorm needs :func:`~groundwire_cram.recalibrate_batchnorm` afterwards.

    Args:
        module: Any module.
        sparsity: Fraction in [0, 1), 0.9 for 90 % zeros. Not for an N:M pattern, which fixes it.
        pattern: "global" counts over the whole model together, "layerwise" in each tensor, "2:4" or another N:M keeps
            the N largest of each M consecutive input channels.
        skip: Layers to leave dense: patterns of parameter or module names, or a predicate of name and tensor.
        compat: "reference" for the published rule, which keeps what is strictly above a threshold and so, without
            ties, one weight fewer (n = all pruned weights, or those of a layer), and which prunes all parameters with
            more than one dimension.
        strict: Refuse an N:M pattern that does not divide a layer, instead of leaving it dense with a warning.
        inplace: Prune ``module`` itself instead of a copy.

    Returns:
        The pruned module.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1), or an argument does not fit the module: nothing to prune, a
            weight-normalised layer, a ``skip`` that names nothing, an unknown pattern.

    Example:
        >>> pruned = prune(nn.Linear(4, 5), 0.9)
        >>> int((pruned.weight == 0).sum())
        18
    """
    rule = _masks(sparsity, pattern, compat, strict)
    return _edited(module, skip, inplace, lambda weights: apply_changes(weights, rule(weights)), compat)


def quantize(module: _Module, bits: int = 8, *, skip: Skip = (), inplace: bool = False) -> _Module:
    """Round weights to ``bits``-bit integers with one scale per output channel; they stay floating-point numbers.

    Zeros stay zeros, so it goes after :func:`prune`. See :func:`~groundwire_cram.operators.quantized` for the rule.

    Args:
        module: Any module.
        bits: 2 to 8.
        skip: Layers to leave as they are.
        inplace: Change ``module`` itself instead of a copy.

    Returns:
        The quantized module.

    Raises:
        ValueError: ``bits`` is not a whole number from 2 to 8, or there is nothing to quantize.

    Example:
        >>> layer = quantize(nn.Linear(8, 2), 4)
        >>> max(len(row.unique()) for row in layer.weight) <= 15
        True
    """
    return compress(module, Quantize(bits), skip=skip, inplace=inplace)


def compress(module: _Module, operator: Operator, *, skip: Skip = (), inplace: bool = False) -> _Module:
    """Apply a compression operator to the weights that CrAM would compress, all together.

    Args:
        module: Any module.
        operator: Such as ``Chain([Magnitude(0.9), Quantize(8)])``, or an object of your own with
            ``apply(params) -> masks or residuals`` (:class:`~groundwire_cram.Operator`).
        skip: Layers to leave as they are.
        inplace: Change ``module`` itself instead of a copy.

    Returns:
        The compressed module.

    Raises:
        ValueError: There is nothing to compress, or the operator returned something that does not fit.

    Example:
        >>> from groundwire_cram import Chain, Magnitude, Quantize
        >>> layer = compress(nn.Linear(4, 5), Chain([Magnitude(0.5), Quantize(8)]))
        >>> int((layer.weight == 0).sum()) >= 10
        True
    """

    def edit(weights: Mapping[str, Tensor]) -> None:
        apply_operator(weights, operator)

    return _edited(module, skip, inplace, edit)


def _edited(
    module: _Module,
    skip: Skip,
    inplace: bool,
    edit: Callable[[Mapping[str, Tensor]], Any],
    compat: str | None = None,
) -> _Module:
    names = check_selection(module, skip, compat)
    if not inplace:
        try:
            module = copy.deepcopy(module)
        except RuntimeError as error:  # Tensors that a forward pass left in the module: masked biases, cached outputs.
            raise ValueError(f"{type(module).__name__} cannot be copied ({error}) -> inplace=True") from error
    with torch.no_grad():
        edit(weights_of(module, names, compat))
    return module


def _masks(
    sparsity: float | None, pattern: str, compat: str | None, strict: bool
) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    """Return the rule that ``prune`` applies."""
    if compat not in (None, "reference"):
        raise ValueError(f'compat must be None or "reference", got {compat!r}')
    if pattern not in ("global", "layerwise"):
        if sparsity is not None:
            raise ValueError(f"pattern={pattern!r} fixes the sparsity -> leave sparsity out")
        operator = NM(":".join(map(str, parse_pattern(pattern))))
        return lambda weights: _divided(weights, operator, strict)
    level = check_sparsity(sparsity)
    if compat:
        return Magnitude(level, pattern).apply  # type: ignore[arg-type]
    if pattern == "global":
        return lambda weights: exact_masks(weights, level)
    return lambda weights: {name: exact_masks({name: w}, level)[name] for name, w in weights.items()}


def _divided(weights: Mapping[str, Tensor], operator: NM, strict: bool) -> Mapping[str, Tensor]:
    operator.check(weights, strict, stacklevel=5)
    return operator.apply(weights)


@contextmanager
def compressed(
    module: nn.Module, operator: Operator, skip: Skip = (), compat: str | None = None
) -> Iterator[nn.Module]:
    """Context manager: ``module`` compressed while open, and its own weights back afterwards, whatever happens.

    Global and layerwise magnitudes are pruned to the exact count, as by :func:`prune`; ``compat`` says of which
    parameters, as in :func:`~groundwire_cram.prunable.describe`.

    Example:
        >>> from groundwire_cram import Magnitude
        >>> layer = nn.Linear(4, 5)
        >>> with compressed(layer, Magnitude(0.5)):
        ...     int((layer.weight == 0).sum())
        10
        >>> int((layer.weight == 0).sum())
        0
    """
    weights = weights_of(module, check_selection(module, skip, compat), compat)
    saved = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            if isinstance(operator, Magnitude):
                apply_changes(weights, _masks(operator.sparsity, operator.scope, None, False)(weights))
            else:
                apply_operator(weights, operator)
        yield module
    finally:
        with torch.no_grad():
            for name, weight in saved.items():
                weights[name].copy_(weight)
