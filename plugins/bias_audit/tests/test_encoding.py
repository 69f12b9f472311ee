"""Features become codes: the same groups in the same order, however the values are stored."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwire_bias_audit import audit
from groundwire_bias_audit.audit.groups import encoded, joined, read_groups

WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20), min_size=1)


def by_rows(words):
    """The definition: the rank of each word among the different ones."""
    levels = sorted(set(words))
    return [levels.index(word) for word in words], tuple(levels)


@given(WORDS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_words_of_fixed_width_are_told_apart_by_every_character(words, latin):
    if latin:
        words = [word.encode("latin-1", "replace").decode("latin-1") for word in words]
    for order in "<>":
        codes, levels = encoded("word", np.array(words).astype(f"{order}U20"), len(words), 10_000)
        assert (codes.tolist(), levels) == by_rows(words)


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        np.array,
        pd.Series,
        pd.Categorical,
        lambda v: np.array(v, dtype=object),
        lambda v: pd.Series(v, dtype=object),
        lambda v: np.array(v, dtype=np.dtypes.StringDType()),
        lambda v: np.array(v, dtype=">U9"),
        lambda v: np.array(v)[::-1][::-1],
    ],
)
def test_words_are_the_same_groups_in_any_form(form):
    words = ["south", "north", "west, far", "south", "", "Zoë", "日本", "northern"] * 3
    groups = read_groups(form(words), rows=len(words))
    assert (groups.codes.tolist(), groups.levels[0]) == by_rows(words)


def test_a_text_that_says_nan_is_a_text_and_a_missing_one_is_missing():
    y = [0, 1, 0, 1]
    assert audit(y, y_pred=y, sensitive_features=np.array(["nan", "a", "a", "a"])).to_frame().index.tolist() == [
        "a",
        "nan",
    ]
    for values in (["b", None, "a", "a"], np.array(["b", np.nan, "a", "a"], dtype=object)):
        frame = audit(y, y_pred=y, sensitive_features=values).to_frame()
        assert frame["count"].to_dict() == {"a": 2, "b": 1, "unknown": 1}


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint64"])
def test_integers_of_any_width_are_told_apart(kind):
    low = 0 if kind.startswith("u") else -100
    codes, levels = encoded("age", np.array([127, low, 3, 127], kind), 4, 100)
    assert (codes.tolist(), levels) == ([2, 0, 1, 2], (low, 3, 127))


@pytest.mark.parametrize("unit", ["D", "s", "ns"])
def test_times_are_times_and_no_numbers(unit):
    values = np.array(["2021-01-01", "2020-01-01", "NaT"], f"M8[{unit}]")
    codes, levels = encoded("since", values, 3, 100)
    assert codes.tolist() == [1, 0, 2]
    assert [str(level)[:10] for level in levels] == ["2020-01-01", "2021-01-01", "unknown"]


BATCHES = {
    "numbers": ([np.array([0, 2]), torch.tensor([1, 0])], [0, 2, 1, 0], "0 1 2"),
    "columns": ([torch.tensor([[0], [2]]), torch.tensor([[1], [0]])], [0, 2, 1, 0], "0 1 2"),
    "words": ([["f", "m"], ("m", "x")], [0, 1, 1, 2], "f m x"),
    "words of several widths": ([np.array(["f", "m"]), np.array(["male", "x"])], [0, 1, 2, 3], "f m male x"),
    "missing ones": ([[0, 1], [None, 1]], [0, 1, 2, 1], "0 1 unknown"),
    "series": ([pd.Series(["a", None]), pd.Series(["b", "a"])], [0, 2, 1, 0], "a b unknown"),
    "truth values": ([np.array([True, False]), [True, True]], [1, 0, 1, 1], "False True"),
    "times": ([np.array([y, y], "M8[ns]") for y in ("2020", "2021")], [0, 0, 1, 1], "2020-01-01 2021-01-01"),
}


@pytest.mark.parametrize(("parts", "codes", "levels"), BATCHES.values(), ids=BATCHES)
def test_batches_are_joined_to_the_column_that_they_are_parts_of(parts, codes, levels):
    found, named = encoded("g", joined(parts), 4, 100)
    assert found.tolist() == codes
    assert [str(level)[:10] for level in named] == levels.split()
