"""Parts of the user's model and data that a prior correction does not go together with."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from groundwire import PluginError, RunContext
from groundwire.batch import tensors_in
from groundwire.modules import is_compiled


def prior_changes(module: nn.Module, trainer: Any) -> list[tuple[str, str]]:
    """Return what gives the batches another class prior than the stream's: (code, text) pairs."""
    found = [
        (code, f"{name or type(layer).__name__}: {text}")
        for name, layer in module.named_modules()
        for code, text in _in_loss(layer)
    ]
    return found + _in_sampler(trainer)


def _in_loss(layer: nn.Module) -> list[tuple[str, str]]:
    notes = []
    kind = type(layer).__name__
    weights = [getattr(layer, name, None) for name in ("weight", "pos_weight")]
    if isinstance(layer, nn.CrossEntropyLoss | nn.NLLLoss | nn.BCEWithLogitsLoss) and any(
        w is not None for w in weights
    ):
        notes.append(
            (
                "class_weights",
                f"{kind} has class weights, which move the prior that the loss sees; LIMES "
                "corrects for the prior of the labels -> leave the weights out, or pass LIMES(weights=...)",
            )
        )
    if getattr(layer, "label_smoothing", 0.0):
        notes.append(
            (
                "smoothed_loss",
                f"{kind} has label_smoothing, so scores are pulled to equal classes and the "
                "correction is only approximate -> label_smoothing=0",
            )
        )
    if "focal" in kind.lower():
        notes.append(
            (
                "focal_loss",
                f"{kind} does not give the posterior probabilities that the correction needs -> cross-entropy",
            )
        )
    return notes


def _in_sampler(trainer: Any) -> list[tuple[str, str]]:
    loader = getattr(trainer, "train_dataloader", None)
    sampler = getattr(loader, "sampler", None)
    names = {type(sampler).__name__, type(getattr(loader, "batch_sampler", None)).__name__}
    balanced = [n for n in names if "weighted" in n.lower() or "balanced" in n.lower() or "imbalanced" in n.lower()]
    return [
        (
            "balanced_sampler",
            f"{n} draws the classes with other frequencies than the stream has, so LIMES forecasts the "
            "sampler's -> give the rows as they came, in the order of time",
        )
        for n in balanced
    ]


def warn(notes: list[tuple[str, str]]) -> None:
    """Warn of each (code, text) once."""
    for _, text in notes:
        warnings.warn(f"limes: {text}", UserWarning, stacklevel=3)


def refuse_probabilities(run: RunContext, batch: Any) -> None:
    """Raise if the model's outputs are probabilities: whoever takes a cross-entropy of them trains something else.

    Raises:
        PluginError: The outputs are the softmax or sigmoid of the head.
    """
    head = run.head
    if head is None or is_compiled(run.module):
        return
    given: list[Tensor] = []
    handle = head.module.register_forward_hook(lambda _, __, output: given.append(output.detach()))
    try:
        returned = list(tensors_in(run.forward(batch)))
    except Exception:  # a module without a usable forward is not asked
        return
    finally:
        handle.remove()
    if given and any(_is_squashed(tensor, given[-1], hasattr(head.module, "kernel_size")) for tensor in returned):
        raise PluginError(
            f"limes: {type(run.module).__name__} returns probabilities, the softmax or sigmoid of {head.name!r}; an "
            "offset belongs to logits, and a loss that takes these for logits would undo it -> return logits, and take "
            "the softmax where probabilities are shown"
        )


def _is_squashed(output: Tensor, scores: Tensor, conv: bool) -> bool:
    if output.numel() != scores.numel():
        return False
    scores = scores.float()
    dim = 1 if conv else -1
    squashed = torch.sigmoid(scores) if scores.shape[dim] == 1 else torch.softmax(scores, dim)
    return bool(torch.allclose(output.float().reshape(-1), squashed.reshape(-1), atol=1e-3))
