"""Checks that a traced graph computes what the model computes in evaluation, and each sample by itself.

The model is run as it is, with its parametrizations: in several draws of random numbers, with batches of several sizes,
with and without gradients. Each must give what the graph of the plain weights gives.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from groundwire_aol.certify.graph import tensors_of
from groundwire_aol.errors import UnknownLipschitzError


def refuse_other_results(live: nn.Module, plain: nn.Module, graph: fx.Graph, example: Tensor) -> None:
    """Raise unless ``graph``, of ``plain``, computes what ``live`` computes.

    Args:
        live: The model in evaluation mode, with its parametrizations.
        plain: The same with plain weights.
        graph: What was traced of it.
        example: Two rows.

    Raises:
        UnknownLipschitzError: Results differ, or the model changes its own state.
    """
    # At an example of zeros alone, models would be alike that are not.
    noise = torch.rand((3, *example.shape[1:]), dtype=example.dtype, generator=torch.Generator().manual_seed(0))
    probe = torch.cat([example, example[:1] + noise])
    name = type(live).__name__
    runs: tuple[tuple[slice, AbstractContextManager[Any]], ...] = (
        (slice(0, 5), torch.no_grad()),
        (slice(1, 4), torch.enable_grad()),
        (slice(4, 5), torch.inference_mode()),
        (slice(3, 5), torch.no_grad()),
    )
    before = _state(live)
    with random_states(0):
        try:
            traced = tensors_of(fx.GraphModule(plain, graph)(probe.clone()))
            results = []
            for draw, (rows, mode) in enumerate(runs):
                torch.default_generator.manual_seed(draw)
                with mode:
                    results.append((rows, [t.clone() for t in tensors_of(live(probe[rows].clone()))]))
        except Exception as error:
            raise UnknownLipschitzError(
                name, f"its forward fails outside the trace ({error})", "make it take any batch"
            ) from error
    _refuse_random_weights(live)
    changed = _changes(before, _state(live))
    if changed:
        raise UnknownLipschitzError(
            changed, "it changes in every forward pass of the evaluation", "remove counters and running state"
        )
    if not _close(traced, results[0][1]):
        raise UnknownLipschitzError(
            name, "its forward does not compute what was traced", "remove state and random numbers"
        )
    for rows, result in results[1:]:
        if not _close([t[rows] for t in traced], result):
            raise UnknownLipschitzError(
                name,
                "the result of a sample depends on its batch, or on whether gradients are computed",
                "use no statistics of the batch, and no torch.is_grad_enabled()",
            )


def _close(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Tell whether results are equal up to rounding, which is relative to the largest entry."""
    return len(ones) == len(others) and all(
        a.shape == b.shape and bool((a - b).abs().amax() <= 1e-4 * a.abs().amax())
        for a, b in zip(ones, others, strict=True)
    )


def _refuse_random_weights(live: nn.Module) -> None:
    """Raise for a parametrization that gives another weight at another time."""
    for path, layer in live.named_modules():
        if not parametrize.is_parametrized(layer):
            continue
        for name in layer.parametrizations:
            draws = []
            for seed in range(4):
                with torch.no_grad(), random_states(seed):
                    draws.append(getattr(layer, name).clone())
            if any(not torch.equal(draws[0], draw) for draw in draws[1:]):
                raise UnknownLipschitzError(
                    f"{path}.{name}" if path else name,
                    "its parametrization gives another tensor each time",
                    "make it do nothing in evaluation, or bake it",
                )


def _state(module: nn.Module) -> dict[str, Any]:
    """Return what a forward pass in evaluation may not change: buffers, writes to parameters, and plain attributes."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        found.update({f"{path}.{key}": repr(value) for key, value in vars(part).items() if _is_plain(value)})
    found.update({name: parameter._version for name, parameter in module.named_parameters()})
    found.update({name: buffer.detach().clone() for name, buffer in module.named_buffers()})
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple | set | dict):
        return len(value) < 1000 and all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float | str | bytes | type(None))


def _changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return the name of the first entry that changed; empty if none did."""
    for name in before.keys() & after.keys():
        one, other = before[name], after[name]
        if not (torch.equal(one, other) if isinstance(one, Tensor) else one == other):
            return name.lstrip(".")
    return ""


@contextmanager
def random_states(seed: int) -> Iterator[None]:
    """Context manager with seeded random numbers of torch on the CPU, NumPy and Python; then they go on as before."""
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed)
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(arrays)
