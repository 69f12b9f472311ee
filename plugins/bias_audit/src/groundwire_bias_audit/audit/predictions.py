"""Labels, scores and predictions as users have them, checked and brought to one form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit, softmax


def array(values: Any, what: str) -> NDArray[Any]:
    """``values`` as a NumPy array: tensors, frames, series and lists.

    Raises:
        ValueError: It is empty or holds NaN; the text says how many and where the first is.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.dtype.is_floating_point and values.element_size() < 4 else values).numpy()
    found = np.asarray(values)
    found = _inferred(found) if found.dtype == object and found.ndim in (1, 2) else found
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim not in (1, 2):
        raise ValueError(f"{what} must have one or two dimensions, got shape {found.shape}")
    if not len(found):
        raise ValueError(f"{what} is empty")
    missing = _missing(found)
    if missing is not None:
        raise ValueError(f"{what} has {missing.sum()} missing values (NaN or None), the first in row "
                         f"{int(np.argmax(missing))} -> drop or fill these rows before the audit")  # fmt: skip
    return found


def _inferred(values: NDArray[Any]) -> NDArray[Any]:
    """Numbers and truth values that a column of objects holds; anything else as it is."""
    found = pd.DataFrame(values).infer_objects().to_numpy()
    return values if found.dtype.kind not in "biuf" else found.reshape(values.shape)


