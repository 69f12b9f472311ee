"""Features become codes: the same groups in the same order, however the values are stored."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwire_bias_audit import audit
from groundwire_bias_audit.encoding import encoded
from groundwire_bias_audit.grouping import read_groups

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
