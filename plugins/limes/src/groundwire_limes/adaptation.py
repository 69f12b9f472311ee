"""Adaptation to batches without labels: offsets from a batch's own scores, by one forward pass more."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire import PluginError, RunContext
from groundwire.modules import outputs_of
from groundwire_limes.expectation_maximization import LabelledScores
from groundwire_limes.functional import Array
from groundwire_limes.labels import Labels, as_two_logits, class_scores
from groundwire_limes.prior_tracker import PriorTracker
from groundwire_limes.time_steps import BatchSteps


def remember(labelled: LabelledScores, steps: BatchSteps, scores: Tensor, labels: Labels) -> None:
    """Keep raw ``scores`` (N, K) of a training batch and their labels for the gate."""
    known, hard = labels.weights().cpu().numpy() > 0, labels.hard.cpu().numpy()
    for step in steps.distinct:
        if labelled.has_room(step):
            rows = known & steps.mask(step, len(scores))
            labelled.add(step, scores[torch.as_tensor(rows, device=scores.device)].cpu().numpy(), hard[rows])


def adapted_offset(
    tracker: PriorTracker, labelled: LabelledScores, run: RunContext, batch: Any, steps: BatchSteps
) -> Tensor | None:
    """Return offsets of the batch's rows from its own scores, each time step for itself.

    Returns:
        Shape (K,), or (B, K) for a batch of several steps; None where the gate is shut for all of them.
    """
    assert run.head is not None
    gates = {step: labelled.gate(tracker.extrapolator, tracker.forecast(step).ahead) for step in steps.distinct}
    if not any(gate is not None and gate.is_open for gate in gates.values()):
        return None
    scores = raw_scores(run, batch)
    offsets = torch.zeros(steps.rows, outputs_of(run.head.module))
    for step, gate in gates.items():
        center = tracker.forecast(step).prior
        prior = center if gate is None else gate.prior(scores[steps.mask(step, len(scores))], center)
        offsets[torch.tensor(steps.mask(step))] = tracker.offset_of(prior)
    return offsets[0] if len(gates) == 1 else offsets


def raw_scores(run: RunContext, batch: Any) -> Array:
    """Return the batch's scores without any offset, (N, K), from a forward pass that leaves no trace.

    Raises:
        PluginError: The module's ``forward`` does not work on the batch's inputs, or does not reach the head.
    """
    head = run.head
    assert head is not None
    found: list[Tensor] = []
    handle = head.module.register_forward_hook(lambda _, __, output: found.append(output.detach()), prepend=True)
    try:
        run.forward(batch)
    except Exception as error:
        raise PluginError(_unusable(f"failed with {type(error).__name__}: {error}")) from error
    finally:
        handle.remove()
    if not found:
        raise PluginError(_unusable(f"did not reach the head {head.name!r}"))
    scores = as_two_logits(class_scores(found[-1].float(), hasattr(head.module, "kernel_size")))
    return np.asarray(scores.cpu().double().numpy())


def _unusable(what: str) -> str:
    return (
        f"limes: unlabelled=True needs the scores of a batch beforehand, and the model's forward(inputs) {what} -> "
        "tell its inputs, a dict for keyword arguments: Plugins(fields=lambda batch: Fields(inputs=...))"
    )
