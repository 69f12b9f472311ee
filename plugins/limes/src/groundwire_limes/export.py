"""Export without the plugin: a bias that holds a forecast, or a table of biases for the hours to come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groundwire_limes.functional import Array
from groundwire_limes.prior_tracker import PriorTracker
from groundwire_limes.time_steps import start_of_step


def fold_into_bias(layer: nn.Module, offset: Tensor) -> None:
    """Add ``offset`` to the bias of ``layer``, in place; a layer without a bias gets one. Exact: ``Wx + (b + c)``.

    Example:
        >>> layer = nn.Linear(2, 3, bias=False)
        >>> fold_into_bias(layer, torch.ones(3))
        >>> layer.bias.tolist()
        [1.0, 1.0, 1.0]
    """
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    offset = offset.to(weight.device, weight.dtype)
    if bias is None:
        layer.bias = nn.Parameter(offset.clone())
        return
    assert isinstance(bias, Tensor)
    with torch.no_grad():
        bias.add_(offset)


@dataclass(frozen=True)
class BiasTable:
    """Biases by time step, for serving.

    Attributes:
        steps: Step numbers, ascending.
        valid_from: When each step begins, ISO 8601 in UTC; None where steps are counted in batches.
        valid_until: When it ends.
        prior: Expected class priors, shape (T, K).
        bias: What to add to the plain model's scores, shape (T, K) or (T, 1); with the head's own bias if the table
            was made with the model.
        complete: Whether the head's own bias is in it.
    """

    steps: list[int]
    valid_from: list[str | None]
    valid_until: list[str | None]
    prior: Array
    bias: Array
    complete: bool

    def __len__(self) -> int:
        return len(self.steps)

    def rows(self) -> list[dict[str, Any]]:
        """Return one plain dict for each step."""
        columns = zip(
            self.steps, self.valid_from, self.valid_until, self.prior.tolist(), self.bias.tolist(), strict=True
        )
        names = ("step", "valid_from", "valid_until", "prior", "bias")
        return [dict(zip(names, column, strict=True)) for column in columns]

    def to_json(self, path: str | Path) -> None:
        """Write the table to a file."""
        Path(path).write_text(json.dumps({"complete": self.complete, "rows": self.rows()}, indent=1) + "\n")


def bias_table(tracker: PriorTracker, steps: list[int], length: float | None, head: nn.Module | None) -> BiasTable:
    """Return the table for ``steps`` of ``length`` seconds, with the bias of ``head`` added where there is one."""
    own = getattr(head, "bias", None)
    base = 0.0 if own is None else own.detach().cpu().double().numpy()
    empty = np.zeros((0, tracker.extrapolator.num_classes))
    return BiasTable(
        steps,
        [None if length is None else start_of_step(s, length).isoformat() for s in steps],
        [None if length is None else start_of_step(s + 1, length).isoformat() for s in steps],
        np.stack([tracker.forecast(s).prior for s in steps]) if steps else empty,
        np.stack([tracker.offset(s).double().numpy() + base for s in steps]) if steps else empty,
        head is not None,
    )
