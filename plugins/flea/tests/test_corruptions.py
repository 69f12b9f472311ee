"""The published manipulations, each against its definition."""

import numpy as np
import pandas as pd
import pytest
import torch

from groundwire_flea.corruptions import ADVERSARIES, corrupt


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    a, y = rng.integers(2, size=300), rng.integers(2, size=300)
    x = np.column_stack([np.arange(300.0), a, rng.normal(size=300)])
    return x, y, a, np.repeat(["A", "B", "C"], 100)


def attack(rows, adversary, malicious=("B",), **options):
    x, y, a, source = rows
    return corrupt(x, y, sensitive_features=a, sources=source, malicious=malicious, adversary=adversary, **options)


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_only_malicious_sources_change_and_the_input_stays(rows, adversary):
    before = [np.copy(part) for part in rows]
    now = attack(rows, adversary)
    for part, kept in zip(rows, before, strict=True):
        np.testing.assert_array_equal(part, kept)
    for name in ("A", "C"):
        old, new = rows[3] == name, now.sources == name
        np.testing.assert_array_equal(now.X[new], rows[0][old])
        np.testing.assert_array_equal(now.y[new], rows[1][old])
        np.testing.assert_array_equal(now.sensitive_features[new], rows[2][old])
    np.testing.assert_array_equal(now.X[:, 1], now.sensitive_features)
    assert len(now.X) == len(now.y) == len(now.sensitive_features) == len(now.sources)


RULES = {
    "identity": lambda y, a: (y, a),
    "flip_protected": lambda y, a: (y, 1 - a),
    "flip_target": lambda y, a: (1 - y, a),
    "flip_both": lambda y, a: (1 - y, 1 - a),
    "overwrite_protected": lambda y, a: (y, y),
    "overwrite_target": lambda y, a: (a, a),
}


@pytest.mark.parametrize("adversary", RULES)
def test_rewriting_follows_its_rule(rows, adversary):
    now, bad = attack(rows, adversary), rows[3] == "B"
    y, a = RULES[adversary](rows[1][bad], rows[2][bad])
    np.testing.assert_array_equal(now.y[bad], y)
    np.testing.assert_array_equal(now.sensitive_features[bad], a)
    np.testing.assert_array_equal(now.X[bad][:, [0, 2]], rows[0][bad][:, [0, 2]])


def test_shuffling_permutes_groups_within_the_source(rows):
    now, bad = attack(rows, "shuffle_protected"), rows[3] == "B"
    expected = np.random.RandomState(0).permutation(rows[2][bad])
    np.testing.assert_array_equal(now.sensitive_features[bad], expected)


def test_resampling_leaves_one_label_in_each_group_and_draws_from_clean_sources(rows):
    now = attack(rows, "resample", malicious=("B", "C"))
    for name in ("B", "C"):
        here = now.sources == name
        np.testing.assert_array_equal(now.y[here], now.sensitive_features[here])
        drawn = now.X[here][:, 0]
        own = np.flatnonzero(rows[3] == name)
        assert set(drawn) <= set(range(100)) | set(own)
        right = own[rows[1][own] == rows[2][own]]
        assert set(right) <= set(drawn)


def test_resampling_from_a_small_pool_takes_whole_copies_first():
    y, a = np.array([0] * 9 + [1, 1] + [0, 1]), np.array([1] * 11 + [0, 0])
    x = np.column_stack([np.arange(13.0), a])
    now = corrupt(x, y, sensitive_features=a, sources=["B"] * 13, malicious=["B"], adversary="resample")
    used = now.X[:9, 0]
    assert sorted({v: int((used == v).sum()) for v in (9, 10)}.values()) == [4, 5]


