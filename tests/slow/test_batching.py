"""Micro-batches hold every token once, within their budget."""

from hypothesis import given
from hypothesis import strategies as st

from dspy_fst.slow.batching import Scored, micro_batches

shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=20)


def sequences_of(shapes):
    return [Scored(tuple(range(10 * i, 10 * i + a + b)), a) for i, (a, b) in enumerate(shapes)]


def test_padding_is_on_the_right_and_the_last_token_is_left_out():
    (micro,) = micro_batches([Scored((1, 2), 1), Scored((3, 4, 5, 6), 2)], budget=100)
    assert micro.members == (1, 0)
    assert micro.input_ids.tolist() == [[3, 4, 5], [1, 0, 0]]
    assert micro.predict_at.tolist() == [1, 2, 3]
    assert micro.targets.tolist() == [5, 6, 2]
    assert micro.tokens == (2, 1)


@given(shapes, st.integers(1, 60))
def test_every_scored_token_appears_once_behind_its_own_prefix(shapes, budget):
    sequences = sequences_of(shapes)
    seen = []
    for micro in micro_batches(sequences, budget):
        seen += micro.members
        flat = micro.input_ids.flatten()
        # Ids are consecutive within a sequence, so the input at a predicting position is the target less one.
        assert (flat[micro.predict_at] + 1).tolist() == micro.targets.tolist()
        assert micro.tokens == tuple(sequences[i].tokens for i in micro.members)
    assert sorted(seen) == list(range(len(sequences)))


@given(shapes, st.integers(1, 60))
def test_only_a_sequence_longer_than_the_budget_exceeds_it_and_it_comes_alone(shapes, budget):
    for micro in micro_batches(sequences_of(shapes), budget):
        assert micro.input_ids.numel() <= budget or len(micro.members) == 1
