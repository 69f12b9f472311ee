"""Calling a module's ``forward`` on what a batch holds, as the module's own steps do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from groundwire.records import Fields


def call_forward(module: nn.Module, batch: Any, fields: Fields) -> Any:
    """Return ``module(...)`` for ``fields.inputs``: as one argument, or by keys where ``forward`` names them.

    A mapping whose keys are parameters of ``forward`` is spread over them, as ``model(**batch)`` of transformers does;
    one that ``forward`` takes as a whole is given as a whole. Targets are left out unless ``forward`` needs them.

    Args:
        module: The module.
        batch: The batch itself: where it is a mapping, ``forward`` may take more of it than its inputs.
        fields: What the batch holds.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, input_ids, attention_mask=None, labels=None):
        ...         return input_ids, attention_mask, labels
        >>> batch = {"input_ids": 1, "attention_mask": 2, "labels": 3}
        >>> call_forward(Model(), batch, Fields(1, 3))
        (1, 2, None)
    """
    for mapping in (fields.inputs, batch):
        if isinstance(mapping, Mapping):
            taken = _taken(module, mapping, fields.targets)
            if taken is not None and (mapping is fields.inputs or len(taken) > 1):
                return module(**taken)
    return module(fields.inputs)


def _taken(module: nn.Module, mapping: Mapping[Any, Any], targets: Any) -> dict[str, Any] | None:
    """Return what ``forward`` takes of ``mapping`` by keys, or None where it does not take it so."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = {name for name, parameter in named.items() if parameter.default is parameter.empty}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not needed <= mapping.keys() or not all(isinstance(key, str) for key in mapping):
        return None
    taken = {
        key: value
        for key, value in mapping.items()
        if (key in named or anything) and (key in needed or value is not targets)
    }
    return taken or None
