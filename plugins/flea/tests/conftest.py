"""Fixtures of the filter's tests: scikit-learn's breast-cancer table, dealt out to sources."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer

spec = importlib.util.spec_from_file_location("flea_clinics_of_tests", Path(__file__).with_name("clinics.py"))
clinics = sys.modules.setdefault("flea_clinics_of_tests", importlib.util.module_from_spec(spec))
spec.loader.exec_module(clinics)


class Table(SimpleNamespace):
    """Rows X, y, a and their source."""

    def given(self):
        """Arguments of ``fit``."""
        return {"X": self.X, "y": self.y, "sensitive_features": self.a, "sources": self.source}


def make_table(n=5, bad=(), features=(0, 1, 4, 8), seed=0, how="protected"):
    """569 patients: label malignant or not, group by the median of one feature, n sources, those in ``bad`` flipped."""
    x, y = load_breast_cancer(return_X_y=True)
    a = (x[:, 21] > np.median(x[:, 21])).astype(int)
    order = np.random.default_rng(seed).permutation(len(y))
    x, y, a = x[order][:, list(features)], y[order], a[order]
    source = np.arange(len(y)) % n
    for s in bad:
        if how == "protected":
            a[source == s] = 1 - a[source == s]
        else:
            y[source == s] = 1 - y[source == s]
    return Table(X=np.column_stack([x, a]), y=y, a=a, source=np.array([f"clinic {s}" for s in source]))


@pytest.fixture
def table():
    return make_table


@pytest.fixture
def bad(table):
    return table(5, (1, 3))
