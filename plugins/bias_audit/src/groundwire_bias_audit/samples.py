"""Single samples, fetched again by their ids as the data loader gives them, and drawn where they are images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from groundwire import PluginError, RunContext
from groundwire.seeds import preserve_rng
from groundwire_bias_audit.passes import LOADER_STEP

#: Longest side of an image on the page, in pixels; larger ones are thinned out.
LONGEST = 96


class Samples:
    """The inputs of single rows of the running stage.

    Args:
        run: The run, which reads batches.
        loader_of: Gives the data loader of a number.
    """

    def __init__(self, run: RunContext, loader_of: Callable[[int], Any]) -> None:
        self._run, self._loader_of = run, loader_of

    def inputs(self, row: int) -> Tensor | None:
        """A batch of the one row with this id, or None where its data set has no index or its input is no tensor."""
        loader = self._loader_of(int(row) // LOADER_STEP)
        dataset: Any = getattr(loader, "dataset", None)
        if not hasattr(dataset, "__getitem__"):
            return None
        collate = getattr(loader, "collate_fn", None) or default_collate
        # A data set may draw random numbers; and gradients need tensors that inference mode did not make.
        with preserve_rng(), torch.inference_mode(False):
            try:
                found = self._run.fields(collate([dataset[int(row) % LOADER_STEP]])).inputs
            except (PluginError, TypeError, ValueError, IndexError, KeyError):
                return None
        return found if isinstance(found, Tensor) and found.ndim and len(found) == 1 else None

    def images(self, rows: Iterable[int]) -> list[NDArray[Any]]:
        """Pictures of the rows with these ids, or none at all where one is no image."""
        found = []
        for row in rows:
            picture = image(self.inputs(row))
            if picture is None:
                return []
            found.append(picture)
        return found


def image(inputs: Tensor | None) -> NDArray[Any] | None:
    """The only row of a batch as ``(H, W)`` or ``(H, W, 3)`` in [0, 1], or None if it is no image.

    Example:
        >>> image(torch.rand(1, 3, 8, 6)).shape
        (8, 6, 3)
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or inputs.shape[1] not in (1, 3):
        return None
    whole = inputs[0].detach().float().cpu()
    low, high = float(whole.min()), float(whole.max())
    whole = (whole - low) / (high - low) if high > low else whole * 0
    return thinned(whole[0].numpy() if len(whole) == 1 else whole.permute(1, 2, 0).numpy())


def thinned(picture: NDArray[Any]) -> NDArray[Any]:
    """Every n-th row and column, so that no side is longer than ``LONGEST``; a copy that keeps no larger one alive.

    Example:
        >>> thinned(np.zeros((400, 200, 3))).shape
        (80, 40, 3)
    """
    step = -(-max(picture.shape[:2]) // LONGEST)
    return np.array(picture[::step, ::step])