def _missing(values: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Rows with a missing value, or None if there is none; one cheap look where that suffices."""
    if values.dtype.kind in "biu" or (values.dtype.kind == "f" and not np.isnan(np.min(values))):
        return None
    missing = np.asarray(pd.isna(values))
    rows = missing.any(axis=1) if missing.ndim == 2 else missing
    return np.asarray(rows, bool) if rows.any() else None


def real(values: NDArray[Any], what: str) -> NDArray[np.float64]:
    """One finite number a row.

    Raises:
        ValueError: It is something else.
    """
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise ValueError(f"regression needs one number a row, {what} has shape {values.shape} and type {values.dtype}")
    real = values.astype(np.float64)
    if not np.isfinite(real).all():
        raise ValueError(f"{what} has infinite values")
    return real


def comparable(labels: NDArray[Any], predictions: NDArray[Any]) -> None:
    """Refuse labels and predictions that can never be equal: text beside numbers, or words without one in common.

    Raises:
        ValueError: They are; the text shows both sets of values.

    Example:
        >>> comparable(np.array(["0", "1", "?"]), np.array([0, 1, 1]))
        Traceback (most recent call last):
            ...
        ValueError: y_true holds text (['0', '1', '?'], not numbers: ['?']) and y_pred holds numbers ([0, 1]): ...
    """
    if labels.dtype.kind in "biuf" and predictions.dtype.kind in "biuf":
        return
    values = {"y_true": pd.unique(labels.ravel()), "y_pred": pd.unique(predictions.ravel())}
    kinds = {what: sorted({_kind(value) for value in found}) for what, found in values.items()}
    told = [f"{what} holds {' and '.join(kinds[what])} ({_with_strays(found)})" for what, found in values.items()]
    if len(set(kinds["y_true"] + kinds["y_pred"])) > 1:
        hint = (
            "bring both to one type; one value that is no number, such as '?', makes text of a whole column of a file"
        )
        raise ValueError(f"{' and '.join(told)}: values of different types are never equal -> {hint}")
    if not set(values["y_true"]) & set(values["y_pred"]):
        raise ValueError(f"{' and '.join(told)}: no value is in both -> spell labels and predictions alike")


def _kind(value: Any) -> str:
    """Family of values that can be equal to each other."""
    if isinstance(value, bool | np.bool_ | int | float | np.number):
        return "numbers"
    return "text" if isinstance(value, str) else type(value).__name__


def _with_strays(values: Any) -> str:
    """Some of the values and, where most are numbers written as text, those that are none."""
    numbers = pd.to_numeric(pd.Series([str(value) for value in values]), errors="coerce").notna().to_numpy()
    strays = f", not numbers: {_some(values[~numbers])}" if numbers.any() and not numbers.all() else ""
    return f"{_some(values)}{strays}"


def zero_one(values: NDArray[Any], what: str, pos_label: Any) -> NDArray[np.uint8]:
    """Binary labels as 0 and 1.

    Raises:
        ValueError: They have more than two values, or two of which it is unknown which is the positive one.

    Example:
        >>> zero_one(np.array([-1, 1]), "y_true", None).tolist(), zero_one(np.array(["n", "y"]), "y_true", "y").tolist()
        ([0, 1], [0, 1])
    """
    if values.dtype == bool and pos_label is None:
        return values.view(np.uint8)
    if pos_label is not None:
        found = pd.unique(values.ravel())
        if len(found) > 2 or (len(found) == 2 and pos_label not in list(found)):
            raise ValueError(f"{what} has the labels {_some(found)}, and pos_label is {pos_label!r}")
        return np.asarray(values == pos_label).astype(np.uint8)
    if values.dtype.kind in "iuf":
        low, high = values.min(), values.max()
        bits = values.astype(np.uint8) if low >= 0 and high <= 1 else None
        if bits is not None and (values.dtype.kind != "f" or bool((bits == values).all())):
            return bits
        if low == -1 and high <= 1 and not (values == 0).any():
            return (values > 0).astype(np.uint8)
    raise ValueError(
        f"{what} must be 0/1, -1/1 or bool for a binary task, got {_some(pd.unique(values.ravel()))} "
        "-> pass pos_label=..., or task='multiclass' or 'regression'"
    )


def _some(values: Any) -> str:
    listed = [v.item() if hasattr(v, "item") else v for v in values[:5]]
    return f"{listed}{' and more' if len(values) > 5 else ''}"


def probabilities(values: NDArray[Any], from_logits: bool, axis: bool = False) -> NDArray[Any]:
    """Scores in [0, 1]; logits are refused unless announced.

    Raises:
        ValueError: A score is outside [0, 1].
    """
    if values.dtype.kind not in "biuf":
        commas = all(re.fullmatch(r"-?\d*,\d+", str(value)) for value in values.ravel()[:5])
        hint = " -> they have a decimal comma (on the command line: --decimal ,)" if commas else ""
        raise ValueError(f"scores must be numbers, got text such as {values.ravel()[0]!r}{hint}")
    values = values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
    if from_logits:
        return np.asarray(softmax(values, axis=-1) if axis else expit(values))
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        outside = int(((values < 0) | (values > 1)).sum())
        percent = low >= 0 and 10 < high <= 100
        hint = (
            "as percentages are -> divide by 100"
            if percent
            else "as logits are -> pass from_logits=True if they are, or probabilities P(y=1)"
        )
        raise ValueError(f"{outside} of {values.size} scores are outside [0, 1] (from {low:.4g} to {high:.4g}), {hint}")
    return values


def checked_threshold(threshold: float | Sequence[float], targets: int) -> Any:
    """One number, or one for each target.

    Raises:
        ValueError: A threshold is outside [0, 1], or there are not as many as targets.
    """
    values = np.asarray(threshold, dtype=float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"threshold must be in [0, 1], got {threshold!r}")
    if values.ndim and values.shape != (targets,):
        raise ValueError(f"threshold must be one number or one for each of {targets} targets, got {threshold!r}")
    return float(values) if values.ndim == 0 else values


def sum_to_one(scores: NDArray[Any]) -> None:
    """Class probabilities, up to rounding.

    Raises:
        ValueError: A row does not sum to 1.
    """
    off = float(np.abs(scores.sum(axis=1) - 1).max())
    if off > 1e-3:
        raise ValueError(f"scores of a row must sum to 1, they are off by up to {off:.3g} -> pass probabilities")


Task: TypeAlias = Literal["binary", "multiclass", "multilabel", "regression"]
TASKS = ("binary", "multiclass", "multilabel", "regression")
#: With more whole numbers as labels and predictions the task is asked for, not guessed.
MOST_CLASSES = 50


@dataclass(frozen=True)
class Outputs:
    """Labels, predictions and scores, in one form.

    Attributes:
        task: Kind of the task.
        names: Of the targets: outputs of a multilabel task, classes of a multiclass task, else ("",).
        labels: binary and multilabel 0/1 of shape (n, T); multiclass codes (n,); regression float (n,).
        predictions: In the same form.
        scores: Binary and multilabel P(y=1) of shape (n, T); multiclass probabilities (n, C); or None.
    """

    task: Task
    names: tuple[Any, ...]
    labels: NDArray[Any]
    predictions: NDArray[Any]
    scores: NDArray[Any] | None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.labels)

    @property
    def targets(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Labels and predictions of shape (n, T) as 0/1: classes one against the rest."""
        if self.task != "multiclass":
            return self.labels, self.predictions
        classes = np.arange(len(self.names))
        return self.labels[:, None] == classes, self.predictions[:, None] == classes

    def with_classes(self, names: Sequence[Any]) -> Outputs:
        """The same predictions of a multiclass task, numbered as ``names``, which hold all classes."""
        places = pd.Index(names).get_indexer(self.names)
        return replace(
            self, names=tuple(names), labels=places[self.labels], predictions=places[self.predictions], scores=None
        )

    @property
    def correct(self) -> NDArray[np.bool_]:
        """True where a row is right, shape (n,) or (n, T)."""
        equal: NDArray[np.bool_] = self.labels == self.predictions
        return equal


def read_outputs(
    y_true: Any,
    scores: Any = None,
    y_pred: Any = None,
    *,
    task: str | None = None,
    threshold: float | Sequence[float] = 0.5,
    pos_label: Any = None,
    from_logits: bool = False,
    names: Sequence[str] | None = None,
) -> Outputs:
    """Check and align labels with scores or predictions.

    Raises:
        ValueError: Both or none of ``scores`` and ``y_pred`` given, lengths or shapes that do not fit, missing values,
            scores outside [0, 1], labels that are no labels of the task.

    Example:
        >>> found = read_outputs([0, 1, 1], scores=[0.2, 0.5, 0.4])
        >>> found.task, found.predictions[:, 0].tolist()
        ('binary', [0, 1, 0])
    """
    if (scores is None) == (y_pred is None):
        given = "neither" if scores is None else "both"
        raise ValueError(f"give exactly one of scores and y_pred, got {given}")
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    labels, what = array(y_true, "y_true"), "scores" if y_pred is None else "y_pred"
    given_values = array(scores if y_pred is None else y_pred, what)
    if len(labels) != len(given_values):
        raise ValueError(f"y_true has {len(labels)} rows and {what} {len(given_values)} -> align them row by row")
    kind = task or _guess(labels, given_values, what, pos_label)
    if kind == "regression":
        return Outputs("regression", ("",), real(labels, "y_true"), real(given_values, what), None)
    if kind == "multiclass":
        return _multiclass(labels, given_values, what, from_logits, names)
    columns = names or getattr(y_true, "columns", None)
    return _binary(kind, labels, given_values, what, threshold, pos_label, from_logits, columns)


def _guess(labels: NDArray[Any], values: NDArray[Any], what: str, pos_label: Any) -> str:
    if labels.ndim == 2:
        return "multilabel"
    classes = values.ndim == 2 and values.shape[1] > 2
    if pos_label is not None and not classes:
        return "binary"
    if labels.dtype.kind == "f" and (labels != np.floor(labels)).any():
        return "regression"
    if labels.dtype.kind not in "biuf":
        return "multiclass" if classes or len(pd.unique(labels)) > 2 else "binary"
    if labels.min() >= -1 and labels.max() <= 1:
        return "multiclass" if classes else "binary"
    if values.ndim == 1 and values.dtype.kind == "f" and (values != np.floor(values)).any():
        # Probabilities beside labels such as 1 and 2 are no regression: it must be told which label is meant.
        return "binary" if what == "scores" and values.min() >= 0 and values.max() <= 1 else "regression"
    different = len(pd.unique(labels)) if values.ndim == 1 else 0
    if different > MOST_CLASSES:
        raise ValueError(
            f"y_true has {different} different whole numbers, which may be classes or amounts -> pass "
            "task='regression' or 'multiclass'"
        )
    return "multiclass"


def _binary(
    kind: str,
    labels: NDArray[Any],
    values: NDArray[Any],
    what: str,
    threshold: float | Sequence[float],
    pos_label: Any,
    from_logits: bool,
    columns: Any,
) -> Outputs:
    if what == "y_pred" and pos_label is not None:
        comparable(labels, values)
    y = zero_one(labels, "y_true", pos_label)
    scores = None
    if what == "scores":
        two = kind == "binary" and values.ndim == 2 and values.shape[1] == 2
        scores = probabilities(values, from_logits, axis=two)
        if two:
            sum_to_one(scores)
            scores = scores[:, 1]
        least = checked_threshold(threshold, scores.shape[1] if scores.ndim == 2 else 1)
        predictions = (scores >= np.asarray(least, scores.dtype)).view(np.uint8)
    else:
        predictions = zero_one(values, "y_pred", pos_label)
        if pos_label is not None:
            different = pd.unique(np.concatenate([pd.unique(labels.ravel()), pd.unique(values.ravel())]))
            if len(different) > 2 and not set(different) <= {-1, 0, 1}:
                raise ValueError(f"labels and predictions together have the values {_some(different)} -> a binary task "
                                 "has two, spelled alike in both")  # fmt: skip
    if y.shape != predictions.shape:
        raise ValueError(
            f"y_true has shape {y.shape} and {what} {predictions.shape} -> give one column for each target"
        )
    if y.ndim == 1:
        y, predictions = y[:, None], predictions[:, None]
        scores = None if scores is None else scores[:, None]
    names = ("",) if kind == "binary" else tuple(columns if columns is not None else range(y.shape[1]))
    if len(names) != y.shape[1]:
        raise ValueError(f"{len(names)} target names for {y.shape[1]} targets")
    return Outputs("multilabel" if kind == "multilabel" else "binary", names, y, predictions, scores)


def _multiclass(
    labels: NDArray[Any], values: NDArray[Any], what: str, from_logits: bool, names: Sequence[Any] | None
) -> Outputs:
    if labels.ndim != 1:
        raise ValueError(f"a multiclass task has one label a row, got shape {labels.shape}")
    if what == "y_pred":
        if values.ndim != 1:
            raise ValueError(f"y_pred must be one class a row, got shape {values.shape}")
        comparable(labels, values)
        codes, classes = pd.factorize(np.concatenate([labels, values]), sort=True)
        if not np.intersect1d(codes[: len(labels)], codes[len(labels) :]).size:
            raise ValueError(f"no class is in both: y_true has {_some(pd.unique(labels))} and y_pred "
                             f"{_some(pd.unique(values))} -> number the classes alike")  # fmt: skip
        found = tuple(c.item() if hasattr(c, "item") else c for c in classes)
        return Outputs("multiclass", found, codes[: len(labels)], codes[len(labels) :], None)
    if values.ndim != 2:
        raise ValueError(f"scores of a multiclass task have shape (n, C), got {values.shape} -> or pass y_pred")
    scores = probabilities(values, from_logits, axis=True)
    sum_to_one(scores)
    classes = tuple(range(scores.shape[1])) if names is None else tuple(names)
    if len(classes) != scores.shape[1]:
        raise ValueError(f"{len(classes)} names for {scores.shape[1]} classes")
    codes = pd.Index(classes).get_indexer(labels)
    if (codes < 0).any():
        row = int(np.argmax(codes < 0))
        raise ValueError(f"y_true has the label {labels[row]!r} in row {row}, and the classes are {list(classes)}")
    return Outputs("multiclass", classes, codes, scores.argmax(axis=1), scores)
