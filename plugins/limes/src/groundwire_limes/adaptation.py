"""MAP-EM on a batch that is about to be predicted: one forward pass more, for its scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire import PluginError, RunContext
from groundwire.modules import outputs_of
from groundwire.undo.without_trace import without_trace
from groundwire_limes.clock import Steps
from groundwire_limes.functional import LIMIT, log_offset
from groundwire_limes.labels import class_scores, two_columns
from groundwire_limes.timeline import Timeline
from groundwire_limes.unlabelled import Memory


def adapted_offsets(line: Timeline, memory: Memory, run: RunContext, batch: Any, steps: Steps) -> Tensor | None:
    """Offsets of the batch's rows from its own scores, each step for itself.

    Returns:
        Shape (K,), or (B, K) for a batch of several steps; None where the gate is shut for all of them.
    """
    gates = {step: memory.gate(line.extrapolator, line.forecast(step).ahead) for step in steps.distinct}
    if not any(gate is not None and gate.is_open for gate in gates.values()):
        return None
    scores = raw_scores(run, batch)
    each = len(scores) // steps.rows
    table = torch.zeros(steps.rows, 1 if outputs_of(run.head.module) == 1 else scores.shape[1])  # type: ignore[union-attr]
    for step, gate in gates.items():
        rows = steps.belonging_to(step)
        center = line.forecast(step).prior
        prior = center if gate is None else gate.prior(scores[np.repeat(rows, each)], center)
        table[torch.tensor(rows)] = line.fitted(torch.as_tensor(log_offset(prior, LIMIT)))
    return table[0] if len(gates) == 1 else table


def raw_scores(run: RunContext, batch: Any) -> np.ndarray[Any, Any]:
    """The batch's scores without any offset, (N, K), from a forward pass that leaves no trace.

    Raises:
        PluginError: The module's ``forward`` does not work on the batch's inputs, or does not reach the head.
    """
    module, head = run.module, run.head
    assert head is not None
    found: list[Tensor] = []
    handle = head.module.register_forward_hook(lambda _, __, output: found.append(output.detach()), prepend=True)
    inputs = run.fields(batch).inputs
    try:
        with (
            run.extra_pass(),
            without_trace(module, run.trainer),
            run.trainer.precision_plugin.forward_context(),
            torch.no_grad(),
        ):
            module.eval()
            module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    except Exception as error:
        raise PluginError(_unusable(f"failed with {type(error).__name__}: {error}")) from error
    finally:
        handle.remove()
    if not found:
        raise PluginError(_unusable(f"did not reach the head {head.name!r}"))
    scores = two_columns(class_scores(found[-1].float(), hasattr(head.module, "kernel_size")))
    return np.asarray(scores.cpu().double().numpy())


def _unusable(what: str) -> str:
    return (
        f"limes: unlabelled=True needs the scores of a batch beforehand, and the model's forward(inputs) {what} -> "
        "tell its inputs, a dict for keyword arguments: Plugins(fields=lambda batch: Fields(inputs=...))"
    )
