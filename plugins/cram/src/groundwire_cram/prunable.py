"""Prunable parameters: all matrices and filters, less what the user's ``skip`` names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

#: A pattern such as "net.0" or "*.downsample.*", or a predicate of name and tensor; or several of them.
Skip = str | Callable[[str, Tensor], bool] | Sequence[str | Callable[[str, Tensor], bool]]


def prunable(parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of floating-point tensors of more than one dimension, so never of biases or norm layers.

    Example:
        >>> import torch
        >>> prunable({"weight": torch.ones(2, 3), "bias": torch.ones(2)})
        ['weight']
    """
    return [name for name, p in parameters.items() if p.dim() > 1 and p.is_floating_point()]


def selected(parameters: Mapping[str, Tensor], skip: Skip = ()) -> list[str]:
    """Return the prunable names that ``skip`` does not name.

    Args:
        parameters: Tensors by name, as in ``module.named_parameters()``.
        skip: Patterns (``*``, ``?``, ``[...]``) of a parameter's name or of the name of a module that holds it, and
            predicates ``skip(name, tensor) -> bool``.

    Example:
        >>> import torch
        >>> weights = {"stem.weight": torch.ones(2, 2), "net.0.weight": torch.ones(2, 2)}
        >>> selected(weights, ["stem"]), selected(weights, lambda name, p: name.startswith("net"))
        (['net.0.weight'], ['stem.weight'])
    """
    rules = _rules(skip)
    return [name for name in prunable(parameters) if not any(_skipped(r, name, parameters[name]) for r in rules)]


def check_selection(parameters: Mapping[str, Tensor], skip: Skip = ()) -> list[str]:
    """Return :func:`selected`, after looking whether it makes sense.

    Raises:
        ValueError: Nothing is selected, a pattern of ``skip`` names nothing prunable, or a selected layer is
            weight-normalised: a direction of zeros has no length to divide by.

    Example:
        >>> import torch
        >>> check_selection({"net.0.weight": torch.ones(2, 2)})
        ['net.0.weight']
    """
    names = prunable(parameters)
    if not names:
        raise ValueError(
            f"there is nothing to prune: of {len(parameters)} parameters none has more than one dimension -> use it on "
            "a model with linear, convolutional or embedding layers"
        )
    for rule in _rules(skip):
        if isinstance(rule, str) and not any(_named(name, rule) for name in names):
            raise ValueError(
                f"skip={rule!r} names no prunable parameter -> use the name of one or of its module: {names}"
            )
    chosen = selected(parameters, skip)
    if not chosen:
        raise ValueError(f"skip={skip!r} leaves nothing to prune of {names} -> skip less")
    for name in chosen:
        if re.search(r"(\.original\d|weight_[gv])$", name):
            raise ValueError(
                f"{name}: a weight-normalised layer cannot be pruned, zeros would give NaN -> remove_parametrizations "
                "(or remove_weight_norm) first"
            )
    return chosen


def _rules(skip: Skip) -> list[str | Callable[[str, Tensor], bool]]:
    return [skip] if isinstance(skip, str) or callable(skip) else list(skip)


def _skipped(rule: str | Callable[[str, Tensor], bool], name: str, parameter: Tensor) -> bool:
    return _named(name, rule) if isinstance(rule, str) else bool(rule(name, parameter))


def _named(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))
