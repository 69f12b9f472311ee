"""Streams whose class mix moves: true priors by hour, for the regimes that the LIMES benchmark compares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

HOURS = 24


def zipf(rng: np.random.Generator, classes: int) -> np.ndarray:
    """Zipf frequencies in random order, as logarithms."""
    return -np.log(rng.permutation(classes) + 1.0)


def daily(rng: np.random.Generator, classes: int, hours: int) -> np.ndarray:
    """A daily curve of each class with a half-day harmonic, in log-odds; shape (hours, classes)."""
    t = np.arange(hours)[:, None]
    size, phases = rng.uniform(0.8, 1.8, classes), rng.uniform(0, 2 * np.pi, (2, classes))
    return size * (np.cos(2 * np.pi * t / HOURS + phases[0]) + 0.4 * np.cos(4 * np.pi * t / HOURS + phases[1]))


def noise(rng: np.random.Generator, classes: int, hours: int, sd: float = 0.08, keep: float = 0.8) -> np.ndarray:
    """An AR(1) process in log-odds."""
    out = np.zeros((hours, classes))
    for t in range(1, hours):
        out[t] = keep * out[t - 1] + sd * rng.standard_normal(classes)
    return out


def cycle(rng: np.random.Generator, classes: int, hours: int) -> np.ndarray:
    return zipf(rng, classes) + daily(rng, classes, hours) + noise(rng, classes, hours)


def weekly(rng: np.random.Generator, classes: int, hours: int) -> np.ndarray:
    """Weekends are flatter."""
    weekend = (np.arange(hours)[:, None] // HOURS) % 7 >= 5
    return zipf(rng, classes) + daily(rng, classes, hours) * np.where(weekend, 0.3, 1.0) + noise(rng, classes, hours)


def shift(rng: np.random.Generator, classes: int, hours: int) -> np.ndarray:
    """In mid-stream the day moves by eight hours and the classes get new base rates."""
    curve = daily(rng, classes, hours + 8)
    late = np.arange(hours)[:, None] >= hours // 2
    base = np.where(late, zipf(rng, classes), zipf(rng, classes))
    return base + np.where(late, curve[8:], curve[:hours]) + noise(rng, classes, hours)


def walk(rng: np.random.Generator, classes: int, hours: int) -> np.ndarray:
    """A random walk without any season."""
    return zipf(rng, classes) + np.cumsum(0.15 * rng.standard_normal((hours, classes)), axis=0)


def stationary(rng: np.random.Generator, classes: int, hours: int) -> np.ndarray:
    return np.repeat(zipf(rng, classes)[None], hours, axis=0)


def random(rng: np.random.Generator, classes: int, hours: int) -> np.ndarray:
    """Every hour has a prior of its own, which nothing foretells."""
    return zipf(rng, classes) + rng.uniform(0.8, 1.8, classes) * 0.8 * rng.standard_normal((hours, classes))


REGIMES: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "cycle": cycle,
    "weekly": weekly,
    "shift": shift,
    "walk": walk,
    "stationary": stationary,
    "random": random,
}


def priors(regime: str, classes: int, hours: int, seed: int) -> np.ndarray:
    """True class priors, shape (hours, classes)."""
    logits = REGIMES[regime](np.random.default_rng([seed, 11]), classes, hours)
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)
