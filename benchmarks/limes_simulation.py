"""Prequential training of many linear classifiers at once on one stream: the same rows, one correction each.

Test, then train: hour by hour, evaluate on new rows with the forecast, then train on the hour's rows in batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from limes_data import Task
from limes_streams import HOURS, priors

from groundwire_limes import PriorExtrapolator
from groundwire_limes.expectation_maximization import LabelledScores, map_em
from groundwire_limes.functional import dirichlet_mean, log_offset
from groundwire_limes.prior_tracker import STRENGTH

ROWS, BATCH, RATE = 1000, 100, 2e-3


class Learners:
    """M linear softmax classifiers, stacked; each learns as if alone, by Adam."""

    def __init__(self, models: int, features: int, classes: int) -> None:
        self.w, self.b = torch.zeros(models, features, classes), torch.zeros(models, 1, classes)
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (self.w, self.b)]
        self.steps = torch.zeros(models, 1, 1)

    def scores(self, x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        """(len(which), N, K)."""
        return x @ self.w[which] + self.b[which]

    def train(self, x: torch.Tensor, y: torch.Tensor, offsets: torch.Tensor, which: torch.Tensor) -> None:
        """One Adam step of each of ``which`` on the cross-entropy of its scores plus its offset (len(which), K)."""
        error = torch.softmax(self.scores(x, which) + offsets[:, None, :], dim=-1)
        error[:, torch.arange(len(y)), y] -= 1
        error /= len(y)
        self.steps[which] += 1
        t = self.steps[which]
        for p, grad, (m, v) in zip(
            (self.w, self.b), (x.T @ error, error.sum(dim=1, keepdim=True)), self.moments, strict=True
        ):
            m[which] = 0.9 * m[which] + 0.1 * grad
            v[which] = 0.999 * v[which] + 0.001 * grad**2
            p[which] -= RATE * (m[which] / (1 - 0.9**t)) / ((v[which] / (1 - 0.999**t)).sqrt() + 1e-8)

    def restart(self, model: int) -> None:
        for p, (m, v) in zip((self.w, self.b), self.moments, strict=True):
            p[model] = m[model] = v[model] = 0
        self.steps[model] = 0


@dataclass
class Way:
    """One row of the table: what corrects the scores.

    Attributes:
        forecast: The forecaster's arguments, "oracle", "random", or None for no correction.
        running: Whether the loss is corrected by forecast and labels so far, or by the forecast alone.
        em: Strength of MAP-EM on the evaluated hour, "gate" for the gated one, or None.
        reset: Fresh weights before each hour's training.
        ensemble: Models that take turns; 1 for one.
    """

    forecast: dict | str | None = None
    running: bool = True
    em: float | str | None = None
    reset: bool = False
    ensemble: int = 1
    models: list[int] = field(default_factory=list)


def ways(period: int | None = HOURS) -> dict[str, Way]:
    """The table's rows."""
    named = {
        name: Way({"method": name, "period": period}) for name in ("persistence", "seasonal", "kalman", "long_run")
    }
    return {
        "incremental": Way(),
        "published rule": Way({"method": "nearest"}, running=False),
        "LIMES": Way({"period": period}),
        "LIMES, training_prior=forecast": Way({"period": period}, running=False),
        "nearest, running": Way({"method": "nearest"}),
        **named,
        "random past prior": Way("random", running=False),
        "ensemble of 24": Way(ensemble=24),
        "restart": Way(reset=True),
        "oracle": Way("oracle", running=False),
    }


def delayed_ways(period: int | None = HOURS) -> dict[str, Way]:
    """Rows for labels that come a day late."""
    return {
        "incremental": Way(),
        "published rule": Way({"method": "nearest"}, running=False),
        **{name: Way({"method": name, "period": period}) for name in ("persistence", "seasonal", "kalman", "long_run")},
        "LIMES": Way({"period": period}),
        "LIMES, EM of the batch": Way({"period": period}, em=0.0),
        "LIMES, MAP-EM s=100": Way({"period": period}, em=100.0),
        "LIMES, MAP-EM s=300": Way({"period": period}, em=300.0),
        "LIMES, MAP-EM s=1000": Way({"period": period}, em=1000.0),
        "LIMES, unlabelled=True": Way({"period": period}, em="gate"),
        "oracle": Way("oracle", running=False),
    }


def simulate(
    task: Task, regime: str, seed: int, days: int, rows: dict[str, Way], delay: int = 0, tick: Callable[[], None] = list
) -> dict[str, np.ndarray]:
    """Accuracy by hour of each way; ``delay`` is how many hours labels come late."""
    return Simulation(task, regime, seed, days, rows, delay).run(tick)


