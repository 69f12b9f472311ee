"""Checks that a traced graph computes what the model computes, and each sample by itself."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from groundwire_aol.certify.graph import tensors_of
from groundwire_aol.errors import UnknownLipschitzError


def refuse_other_results(module: nn.Module, graph: fx.Graph, example: Tensor) -> None:
    """Raise unless the graph computes what the model computes, and each sample by itself."""
    # At an example of zeros alone, models would be alike that are not.
    noise = torch.rand(example.shape, dtype=example.dtype, generator=torch.Generator().manual_seed(0))
    probe, traced = example + noise, fx.GraphModule(module, graph)
    name = type(module).__name__
    try:
        ones, others = ([tensors_of(f(x.clone())) for x in (example, probe)] for f in (module, traced))
        alone = tensors_of(module(probe[1:].clone()))
    except Exception as error:
        raise UnknownLipschitzError(
            name, f"its forward fails outside the trace ({error})", "make it take any batch"
        ) from error
    if not all(map(_close, ones, others)):
        raise UnknownLipschitzError(
            name, "its forward does not compute what was traced", "remove state and random numbers"
        )
    if not _close([t[1:] for t in ones[1]], alone):
        raise UnknownLipschitzError(
            name, "the result of a sample depends on its batch", "use no statistics of the batch"
        )


def _close(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Equal up to rounding, which is relative to the largest entry."""
    return len(ones) == len(others) and all(
        a.shape == b.shape and bool((a - b).abs().amax() <= 1e-4 * a.abs().amax())
        for a, b in zip(ones, others, strict=True)
    )
