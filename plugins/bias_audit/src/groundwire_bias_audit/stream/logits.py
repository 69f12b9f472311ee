"""From the head's scores to the outputs that are audited."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit, softmax
from torch import Tensor

from groundwire import PluginError
from groundwire_bias_audit.audit.predictions import TASKS, Outputs, Task


def read_logits(scores: Tensor, targets: Any, threshold: float, task: str | None = None) -> Outputs:
    """Outputs of a batch from what the head gave, which are logits (or a regression's values).

    Args:
        scores: Shape (B,), (B, 1), (B, C) or (B, T).
        targets: Labels of shape (B,), (B, 1) or (B, T).
        threshold: Predicted 1 where the probability is at least this.
        task: Kind of the task; guessed from the shapes when left out: one score is binary where targets are 0 or 1 and
            a regression elsewhere; two or more are classes where there is one target, targets where there are as many.

    Raises:
        PluginError: Scores and targets do not fit, or a score is NaN.

    Example:
        >>> import torch
        >>> found = read_logits(torch.tensor([[2.0, -1.0], [0.0, 3.0]]), torch.tensor([0, 1]), 0.5)
        >>> found.task, found.predictions[:, 0].tolist()
        ('binary', [0, 1])
    """
    if targets is None:
        raise PluginError("BiasAudit needs the labels of each batch -> pass Plugins(fields=...) that tells targets")
    y = targets.detach() if isinstance(targets, Tensor) else np.asarray(targets)
    s = scores[:, 0] if scores.ndim == 2 and scores.shape[1] == 1 else scores
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    labels = y.cpu().numpy() if isinstance(y, Tensor) else y
    if s.ndim > 2 or labels.ndim > 2 or len(s) != len(labels):
        raise PluginError(
            f"BiasAudit needs one score vector and one label a row, got scores {tuple(scores.shape)} and targets "
            f"{tuple(labels.shape)}"
        )
    kind = task or _task(s, labels)
    if kind not in TASKS:
        raise PluginError(f"task must be one of {', '.join(TASKS)}, got {kind!r}")
    return _made(kind, s, labels, threshold)  # type: ignore[arg-type]


def _task(scores: Tensor, labels: Any) -> Task:
    if labels.ndim == 2:
        return "multilabel"
    if scores.ndim == 2:
        return "binary" if scores.shape[1] == 2 else "multiclass"
    zero_one = bool(np.isin(labels, (0, 1)).all())
    return "binary" if zero_one else "regression"


def _made(task: Task, scores: Tensor, labels: Any, threshold: float) -> Outputs:
    if bool(scores.isnan().any()):
        raise PluginError(f"{int(scores.isnan().sum())} scores of a batch are NaN -> the model has diverged")
    if task == "regression":
        return Outputs(task, ("",), labels.astype(np.float64), scores.double().cpu().numpy(), None)
    if task == "multiclass":
        probabilities = softmax(scores.double().cpu().numpy(), axis=1).astype(np.float32)
        classes = probabilities.shape[1]
        _in_range(labels, classes)
        return Outputs(
            task, tuple(range(classes)), labels.astype(np.int64), probabilities.argmax(axis=1), probabilities
        )
    _in_range(labels, 2)
    if task == "binary" and scores.ndim == 2:
        scores = scores[:, 1] - scores[:, 0]
    # Row by row in double precision: torch's vectorised sigmoid depends on a row's place in the batch.
    p = expit(scores.double().cpu().numpy()).astype(np.float32)
    if p.ndim == 1:
        p, labels = p[:, None], labels[:, None]
    if p.shape != labels.shape:
        raise PluginError(
            f"scores have shape {tuple(scores.shape)} and targets {labels.shape}: not one for each target"
        )
    names = ("",) if task == "binary" else tuple(range(p.shape[1]))
    return Outputs(task, names, labels.astype(np.uint8), (p >= np.float32(threshold)).view(np.uint8), p)


def _in_range(labels: Any, classes: int) -> None:
    known = np.isin(labels, np.arange(classes))
    if not known.all():
        raise PluginError(
            f"the label {labels[~known].flat[0]!r} is none of the {classes} classes 0...{classes - 1} -> pass "
            "BiasAudit(task=...) or map the labels"
        )
