"""The manipulations of the published experiments, for stress tests of one's own pipeline.

An adversary changes a fixed set of sources and nothing else. Labels and groups have two values each. Nothing is
changed in place, and nothing depends on copy-on-write: a manipulation is a choice of rows, with new labels and groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.utils import check_random_state

from groundwire_flea.inputs.validation import array_of, codes_of, column_of, plain, same_length, values_of


@dataclass(frozen=True)
class Attack:
    """Data for a manipulation: codes 0 and 1 of all rows, the rows of one malicious source, and the clean ones."""

    y: NDArray[Any]
    a: NDArray[Any]
    x: NDArray[Any]
    own: NDArray[Any]
    clean: NDArray[Any]
    random: Any


class Replacement(NamedTuple):
    """Rows of the data that a source becomes, with these labels and groups."""

    rows: NDArray[Any]
    y: NDArray[Any]
    a: NDArray[Any]


Manipulation = Callable[[Attack], Replacement]


def identity(attack: Attack) -> Replacement:
    """ID: nothing."""
    return Replacement(attack.own, attack.y[attack.own], attack.a[attack.own])


def flip_protected(attack: Attack) -> Replacement:
    """FP: swap the two groups."""
    return Replacement(attack.own, attack.y[attack.own], 1 - attack.a[attack.own])


def flip_target(attack: Attack) -> Replacement:
    """FL: swap the two labels."""
    return Replacement(attack.own, 1 - attack.y[attack.own], attack.a[attack.own])


def flip_both(attack: Attack) -> Replacement:
    """FB: swap groups and labels."""
    return Replacement(attack.own, 1 - attack.y[attack.own], 1 - attack.a[attack.own])


def shuffle_protected(attack: Attack) -> Replacement:
    """SP: permute the groups within the source."""
    return Replacement(attack.own, attack.y[attack.own], attack.random.permutation(attack.a[attack.own]))


def overwrite_protected(attack: Attack) -> Replacement:
    """OP: the group becomes the label."""
    return Replacement(attack.own, attack.y[attack.own], attack.y[attack.own])


def overwrite_target(attack: Attack) -> Replacement:
    """OL: the label becomes the group."""
    return Replacement(attack.own, attack.a[attack.own], attack.a[attack.own])


def resample(attack: Attack) -> Replacement:
    """RP: rows (a=1, y=0) are replaced by rows (a=1, y=1) of clean sources or this one; (a=0, y=1) by (a=0, y=0)."""
    rows, pool = attack.own.copy(), np.concatenate([attack.clean, attack.own])
    for group, label in ((1, 0), (0, 1)):
        wrong = np.flatnonzero((attack.a[attack.own] == group) & (attack.y[attack.own] == label))
        better = pool[(attack.a[pool] == group) & (attack.y[pool] != label)]
        if len(better):
            rows[wrong] = _drawn(better, len(wrong), attack.random)
    return Replacement(rows, attack.y[rows], attack.a[rows])


def _drawn(pool: NDArray[Any], count: int, random: Any) -> NDArray[Any]:
    """``count`` of ``pool`` without replacement; whole copies first where more are needed."""
    copies, rest = divmod(count, len(pool))
    drawn: NDArray[Any] = np.concatenate([*[pool] * copies, random.choice(pool, rest, replace=False)])
    return drawn


def random_anchor(attack: Attack, advantaged: int = 0) -> Replacement:
    """RA: points near two anchors, with the opposite labels (Mehrabi et al., 2021, algorithm 2).

    One anchor is a row (a != v, y = 0) of the source; as many rows as the source has with y = 0 become its nearest
    ones among all rows (a != v, y = 1). The other one is a row (a = v, y = 1), and so on.
    """
    near = [_around(attack, attack.a != advantaged, 0), _around(attack, attack.a == advantaged, 1)]
    rows = np.concatenate(near)
    return Replacement(rows, attack.y[rows], attack.a[rows])


def _around(attack: Attack, group: NDArray[Any], label: int) -> NDArray[Any]:
    own: NDArray[Any] = attack.own[attack.y[attack.own] == label]
    anchors, pool, wanted = own[group[own]], np.flatnonzero(group & (attack.y != label)), len(own)
    if not len(anchors) or not len(pool):
        return own
    anchor = attack.x[attack.random.choice(anchors)]
    order = np.argsort(((attack.x[pool] - anchor) ** 2).sum(1), kind="stable")
    chunk = pool[order[:wanted]]
    # Where the pool is too small it is appended as a whole, so the source may grow.
    near: NDArray[Any] = np.tile(chunk, -(-wanted // len(chunk)))
    return near


def random_anchor_other(attack: Attack) -> Replacement:
    """RA with the other group as the advantaged one."""
    return random_anchor(attack, advantaged=1)


#: By name; "random" draws one of the others, but "identity", for each source.
ADVERSARIES: dict[str, Manipulation] = {
    "identity": identity,
    "flip_protected": flip_protected,
    "flip_target": flip_target,
    "flip_both": flip_both,
    "shuffle_protected": shuffle_protected,
    "overwrite_protected": overwrite_protected,
    "overwrite_target": overwrite_target,
    "resample": resample,
    "random_anchor_0": random_anchor,
    "random_anchor_1": random_anchor_other,
}


def random_strategy(attack: Attack) -> Replacement:
    """RND: one of the nine manipulations, drawn anew for each source."""
    names = [name for name in ADVERSARIES if name not in ("identity", "random")]
    return ADVERSARIES[names[attack.random.randint(len(names))]](attack)


ADVERSARIES["random"] = random_strategy


class Corrupted(NamedTuple):
    """Data after an attack. A random anchor may make a source longer, so ``sources`` comes back too."""

    X: Any
    y: NDArray[Any]
    sensitive_features: NDArray[Any]
    sources: NDArray[Any]


def corrupt(
    X: Any,  # noqa: N803
    y: Any,
    *,
    sensitive_features: Any,
    sources: Any,
    malicious: Sequence[Any],
    adversary: str,
    sensitive_columns: Sequence[Any] | None = None,
    random_state: Any = 0,
) -> Corrupted:
    """Manipulate some sources as an adversary of the published experiments does.

    Args:
        X: (R, d) array, tensor or data frame.
        y: (R,) labels of two values; the larger counts as y = 1.
        sensitive_features: (R,) groups of two values; the larger counts as a = 1.
        sources: (R,) the source of each row.
        malicious: The sources to manipulate, in this order.
        adversary: One of :data:`ADVERSARIES`.
        sensitive_columns: Columns of X (places or names) that hold the group and change with it; found when left out:
            those that take two values, one for each group.
        random_state: Seed or NumPy RandomState.

    Returns:
        New X, y, sensitive_features and sources. The rows of each source stay together in their order.

    Raises:
        ValueError: Labels or groups do not have two values, a name is unknown, or ``malicious`` is no list.

    Example:
        >>> a, y = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
        >>> attacked = corrupt(a[:, None], y, sensitive_features=a, sources=list("AABB"), malicious=["A"],
        ...                    adversary="flip_protected")
        >>> attacked.sensitive_features, attacked.X.ravel()
        (array([1, 0, 0, 1]), array([1, 0, 0, 1]))
    """
    if adversary not in ADVERSARIES:
        raise ValueError(f"adversary={adversary!r} -> choose one of {', '.join(ADVERSARIES)}")
    if isinstance(malicious, str):
        raise ValueError(f"malicious={malicious!r} -> give a list of sources")
    names, labels, groups = column_of(sources, "sources"), column_of(y, "y"), column_of(sensitive_features, "groups")
    x = X if isinstance(X, pd.DataFrame) else array_of(X) if isinstance(X, torch.Tensor) else np.asarray(X)
    same_length(X=x, y=labels, sensitive_features=groups, sources=names)
    pairs = [_two_values(labels, "y"), _two_values(groups, "sensitive_features")]
    y_codes, a_codes = codes_of(labels, pairs[0], "y"), codes_of(groups, pairs[1], "sensitive_features")
    codes, found = pd.factorize(names)
    own = {plain(s): np.flatnonzero(codes == place) for place, s in enumerate(found)}
    unknown = [s for s in malicious if s not in own]
    if unknown:
        raise ValueError(f"malicious names {unknown[0]!r}, which is none of the sources")
    columns = _sensitive_columns(x, a_codes) if sensitive_columns is None else list(sensitive_columns)
    random, bad = check_random_state(random_state), np.array([s in malicious for s in own])[codes]
    table = _numbers(x) if "anchor" in adversary or adversary == "random" else np.zeros((len(names), 0))
    manipulated = {
        s: ADVERSARIES[adversary](Attack(y_codes, a_codes, table, own[s], np.flatnonzero(~bad), random))
        for s in dict.fromkeys(malicious)
    }
    parts = [manipulated.get(s, Replacement(rows, y_codes[rows], a_codes[rows])) for s, rows in own.items()]
    rows = np.concatenate([part.rows for part in parts])
    new_a = np.concatenate([part.a for part in parts])
    new_x = _rewritten(x, rows, a_codes, new_a, columns)
    return Corrupted(
        torch.as_tensor(new_x, dtype=X.dtype) if isinstance(X, torch.Tensor) else new_x,
        np.array(pairs[0])[np.concatenate([part.y for part in parts])],
        np.array(pairs[1])[new_a],
        np.repeat(_ids(list(own)), [len(part.rows) for part in parts]),
    )


def _ids(sources: list[Any]) -> NDArray[Any]:
    """Sources as an array in which 1 and "1" stay two, and a tuple stays one."""
    if len({type(s) for s in sources}) == 1 and not isinstance(sources[0], tuple):
        return np.array(sources)
    return np.fromiter(sources, dtype=object, count=len(sources))


def _two_values(series: pd.Series[Any], name: str) -> list[Any]:
    values = values_of(series)
    if len(values) != 2:
        raise ValueError(f"{name} must have two values for a manipulation, got {values[:5]}")
    return values


def _numbers(x: Any) -> NDArray[Any]:
    frame = pd.get_dummies(x) if isinstance(x, pd.DataFrame) else pd.DataFrame(x)
    numbers: NDArray[Any] = frame.to_numpy(dtype=float)
    return numbers


def _column(x: Any, key: Any) -> NDArray[Any]:
    return np.asarray(x[key] if isinstance(x, pd.DataFrame) else x[:, key])


def _sensitive_columns(x: Any, a: NDArray[Any]) -> list[Any]:
    keys = list(x.columns) if isinstance(x, pd.DataFrame) else range(x.shape[1])
    found = []
    for key in keys:
        inside, outside = set(_column(x, key)[a == 1].tolist()), set(_column(x, key)[a == 0].tolist())
        if len(inside) == len(outside) == 1 and inside != outside:
            found.append(key)
    return found


def _rewritten(x: Any, rows: NDArray[Any], a: NDArray[Any], new_a: NDArray[Any], columns: list[Any]) -> Any:
    """The rows, with the columns that hold the group following it."""
    if isinstance(x, pd.DataFrame):
        frame = x.iloc[rows].reset_index(drop=True)
        for key in columns:
            frame[key] = pd.Series(_followed(x[key].to_numpy(), a, new_a)).astype(x[key].dtype)
        return frame
    result: NDArray[Any] = x[rows]
    for key in columns:
        result[:, key] = _followed(x[:, key], a, new_a)
    return result


def _followed(column: NDArray[Any], a: NDArray[Any], new_a: NDArray[Any]) -> NDArray[Any]:
    values: NDArray[Any] = np.array([column[a == 0][0], column[a == 1][0]])[new_a]
    return values
