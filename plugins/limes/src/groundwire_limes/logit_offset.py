"""The offset of the logits: a forward hook on the head that adds one vector, or one for each row of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groundwire import PluginError, RunContext
from groundwire.batch import tensors_in
from groundwire.modules import is_compiled, outputs_of
from groundwire_limes.time_steps import BatchSteps


class LogitOffset:
    """Forward hook that adds an offset to the scores of a layer. A copy or a pickle of it adds nothing.

    The offset is a plain attribute and no buffer: state dicts stay the user's, DDP does not give all ranks the first
    one's, and averaging callbacks do not pair it with a copy's. torch.compile takes it as an input, so new values
    compile nothing again.

    Args:
        vector: The offset to begin with, (K,), float32; None to add nothing.

    Attributes:
        vector: The offset of all rows.
        rows: An offset for each row, (B, K), which then counts; None where they share one.
        is_off: Whether nothing is added for the time being.
    """

    changes = "shift"

    def __init__(self, vector: Tensor | None = None) -> None:
        self.vector = vector
        self.rows: Tensor | None = None
        self.is_off = False

    def __call__(self, layer: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        """Return ``output`` plus the offset.

        It is float32 and promotes a half-precision output: rounded to bfloat16, it would be off by up to 1 %.

        Raises:
            PluginError: The rows of ``output`` are not those that have offsets of their own.
        """
        if self.rows is not None:
            return output + rows_along_scores(layer, self.rows, output)
        return output if self.vector is None else output + along_scores(layer, self.vector)

    def __reduce__(self) -> Any:
        return LogitOffset, ()

    def write(self, layer: nn.Module, offset: Tensor) -> None:
        """Set the ``offset`` of ``layer`` for the coming forward passes: (K,), or (B, K) for rows that differ.

        It is on the layer's device. Nothing is set while the hook is off.

        Raises:
            PluginError: It is of another shape, or not finite.
        """
        if offset.dim() not in (1, 2) or offset.shape[-1] != outputs_of(layer):
            raise PluginError(
                f"an offset of shape {tuple(offset.shape)} does not fit {layer} -> give one of shape (K,) or (B, K)"
            )
        if offset.device.type == "cpu" and not (math.isfinite(offset.sum()) or bool(torch.isfinite(offset).all())):
            # On another device the question would wait for it, at every step. A finite sum answers it sooner.
            raise PluginError(
                f"an offset for {layer} has values that are not finite -> clamp the priors away from zero"
            )
        if self.is_off:
            return
        offset = offset.detach().float()
        if offset.dim() == 2:
            self.rows = offset
        else:
            self.vector, self.rows = offset, None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context manager in which nothing is added, whatever is written."""
        before = self.vector, self.rows, self.is_off
        # Zeros, because a compiled model that was called with a vector would be compiled again for None.
        zeros = None if self.vector is None else torch.zeros_like(self.vector)
        self.vector, self.rows, self.is_off = zeros, None, True
        try:
            yield
        finally:
            self.vector, self.rows, self.is_off = before

    def refuse_bypass(self, run: RunContext, batch: Any) -> None:
        """Raise if the hook is attached but has no effect: a model compiled and called before ignores new hooks.

        Raises:
            PluginError: It has none.
        """
        if run.head is None or not is_compiled(run.module):
            return
        with self.off():
            plain = next(tensors_in(run.forward(batch)))
            assert self.vector is not None
            self.vector = self.vector + 1 + plain.abs().max().to(self.vector)
            moved = next(tensors_in(run.forward(batch)))
        if torch.equal(plain, moved):
            raise PluginError(
                f"'limes' cannot correct the scores: the head {run.head.name!r} runs inside a compiled module that was "
                "called before the run and ignores new hooks -> name another layer, or compile after the run starts"
            )


def device_of(layer: nn.Module) -> torch.device:
    """Return the device of the layer's parameters."""
    return next(layer.parameters()).device


def along_scores(layer: nn.Module, vector: Tensor) -> Tensor:
    """Return ``vector`` shaped to broadcast over the layer's output: (K,) for a Linear, (K, 1, ...) for a Conv.

    Example:
        >>> along_scores(nn.Conv2d(1, 3, 1), torch.zeros(3)).shape
        torch.Size([3, 1, 1])
    """
    if isinstance(layer, nn.Linear):  # to ask a module for what it lacks is slow
        return vector
    return vector.reshape(-1, *[1] * len(getattr(layer, "kernel_size", ())))


def rows_along_scores(layer: nn.Module, rows: Tensor, output: Tensor) -> Tensor:
    """Return ``rows`` (B, K) shaped to broadcast over ``output``: (B, 1, ..., K), or (B, K, 1, ...) for a Conv.

    Raises:
        PluginError: ``output`` has another number of rows.

    Example:
        >>> rows_along_scores(nn.Linear(2, 3), torch.zeros(5, 3), torch.zeros(5, 7, 3)).shape
        torch.Size([5, 1, 3])
    """
    if len(rows) != len(output):
        raise PluginError(
            f"a forward pass of {len(output)} rows in a batch whose {len(rows)} rows have offsets of their own -> "
            "make batches whose rows share one offset"
        )
    between = [1] * (output.dim() - 2)
    if hasattr(layer, "kernel_size"):
        return rows.reshape(len(rows), -1, *between)
    return rows.reshape(len(rows), *between, -1)


def by_row(steps: BatchSteps, offset: Callable[[int], Tensor]) -> Tensor:
    """Return the ``offset`` of the batch's step, (K,), or those of each row where rows belong to several, (B, K)."""
    if isinstance(steps.keys, int):
        return offset(steps.keys)
    offsets = {step: offset(step).float() for step in steps.distinct}
    return torch.stack([offsets[step] for step in steps.keys.tolist()])
