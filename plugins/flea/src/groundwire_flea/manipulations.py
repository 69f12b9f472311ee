"""What an adversary makes of one source: a choice of rows, with new labels and groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from groundwire_flea.functional import Array


@dataclass(frozen=True)
class Attack:
    """What a manipulation sees: codes 0 and 1 of all rows, the rows of one malicious source, and the clean ones."""

    y: Array
    a: Array
    x: Array
    own: Array
    clean: Array
    random: Any


class Replacement(NamedTuple):
    """What a source becomes: rows of the data, with these labels and groups."""

    rows: Array
    y: Array
    a: Array


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


def _drawn(pool: Array, count: int, random: Any) -> Array:
    """``count`` of ``pool`` without replacement; whole copies first where more are needed."""
    copies, rest = divmod(count, len(pool))
    drawn: Array = np.concatenate([*[pool] * copies, random.choice(pool, rest, replace=False)])
    return drawn


def random_anchor(attack: Attack, advantaged: int = 0) -> Replacement:
    """RA: points near two anchors, with the opposite labels (Mehrabi et al., 2021, algorithm 2).

    One anchor is a row (a != v, y = 0) of the source; as many rows as the source has with y = 0 become its nearest
    ones among all rows (a != v, y = 1). The other one is a row (a = v, y = 1), and so on.
    """
    near = [_around(attack, attack.a != advantaged, 0), _around(attack, attack.a == advantaged, 1)]
    rows = np.concatenate(near)
    return Replacement(rows, attack.y[rows], attack.a[rows])


def _around(attack: Attack, group: Array, label: int) -> Array:
    own: Array = attack.own[attack.y[attack.own] == label]
    anchors, pool, wanted = own[group[own]], np.flatnonzero(group & (attack.y != label)), len(own)
    if not len(anchors) or not len(pool):
        return own
    anchor = attack.x[attack.random.choice(anchors)]
    order = np.argsort(((attack.x[pool] - anchor) ** 2).sum(1), kind="stable")
    chunk = pool[order[:wanted]]
    # Where the pool is too small it is appended as a whole, so the source may grow.
    near: Array = np.tile(chunk, -(-wanted // len(chunk)))
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
