"""The three data sets of the published experiments, prepared and divided as there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from groundwire_flea import corruptions

SOURCES, MALICIOUS, SEEDS = 5, 2, 10
#: Published names of the manipulations.
LABELS = dict(
    zip(corruptions.ADVERSARIES, ("ID", "FP", "FL", "FB", "SP", "OP", "OL", "RP", "RA0", "RA1", "RND"), strict=True)
)


@dataclass(frozen=True)
class Dataset:
    """Encoded rows: one-hot without the first level, the group as last categorical column, then numbers."""

    X: np.ndarray
    y: np.ndarray
    a: np.ndarray
    sensitive: int
    #: Groups in the order of their names in the file, which is the order of the published code's draws.
    order: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Run:
    """One seed: training rows in order, the source of each, the malicious ones, and the test rows."""

    train: np.ndarray
    source: np.ndarray
    malicious: list[int]
    test: np.ndarray


def encoded(
    categorical: pd.DataFrame, a: pd.Series, numbers: pd.DataFrame, y: pd.Series, order: tuple[int, int] = (0, 1)
) -> Dataset:
    dummies = pd.get_dummies(categorical.assign(none=0), columns=list(categorical), drop_first=True).drop(
        columns="none"
    )
    x = np.column_stack([dummies, a, numbers]).astype(float)
    return Dataset(x, y.to_numpy(int), a.to_numpy(int), dummies.shape[1], order)


def compas(folder: Path) -> Dataset:
    frame = pd.read_csv(folder / "compas-nonames.csv")
    usable = frame.days_b_screening_arrest.between(-30, 30) & (frame.is_recid != -1) & (frame.c_charge_degree != "O")
    frame = frame[usable & frame.score_text.notna() & (frame.score_text != "N/A")]
    race = frame.race.replace({"Native American": "Other", "Asian": "Other"})
    categorical = pd.DataFrame({"charge": frame.c_charge_degree, "age": frame.age_cat, "race": race})
    return encoded(
        categorical, (frame.sex == "Female").astype(int), frame[["priors_count"]], frame.two_year_recid, (1, 0)
    )


def drugs(folder: Path) -> Dataset:
    frame = pd.read_csv(folder / "drug_consumption.csv")
    numbers = ["Age", "Education", "Country", "Ethnicity", "Nscore", "Escore", "Oscore", "Ascore", "Cscore"]
    a, y = (frame.Gender > 0).astype(int), (frame.Coke != "CL0").astype(int)
    return encoded(pd.DataFrame(index=frame.index), a, frame[[*numbers, "Impulsive", "SS"]], y)


def germancredit(folder: Path) -> Dataset:
    frame = pd.read_csv(folder / "german_credit_data.csv")
    accounts = frame[["Saving accounts", "Checking account"]].fillna("none")
    categorical = accounts.assign(age=pd.cut(frame.Age, [15, 25, 35, 45, 55, 65, 99]))
    numbers = frame[["Duration"]].assign(amount=frame["Credit amount"] / 1000)
    a, y = (frame.Sex == "female").astype(int), (frame.Risk == "good").astype(int)
    return encoded(categorical, a, numbers, y, (1, 0))


DATASETS: dict[str, Callable[[Path], Dataset]] = {"compas": compas, "drugs": drugs, "germancredit": germancredit}


def run_of(data: Dataset, seed: int, n: int = SOURCES, malicious: int = MALICIOUS) -> Run:
    train, test = train_test_split(np.arange(len(data.y)), test_size=0.2, random_state=seed)
    parts = np.array_split(train, n)
    bad = np.random.default_rng(seed).choice(range(n), malicious, replace=False)
    return Run(train, np.repeat(np.arange(n), [len(p) for p in parts]), [int(s) for s in bad], test)


def attacked(data: Dataset, run: Run, adversary: str, seed: int) -> corruptions.Corrupted:
    """The training rows after the attack; the random state is where the published code has it by then."""
    random = np.random.RandomState(seed)
    clean = run.train[~np.isin(run.source, run.malicious)]
    for rows in (run.train, clean):
        _skip_resampling(data, rows, random)
    return corruptions.corrupt(
        data.X[run.train],
        data.y[run.train],
        sensitive_features=data.a[run.train],
        sources=run.source,
        malicious=run.malicious,
        adversary=adversary,
        sensitive_columns=[data.sensitive],
        random_state=random,
    )


def _skip_resampling(data: Dataset, rows: np.ndarray, random: np.random.RandomState) -> None:
    """Draw what the published code's resampling learner draws before the attack."""
    y, a = data.y[rows], data.a[rows]
    for group in data.order:
        for label in (0, 1):
            cell = int(((a == group) & (y == label)).sum())
            wanted = int((a == group).sum() * (y == label).sum() / len(y))
            random.choice(cell, size=wanted, replace=True)