def test_random_anchors_bring_near_rows_of_the_opposite_label(rows):
    x, y, a, source = rows
    now = attack(rows, "random_anchor_0")
    bad = now.sources == "B"
    minus, plus = int((y[source == "B"] == 0).sum()), int((y[source == "B"] == 1).sum())
    new_y, new_a = now.y[bad], now.sensitive_features[bad]
    assert set(zip(new_a.tolist(), new_y.tolist(), strict=True)) == {(1, 1), (0, 0)}
    pools = [int(((a == 1) & (y == 1)).sum()), int(((a == 0) & (y == 0)).sum())]
    for count, wanted, pool in zip([(new_y == 1).sum(), (new_y == 0).sum()], (minus, plus), pools, strict=True):
        assert count == -(-wanted // min(wanted, pool)) * min(wanted, pool)
    first = now.X[bad][0]
    candidates = x[(a == 1) & (y == 1)]
    anchors = x[(source == "B") & (a == 1) & (y == 0)]
    nearest = [candidates[((candidates - anchor) ** 2).sum(1).argmin()] for anchor in anchors]
    assert any(np.array_equal(first, row) for row in nearest)


def test_a_random_strategy_is_one_of_the_nine_and_reproducible(rows):
    first, second = (attack(rows, "random", malicious=("A", "B"), random_state=4) for _ in range(2))
    np.testing.assert_array_equal(first.X, second.X)
    random = [attack(rows, "random", random_state=seed) for seed in range(30)]
    outcomes = {(len(now.y), now.y.tobytes(), now.sensitive_features.tobytes()) for now in random}
    fixed = [attack(rows, name) for name in RULES if name != "identity"]
    assert outcomes >= {(len(now.y), now.y.tobytes(), now.sensitive_features.tobytes()) for now in fixed}


def test_frames_keep_their_columns_and_text_groups_follow(rows):
    x, y, a, source = rows
    frame = pd.DataFrame({"age": x[:, 0], "sex": np.where(a == 1, "m", "f")})
    groups = frame["sex"].to_numpy()
    now = corrupt(frame, y, sensitive_features=groups, sources=source, malicious=["B"], adversary="flip_protected")
    assert list(now.X) == ["age", "sex"]
    assert (now.X["sex"].to_numpy() == now.sensitive_features).all()
    assert (now.X["sex"][source == "B"].to_numpy() != frame["sex"][source == "B"].to_numpy()).all()
    assert (frame["sex"].to_numpy() == groups).all()


def test_tensors_stay_tensors(rows):
    x, y, a, source = rows
    now = corrupt(
        torch.tensor(x), torch.tensor(y), sensitive_features=torch.tensor(a), sources=source, malicious=["B"],
        adversary="flip_both",
    )  # fmt: skip
    assert isinstance(now.X, torch.Tensor)
    learned = torch.tensor(x, dtype=torch.bfloat16, requires_grad=True)
    again = corrupt(learned, y, sensitive_features=a, sources=source, malicious=["B"], adversary="flip_both")
    assert again.X.dtype == torch.bfloat16
    np.testing.assert_array_equal(now.X[:, 1].numpy(), now.sensitive_features)


@pytest.mark.parametrize("adversary", ["flip_protected", "overwrite_protected", "resample", "random_anchor_1"])
def test_columns_of_every_type_keep_it_and_follow_the_group(rows, adversary):
    x, y, a, source = rows
    columns = {
        "age": x[:, 0],
        "sex": pd.Categorical(np.where(a == 1, "m", "f")),
        "text": pd.array(np.where(a == 1, "m", "f"), dtype="string"),
        "flag": a == 1,
        "number": pd.array(a, dtype="Int64"),
        "day": pd.Timestamp("2020-01-01") + pd.to_timedelta(a, unit="D"),
        "ward": pd.Categorical(np.where(x[:, 2] > 0, "north", "south")),
    }
    frame = pd.DataFrame(columns, index=np.arange(300)[::-1])
    before = frame.copy()
    now = corrupt(frame, y, sensitive_features=frame["sex"], sources=source, malicious=["B"], adversary=adversary)
    pd.testing.assert_frame_equal(frame, before)
    assert (now.X.dtypes == frame.dtypes).all()
    changed = now.sensitive_features == "m"
    for name, values in {"sex": "m", "text": "m", "flag": True, "number": 1, "day": pd.Timestamp("2020-01-02")}.items():
        np.testing.assert_array_equal((now.X[name] == values).to_numpy(dtype=bool), changed)
    same = now.sources != "B"
    pd.testing.assert_frame_equal(
        now.X[same].reset_index(drop=True), frame[source != "B"].reset_index(drop=True), check_freq=False
    )


@pytest.mark.parametrize("ids", [[1, "1", 2.5], [("a", 1), ("a", 2), ("b", 1)]], ids=["mixed", "tuples"])
def test_names_of_sources_come_back_as_they_were(rows, ids):
    x, y, a, source = rows
    named = pd.Series([ids["ABC".index(s)] for s in source], dtype=object)
    now = corrupt(x, y, sensitive_features=a, sources=named, malicious=ids[1:2], adversary="flip_protected")
    assert now.sources.tolist() == named.tolist()
    np.testing.assert_array_equal(now.sensitive_features != a, source == "B")


def test_what_cannot_be_manipulated_is_refused(rows):
    x, y, a, source = rows
    with pytest.raises(ValueError, match="adversary='flip'"):
        attack(rows, "flip")
    with pytest.raises(ValueError, match="malicious names 'Z'"):
        attack(rows, "identity", malicious=["Z"])
    with pytest.raises(ValueError, match="malicious='B' -> give a list"):
        attack(rows, "identity", malicious="B")
    with pytest.raises(ValueError, match="two values"):
        corrupt(x, y + 2 * a, sensitive_features=a, sources=source, malicious=["A"], adversary="flip_target")
