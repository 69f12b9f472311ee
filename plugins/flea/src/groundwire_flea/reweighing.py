"""Kamiran and Calders' reweighing: weights that make labels and groups independent."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from groundwire_flea.inputs.validation import codes_of, column_of, same_length, values_of


def reweighing(y: Any, *, sensitive_features: Any, sample_weight: Any = None) -> NDArray[Any]:
    r"""Weights after which labels do not depend on groups (Kamiran and Calders, 2012, section 5.2).

    .. math:: w(a, y) = \frac{P(a)\,P(y)}{P(a, y)}

    Exact: no row is drawn or dropped. Probabilities are those of the rows, weighted by ``sample_weight``.

    Args:
        y: (R,) labels.
        sensitive_features: (R,) groups.
        sample_weight: (R,) weights that rows have already; the result is multiplied with them.

    Returns:
        (R,) float64. With weights of 1, the sum is R if every combination occurs.

    Raises:
        ValueError: Unequal lengths, missing values, or weights that are negative, not finite, or all zero.

    Example:
        >>> reweighing([1, 1, 0, 1], sensitive_features=["m", "m", "m", "w"])
        array([1.125, 1.125, 0.75 , 0.75 ])
    """
    labels, groups = column_of(y, "y"), column_of(sensitive_features, "sensitive_features")
    weight = np.ones(len(labels)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
    same_length(y=labels, sensitive_features=groups, sample_weight=weight)
    if not np.isfinite(weight).all() or (weight < 0).any() or not weight.sum() > 0:
        raise ValueError("sample_weight must be finite, not negative, and not all zero")
    label, group = codes_of(labels, values_of(labels), "y"), codes_of(groups, values_of(groups), "sensitive_features")
    joint = np.zeros((group.max() + 1, label.max() + 1))
    np.add.at(joint, (group, label), weight)
    joint /= joint.sum()
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    result: NDArray[Any] = weight * np.divide(expected, joint, out=np.zeros_like(joint), where=joint > 0)[group, label]
    return result


class Reweighing:
    """The weights of :func:`reweighing` by cell, learned once, for batches of a training loop.

    Args:
        y: (R,) labels of the training rows.
        groups: (R,) groups of the training rows.
        sample_weight: (R,) weights that rows have already.

    Raises:
        ValueError: As :func:`reweighing`; and for a batch with a label or group that no training row has.

    Example:
        >>> weights = Reweighing(torch.tensor([1, 1, -1, 1]), torch.tensor([0, 0, 0, 1]))
        >>> weights(torch.tensor([1, -1]), torch.tensor([1, 0]))
        tensor([0.7500, 0.7500])
    """

    def __init__(self, y: Tensor, groups: Tensor, sample_weight: Tensor | None = None) -> None:
        y, groups = y.cpu(), groups.cpu()
        ones = torch.ones(len(y)) if sample_weight is None else sample_weight.detach().cpu()
        found = reweighing(y, sensitive_features=groups, sample_weight=ones) / np.maximum(ones.numpy(), 1e-300)
        self.labels, label = torch.unique(y, return_inverse=True)
        self.groups, group = torch.unique(groups, return_inverse=True)
        self.table = torch.zeros(len(self.groups), len(self.labels))
        known = ones > 0
        self.table[group[known], label[known]] = torch.as_tensor(found, dtype=torch.float32)[known]

    def __call__(self, y: Tensor, groups: Tensor) -> Tensor:
        """Weights (B,) of rows with labels ``y`` and ``groups``; multiply the losses of the rows with them."""
        return self.table.to(y.device)[_place(groups, self.groups, "groups"), _place(y, self.labels, "y")]


def _place(values: Tensor, known: Tensor, name: str) -> Tensor:
    same = values.unsqueeze(-1) == known.to(values.device)
    if not bool(same.any(-1).all()):
        raise ValueError(f"{name} has a value that no training row has; known are {known.tolist()}")
    return same.int().argmax(-1)
