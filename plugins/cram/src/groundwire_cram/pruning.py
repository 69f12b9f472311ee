"""One-shot pruning after training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from groundwire_cram.functional import compress, exact_masks, prunable, refuse_weight_norm

_Module = TypeVar("_Module", bound=nn.Module)


def prune(module: _Module, sparsity: float, *, inplace: bool = False) -> _Module:
    """Set the floor(sparsity * n) weights of smallest magnitude to zero, over the whole model together.

    Pruned are all parameters with more than one dimension (first and last layers too); biases and normalisation
    layers never. Of equal magnitudes the first go first. A model with BatchNorm needs
    :func:`~groundwire_cram.recalibrate_batchnorm` afterwards.

    Args:
        module: Any module.
        sparsity: Fraction in [0, 1), 0.9 for 90 % zeros.
        inplace: Prune ``module`` itself instead of a copy.

    Returns:
        The pruned module.

    Raises:
        ValueError: ``sparsity`` is outside [0, 1), or ``module`` has nothing to prune or a weight-normalised layer.

    Example:
        >>> pruned = prune(nn.Linear(4, 5), 0.9)
        >>> int((pruned.weight == 0).sum())
        18
    """
    module = module if inplace else copy.deepcopy(module)
    parameters = dict(module.named_parameters())
    refuse_weight_norm(parameters)
    weights = {name: parameters[name] for name in prunable(parameters)}
    masks = exact_masks(weights, sparsity)
    if not weights:
        raise ValueError(f"{type(module).__name__} has no parameter of more than one dimension, so nothing to prune")
    with torch.no_grad():
        compress(weights, masks)
    return module


@contextmanager
def pruned(module: nn.Module, sparsity: float) -> Iterator[nn.Module]:
    """``module`` pruned while open, and its own weights back afterwards, whatever happens.

    Example:
        >>> layer = nn.Linear(4, 5)
        >>> with pruned(layer, 0.5):
        ...     int((layer.weight == 0).sum())
        10
        >>> int((layer.weight == 0).sum())
        0
    """
    parameters = dict(module.named_parameters())
    saved = {name: parameters[name].detach().clone() for name in prunable(parameters)}
    try:
        yield prune(module, sparsity, inplace=True)
    finally:
        with torch.no_grad():
            for name, weight in saved.items():
                parameters[name].copy_(weight)