class Simulation:
    """One stream and all ways of learning from it."""

    def __init__(self, task: Task, regime: str, seed: int, days: int, rows: dict[str, Way], delay: int) -> None:
        self.task, self.ways, self.delay = task, rows, delay
        self.truth = priors(regime, task.classes, days * HOURS, seed)
        self.rng = np.random.default_rng([seed, 1])
        self.past = np.random.default_rng([seed, 2])
        count = 0
        for way in rows.values():
            way.models = list(range(count, count + way.ensemble))
            count += way.ensemble
        self.learners = Learners(count, task.features, task.classes)
        # Ways with the same forecaster share it: forecasts do not depend on the model.
        self.forecasters: dict[str, PriorExtrapolator] = {}
        self.labelled_scores = {name: LabelledScores() for name, way in rows.items() if way.em == "gate"}
        self.history: list[np.ndarray] = []

    def run(self, tick: Callable[[], None]) -> dict[str, np.ndarray]:
        hours = len(self.truth)
        accuracy = {name: np.zeros(hours) for name in self.ways}
        unlearned = []
        for t in range(hours):
            x, y = self.task.draw(self.rng, self.truth[t], ROWS, test=True)
            self.evaluate(t, torch.from_numpy(x), y, accuracy)
            unlearned.append(self.task.draw(self.rng, self.truth[t], ROWS))
            if t >= self.delay:
                x, y = unlearned[t - self.delay]
                unlearned[t - self.delay] = None
                self.learn(t - self.delay, torch.from_numpy(x), y)
            tick()
        return accuracy

    def model(self, way: Way, t: int) -> int:
        return way.models[t % len(way.models)]

    def forecaster(self, way: Way) -> PriorExtrapolator:
        key = str(way.forecast)
        if key not in self.forecasters:
            self.forecasters[key] = PriorExtrapolator(self.task.classes, **way.forecast)
        return self.forecasters[key]

    def prior(self, way: Way, t: int) -> np.ndarray:
        if way.forecast is None:
            return np.full(self.task.classes, 1 / self.task.classes)
        if way.forecast == "oracle":
            return self.truth[t]
        if way.forecast == "random":
            return self.history[self.past.integers(len(self.history))] if self.history else self.prior(Way(), t)
        return self.forecaster(way).forecast(t)

    def evaluate(self, t: int, x: torch.Tensor, y: np.ndarray, accuracy: dict[str, np.ndarray]) -> None:
        which = torch.tensor([self.model(way, t) for way in self.ways.values()])
        scores = self.learners.scores(x, which).numpy()
        for (name, way), z in zip(self.ways.items(), scores, strict=True):
            prior = self.adapted(name, way, z, self.prior(way, t), t)
            accuracy[name][t] = 100 * np.mean((z + log_offset(prior)).argmax(axis=1) == y)

    def adapted(self, name: str, way: Way, z: np.ndarray, prior: np.ndarray, t: int) -> np.ndarray:
        if way.em is None:
            return prior
        if way.em != "gate":
            return map_em(z.astype(np.float64), prior, way.em)
        gate = self.labelled_scores[name].gate(self.forecaster(way), self.delay + 1)
        return prior if gate is None else gate.prior(z.astype(np.float64), prior)

    def learn(self, t: int, x: torch.Tensor, y: np.ndarray) -> None:
        which = torch.tensor([self.model(way, t) for way in self.ways.values()])
        for way in self.ways.values():
            if way.reset:
                self.learners.restart(self.model(way, t))
        counts = np.bincount(y, minlength=self.task.classes).astype(np.float64)
        for name, labelled in self.labelled_scores.items():
            scores = self.learners.scores(x[:256], torch.tensor([self.model(self.ways[name], t)]))[0]
            labelled.add(t, scores.numpy(), y[:256])
        forecasts = [self.prior(way, t) for way in self.ways.values()]
        seen = np.zeros(self.task.classes)
        targets = torch.from_numpy(y)
        for start in range(0, len(y), BATCH):
            mixed = [
                dirichlet_mean(seen, p, STRENGTH) if way.running and isinstance(way.forecast, dict) else p
                for way, p in zip(self.ways.values(), forecasts, strict=True)
            ]
            offsets = torch.from_numpy(np.stack([log_offset(p) for p in mixed]).astype(np.float32))
            rows = slice(start, start + BATCH)
            self.learners.train(x[rows], targets[rows], offsets, which)
            seen += np.bincount(y[rows], minlength=self.task.classes)
        for forecaster in self.forecasters.values():
            forecaster.update(t, counts)
        self.history.append((counts + 1) / (counts + 1).sum())


def mean_and_worst(accuracy: np.ndarray, skip_days: int = 2) -> tuple[float, float]:
    """Mean over the hours after the first days, and the mean over these days of the worst hour."""
    by_day = accuracy[skip_days * HOURS :].reshape(-1, HOURS)
    return float(by_day.mean()), float(by_day.min(axis=1).mean())
