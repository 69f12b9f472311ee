"""The two classification tasks of the LIMES benchmark, as rows that can be drawn by class."""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

LETTERS = 26


@dataclass(frozen=True)
class Task:
    """Rows by class, for training and for evaluation; Gaussian noise is added anew to every row that is drawn."""

    name: str
    classes: int
    train: list[np.ndarray]
    test: list[np.ndarray]
    noise: float = 0.0

    @property
    def features(self) -> int:
        return self.train[0].shape[1]

    def draw(self, rng: np.random.Generator, prior: np.ndarray, rows: int, test: bool = False):
        """``rows`` rows (x, y) whose classes are distributed as ``prior``."""
        y = rng.choice(self.classes, rows, p=prior)
        pools = self.test if test else self.train
        x = np.empty((rows, self.features), np.float32)
        for k in np.unique(y):
            where = np.flatnonzero(y == k)
            x[where] = pools[k][rng.integers(len(pools[k]), size=len(where))]
        if self.noise:
            x += self.noise * rng.standard_normal(x.shape, dtype=np.float32)
        return x, y


def split(x: np.ndarray, y: np.ndarray, classes: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """70 % and 30 % of each class."""
    order = np.random.default_rng(seed).permutation(len(y))
    by_class = [x[order][y[order] == k] for k in range(classes)]
    return [r[: int(0.7 * len(r))] for r in by_class], [r[int(0.7 * len(r)) :] for r in by_class]


def digits() -> Task:
    """scikit-learn's 8x8 digits (values 0 to 16) with Gaussian noise of standard deviation 7."""
    x, y = load_digits(return_X_y=True)
    train, test = split((x / 16).astype(np.float32), y, 10)
    return Task("digits", 10, train, test, noise=7 / 16)


def letters() -> Task:
    """The middle one of five consecutive letters, from its neighbours, in the standard library's docstrings."""
    words = re.findall(r"[a-z]{5,}", docstrings())
    codes = [np.frombuffer(word.encode(), np.uint8).astype(np.int64) - ord("a") for word in words]
    windows = np.concatenate([np.lib.stride_tricks.sliding_window_view(c, 5) for c in codes])
    x = np.zeros((len(windows), 4 * LETTERS), np.uint8)
    for place, column in enumerate((0, 1, 3, 4)):
        x[np.arange(len(x)), place * LETTERS + windows[:, column]] = 1
    train, test = split(x, windows[:, 2], LETTERS)
    return Task("letters", LETTERS, train, test)


@functools.cache
def docstrings() -> str:
    """All docstrings of the standard library's modules (its own tests left out), in lower case."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    found = []
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts):
            found += docs_in(path)
    return "\n".join(found).lower()


def docs_in(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


TASKS = {"digits": digits, "letters": letters}
