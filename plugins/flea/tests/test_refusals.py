"""Refusals of the filter, by name."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from groundwire_flea import filter_sources


def run(data, **options):
    return filter_sources(data.X, data.y, sensitive_features=data.a, sources=data.source, **options)


def broken(data, **changes):
    for name, change in changes.items():
        setattr(
            data, name, change(getattr(data, name).astype(object) if name == "source" else getattr(data, name).copy())
        )
    return data


def put(row, value, column=None):
    def change(values):
        values = values.astype(float) if isinstance(value, float) else values
        if column is None:
            values[row] = value
        else:
            values[row, column] = value
        return values

    return change


CASES = {
    "two sources": ({"source": lambda s: np.where(s == "clinic 0", "A", "B")}, "at least 3"),
    "no label 0 in a source": ("label", "source 'clinic 1' .* has no row with label 0"),
    "no group 1 in a source": ("group", "source 'clinic 1' .* has no row of group 1"),
    "an infinite number": ({"X": put(3, np.inf, 2)}, "column 2 of X has 1 missing or .*, the first in row 3"),
    "a missing number": ({"X": put(4, np.nan, 0)}, "column 0 of X"),
    "a missing group": ({"a": put(5, np.nan)}, "sensitive_features has 1 missing or .*, the first in row 5"),
    "an infinite group": ({"a": put(5, np.inf)}, "sensitive_features has 1 missing or infinite"),
    "a missing source": ({"source": put(6, None)}, "sources has 1 missing"),
    "a missing label": ({"y": put(7, np.nan)}, "y has 1 missing"),
    "unequal lengths": ({"y": lambda y: y[:-1]}, "different numbers of rows"),
    "one group only": ({"a": lambda a: a * 0}, "only the value 0"),
    "one label only": ({"y": lambda y: y * 0}, "only the value 0"),
    "regression": ({"y": lambda y: np.linspace(0.1, 0.9, len(y))}, "regression"),
    "measurements as groups": ({"a": lambda a: np.linspace(0.1, 0.9, len(a))}, "sensitive_features has .* measurement"),
    "masked features": ({"X": lambda x: np.ma.masked_where(x > np.quantile(x, 0.99), x)}, "X has .* masked values"),
    "masked labels": ({"y": lambda y: np.ma.masked_array(y, np.arange(len(y)) == 3)}, "y has 1 masked values"),
    "three dimensions": ({"X": lambda x: x[:, :, None]}, "two dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_by_name(table, case):
    change, text = CASES[case]
    data = table(4)
    if isinstance(change, str):
        drop = (data.source == "clinic 1") & ((data.y == 0) if change == "label" else (data.a == 1))
        data = type(data)(**{k: v[~drop] for k, v in vars(data).items()})
    else:
        data = broken(data, **change)
    with pytest.raises(ValueError, match=text):
        run(data)


def test_identifiers_dates_and_objects_are_refused_by_column(table):
    data = table(4)
    frame = pd.DataFrame(data.X).add_prefix("c")
    for name, values in {
        "patient": [f"p{i}" for i in range(len(frame))],
        "seen": pd.Timestamp("2020-01-01"),
        "born": pd.Timestamp("2020-01-01").date(),
        "stay": pd.Timedelta(days=3),
        "month": pd.Period("2020-01"),
        "price": Decimal("1.5"),
        "notes": [{}] * len(frame),
    }.items():
        with pytest.raises(ValueError, match=f"column '{name}'"):
            filter_sources(frame.assign(**{name: values}), data.y, sensitive_features=data.a, sources=data.source)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fairness": "parity"}, "fairness='parity'"),
        ({"mode": "drop"}, "mode='drop'"),
        ({"n_clean": 9}, "outside 1..4"),
        ({"n_clean": 1.5}, "outside"),
        ({"components": ("disc", "x")}, "components"),
        ({"aggregation": "mean"}, "aggregation"),
        ({"always_keep": ["clinic 77"]}, "always_keep names 'clinic 77'"),
        ({"always_keep": "clinic 1"}, "give a list"),
        ({"always_keep": iter(["clinic 1"])}, "give a list"),
        ({"positive_label": 5, "fairness": "equal_opportunity"}, "positive_label=5"),
        ({"compat": "reference", "fairness": "equalized_odds"}, "demographic parity only"),
        ({"compat": "jax"}, "compat"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": "x"}, "alpha"),
        ({"permutations": 2.5}, "permutations=2.5"),
        ({"always_keep": 2}, "give a list"),
        ({"max_rows_per_source": "all"}, "max_rows_per_source='all'"),
        ({"max_rows_per_source": 1}, "max_rows_per_source"),
    ],
)
def test_arguments_out_of_range_are_refused(table, options, text):
    with pytest.raises(ValueError, match=text):
        run(table(4), **options)


@pytest.mark.parametrize("name", ["y", "a"])
def test_the_published_code_is_asked_about_two_labels_and_two_groups_only(table, name):
    data = table(4)
    setattr(data, name, np.arange(len(data.y)) % 3)
    with pytest.raises(ValueError, match="compat='reference' knows two labels and two groups"):
        run(data, compat="reference")


def test_a_bool_is_no_number_of_sources(table):
    with pytest.raises(TypeError, match="n_clean"):
        run(table(4), n_clean=True)
