"""Scores and selection: what the definitions promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from groundwire_flea.distances.pairwise import disbalance, q_scores, total_distance
from groundwire_flea.lower_bound import unavoidable_unfairness
from groundwire_flea.selection import clean_count, select


def matrices(n):
    values = hnp.arrays(float, (n, n), elements=st.floats(0, 3))
    return values.map(lambda m: np.triu(m, 1) + np.triu(m, 1).T)


@given(st.integers(3, 8).flatmap(lambda n: st.tuples(matrices(n), st.integers(1, n))))
def test_exactly_k_are_kept_and_none_of_them_scores_higher_than_a_suppressed_one(case):
    distance, k = case
    q = q_scores(distance, k)
    kept = select(q, k)
    assert kept.sum() == k
    assert q[kept].max() <= q[~kept].min(initial=np.inf)


@given(st.integers(3, 8).flatmap(lambda n: st.tuples(matrices(n), st.integers(1, n))))
def test_a_score_is_the_distance_within_which_k_sources_lie(case):
    distance, k = case
    q = q_scores(distance, k)
    assert ((distance <= q[:, None]).sum(1) >= k).all()
    assert ((distance < q[:, None]).sum(1) < k).all()


@given(matrices(6), st.permutations(range(6)))
def test_scores_follow_the_sources_when_they_are_renamed(distance, order):
    order = np.array(order)
    np.testing.assert_array_equal(q_scores(distance[np.ix_(order, order)], 4), q_scores(distance, 4)[order])


@given(st.floats(0, 1), st.integers(5, 9).filter(lambda n: n % 2))
def test_a_majority_of_close_sources_is_never_beaten_by_far_ones(far, n):
    """If K > n/2 sources are within delta of each other, whatever is kept is within 2 delta of one of them."""
    rng, k, delta = np.random.default_rng(int(far * 1e6)), n // 2 + 1, 0.1
    place = np.concatenate([rng.uniform(0, delta, k), delta + far + rng.uniform(0, 3, n - k)])
    distance = np.abs(place[:, None] - place[None])
    kept = select(q_scores(distance, k), k)
    assert distance[kept][:, :k].min(1).max() <= delta


def test_equal_scores_are_kept_in_order_of_appearance():
    assert select(np.array([0.3, 0.3, 0.3, 0.1]), 2).tolist() == [True, False, False, True]


def test_vouched_sources_are_among_the_k_kept():
    assert select(np.array([0.9, 0.1, 0.2, 0.3]), 2, always=[0]).tolist() == [True, True, False, False]


def test_the_published_disbalance_is_the_case_of_two_groups():
    share = np.array([0.2, 0.35, 0.9])
    np.testing.assert_allclose(
        disbalance(np.stack([1 - share, share], axis=1)), np.abs(share[:, None] - share[None]), atol=1e-12
    )


def test_max_aggregation_takes_the_largest_part():
    parts = [np.full((2, 2), v) for v in (0.1, 0.4, 0.2)]
    assert total_distance(*parts, aggregation="max").max() == 0.4


@pytest.mark.parametrize(("given_", "n", "k"), [(None, 51, 26), (None, 4, 3), (0.5, 5, 3), (0.7, 10, 7), (1.0, 3, 3)])
def test_n_clean_counts_or_is_a_fraction_rounded_up(given_, n, k):
    assert clean_count(given_, n) == k


@pytest.mark.parametrize("wrong", [0, 6, -1, 0.0, 1.5, float("nan")])
def test_n_clean_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="n_clean="):
        clean_count(wrong, 5)
    assert clean_count(np.int64(4), 5) == 4


@pytest.mark.parametrize("wrong", [True, False, np.True_, "3", [3]])
def test_n_clean_of_another_type_is_refused(wrong):
    with pytest.raises(TypeError, match="n_clean must be"):
        clean_count(wrong, 5)


def test_the_bound_grows_with_manipulation_and_with_rareness_and_ends_at_one():
    assert unavoidable_unfairness(0.1, 0.5) < unavoidable_unfairness(0.2, 0.5) < unavoidable_unfairness(0.2, 0.3)
    assert unavoidable_unfairness(0.4, 0.1) == 1
    with pytest.raises(ValueError, match="rarest"):
        unavoidable_unfairness(0.4, 0)
