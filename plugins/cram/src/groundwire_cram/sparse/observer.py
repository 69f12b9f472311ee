"""One forward pass that tells which layers are called, with what, and whose weight is read by someone else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class InputLayout(NamedTuple):
    """Shape, strides, type and place of an input: all there is to know of it without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def random(self) -> Tensor:
        """Return an input like it, without a draw from the generator that the user seeded."""
        generator = torch.Generator(self.device).manual_seed(0)
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return empty.normal_(generator=generator)


@dataclass
class Observed:
    """Record of what one layer met: the layouts of its inputs, and whether its weight was read outside its forward."""

    inputs: list[InputLayout] = field(default_factory=list)
    read: bool = False
    inside: bool = False


class _Observing:
    """Class that goes before a layer's own class; ``weight`` is a property here, so reads of the parameter come by."""

    __dict__: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        record: Observed = self.__dict__["_observed"]
        record.read |= not record.inside
        weight: Tensor = self.__dict__["_parameters"]["weight"]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        record: Observed = self.__dict__["_observed"]
        layout = InputLayout(tuple(x.shape), x.stride(), x.dtype, x.device)
        if layout not in record.inputs:
            record.inputs.append(layout)
        record.inside = True
        try:
            result: Tensor = super().forward(x)  # type: ignore[misc]
            return result
        finally:
            record.inside = False


def run(module: nn.Module, example_input: Any) -> Any:
    """Run ``module`` on the example: a tensor, a tuple of positional arguments, or a mapping of arguments by name.

    Raises:
        TypeError: It is none of these.
        ValueError: The forward pass failed.
    """
    if not isinstance(example_input, Tensor | tuple | Mapping):
        raise TypeError(
            f"example_input must be a tensor, a tuple of positional arguments or a dict of arguments by name, got "
            f"{type(example_input).__name__} -> give one batch of the size to be served, such as torch.randn(32, 64)"
        )
    arguments = (example_input,) if isinstance(example_input, Tensor) else example_input
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return module(**arguments) if isinstance(arguments, Mapping) else module(*arguments)
    except Exception as error:
        raise ValueError(f"{type(module).__name__} cannot run on example_input: {error}") from error


def observe(module: nn.Module, layers: Iterable[nn.Module], example_input: Any) -> dict[int, Observed]:
    """Return what each of ``layers`` met while ``module`` ran on the example, by ``id``."""
    with _observing(layers) as records:
        run(module, example_input)
    return records


@contextmanager
def _observing(layers: Iterable[nn.Module]) -> Iterator[dict[int, Observed]]:
    """Context manager that gives layers an observing class.

    Hooks would not see reads of a weight, and torch's own fast paths shun modules that have hooks.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    records: dict[int, Observed] = {}
    try:
        for layer in layers:
            own = type(layer)
            records[id(layer)] = layer.__dict__["_observed"] = Observed()
            layer.__class__ = type(own.__name__, (_Observing, own), {})
            changed.append((layer, own))
        yield records
    finally:
        for layer, own in changed:
            layer.__class__ = own
            layer.__dict__.pop("_observed", None)
