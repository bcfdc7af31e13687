"""Frontier and top-K on numbers one can check by hand."""

from hypothesis import given
from hypothesis import strategies as st

from dspy_fst.fast.pareto import frontier, top_k


def test_a_candidate_that_is_best_nowhere_is_not_on_the_frontier():
    assert frontier([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 0.4]]) == [0, 1]


def test_of_two_that_cover_the_same_anchors_the_better_one_stays():
    # 1 is best on anchor 0 as 0 is, and on anchor 1 too: 0 is covered by it.
    assert frontier([[1, 0], [1, 1]]) == [1]


def test_the_population_is_complementary_not_the_k_best_means():
    scores = [[1, 1, 1, 0, 0], [1, 1, 0.9, 0, 0.2], [0, 0, 0, 1, 0]]
    # Means .60, .62, .20. Candidate 2 alone solves anchor 3; of the others 1 adds anchor 4's 0.2 first.
    assert top_k(scores, 2) == [1, 2]


def test_a_short_frontier_is_filled_with_copies_of_its_best():
    assert top_k([[0, 0], [1, 1], [0.5, 0]], 4) == [1, 1, 1, 1]


def test_equal_candidates_yield_the_oldest():
    assert top_k([[1, 0], [1, 0]], 1) == [0]
    assert top_k([[1, 0], [1, 0]], 2) == [0, 0]


tables = st.integers(1, 5).flatmap(
    lambda anchors: st.lists(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=anchors, max_size=anchors), min_size=1, max_size=7
    )
)


@given(tables, st.integers(1, 5))
def test_top_k_is_k_long_from_the_frontier_and_best_first(scores, k):
    chosen = top_k(scores, k)
    means = [sum(scores[c]) / len(scores[c]) for c in chosen]
    assert len(chosen) == k
    assert set(chosen) <= set(frontier(scores))
    assert means[0] == max(means)


@given(tables)
def test_the_frontier_attains_the_best_score_of_every_anchor(scores):
    kept = frontier(scores)
    for anchor in range(len(scores[0])):
        assert max(scores[c][anchor] for c in kept) == max(row[anchor] for row in scores)
