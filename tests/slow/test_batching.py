"""Micro-batches hold every token once, within their budget."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dspy_fst.slow.batching import Scored, chains, micro_batches

shapes = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=20)


def sequences_of(shapes):
    """``(prompt, its length, completion's length)``; few prompts, so that many are shared."""
    return [
        Scored((*range(100 * p, 100 * p + a), *range(1000 + 10 * i, 1000 + 10 * i + b)), a)
        for i, (p, a, b) in enumerate(shapes)
    ]


def read(micro):
    """Per scored token: what stands at the position that predicts it, and the token."""
    flat = [*micro.prefix_ids.flatten().tolist(), *micro.suffix_ids.flatten().tolist()]
    return [(flat[at], target) for at, target in zip(micro.predict_at.tolist(), micro.targets.tolist(), strict=True)]


def test_padding_is_on_the_right_and_the_last_token_is_left_out():
    (micro,) = micro_batches([Scored((1, 2), 1), Scored((3, 4, 5, 6), 2)], budget=100, share=False)
    assert micro.members == (1, 0)
    assert micro.prefix_ids.tolist() == [[3, 4, 5], [1, 0, 0]]
    assert micro.suffix_ids.shape == (2, 0)
    assert micro.predict_at.tolist() == [1, 2, 3]
    assert micro.targets.tolist() == [5, 6, 2]
    assert micro.tokens == (2, 1)


def test_a_common_prompt_is_held_once():
    sequences = [Scored((1, 2, 3, 7), 3), Scored((4, 5, 8, 9), 2), Scored((1, 2, 3, 5, 6), 3)]
    (micro,) = micro_batches(sequences, budget=100, share=True)
    assert micro.members == (2, 0, 1)
    assert micro.prefix_ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert (micro.prefix_lengths.tolist(), micro.prefix_of.tolist()) == ([3, 2], [0, 0, 1])
    assert micro.suffix_ids.tolist() == [[5], [0], [8]]
    assert read(micro) == [(3, 5), (5, 6), (3, 7), (5, 8), (8, 9)]


def test_prompts_are_not_shared_when_padding_would_cost_more_than_it_saves():
    sequences = [Scored((1, *range(2, 50)), 1), Scored((*range(60, 108), 1), 48)]
    (micro,) = micro_batches(sequences, budget=1000, share=True)
    assert micro.suffix_ids.shape[1] == 0


@given(shapes, st.integers(1, 60), st.booleans())
def test_every_scored_token_appears_once_behind_the_token_before_it(shapes, budget, share):
    sequences = sequences_of(shapes)
    seen = {}
    for micro in micro_batches(sequences, budget, share=share):
        assert micro.tokens == tuple(sequences[i].tokens for i in micro.members)
        pairs = iter(read(micro))
        seen |= {i: [next(pairs) for _ in range(sequences[i].tokens)] for i in micro.members}
    assert sorted(seen) == list(range(len(sequences)))
    for index, sequence in enumerate(sequences):
        whole = list(zip(sequence.ids, sequence.ids[1:], strict=False))
        assert seen[index] == whole[sequence.start - 1 :]


@given(shapes, st.integers(1, 60), st.booleans())
def test_only_a_sequence_longer_than_the_budget_exceeds_it_and_it_comes_alone(shapes, budget, share):
    for micro in micro_batches(sequences_of(shapes), budget, share=share):
        assert micro.tokens_read <= budget or len(micro.suffix_ids) == 1


def test_turns_whose_prompt_begins_with_the_turn_before_are_one_chain():
    first, second, third = Scored((1, 2, 3), 2), Scored((1, 2, 3, 4, 5), 4), Scored((1, 2, 3, 4, 5, 6, 7, 8), 6)
    retold = Scored((1, 2, 3, 4, 9, 6, 7), 6)  # another reply stands where the second turn's was
    assert chains([third, retold, first, second]) == [[2, 3, 0], [1]]


def test_a_turn_that_two_others_continue_is_in_one_chain_only():
    again = Scored((1, 2, 3), 2)
    one, other = Scored((1, 2, 3, 4, 5), 4), Scored((1, 2, 3, 6, 7), 4)
    assert sorted(map(sorted, chains([again, again, one, other]))) == [[0, 3], [1, 2]]
    assert sorted(map(sorted, chains([again, one, other]))) == [[0, 1], [2]]


def test_a_chain_is_read_once_and_its_first_prompt_may_be_shared():
    turns = [Scored((1, 2, 3), 2), Scored((1, 2, 3, 4, 5, 6), 4, temperature=0.5)]
    (micro,) = micro_batches([*turns, Scored((1, 2, 7, 8), 2)], budget=100, share=True)
    assert micro.prefix_ids.tolist() == [[1, 2]]
    assert micro.suffix_ids.tolist() == [[3, 4, 5], [7, 0, 0]]
    assert (micro.members, micro.tokens) == ((0, 1, 2), (1, 2, 2))
    assert read(micro) == [(2, 3), (4, 5), (5, 6), (2, 7), (7, 8)]
    assert micro.temperatures.tolist() == [1.0, 0.5, 0.5, 1.0, 1.0]


loops = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6), min_size=1, max_size=6
)


def turns_of(loop, name):
    """The turns of a loop; each prompt holds all that was before and ``(observation, reply)`` tokens more."""
    token = itertools.count(1000 * name)
    turns, ids = [], (next(token),)
    for observation, reply in loop:
        prompt = (*ids, *itertools.islice(token, observation))
        ids = (*prompt, *itertools.islice(token, reply))
        turns.append(Scored(ids, len(prompt)))
    return turns


@given(loops, st.integers(1, 60), st.booleans(), st.randoms(use_true_random=False))
def test_each_loop_is_one_chain_and_is_read_once_in_whatever_order_it_comes(loops, budget, share, draw):
    turns = [turn for name, loop in enumerate(loops, start=1) for turn in turns_of(loop, name)]
    draw.shuffle(turns)
    assert len(chains(turns)) == len(loops)
    assert sorted(index for chain in chains(turns) for index in chain) == list(range(len(turns)))
    seen = {}
    for micro in micro_batches(turns, budget, share=share):
        pairs = iter(read(micro))
        seen |= {i: [next(pairs) for _ in range(turns[i].tokens)] for i in micro.members}
    for index, turn in enumerate(turns):
        assert seen[index] == list(zip(turn.ids, turn.ids[1:], strict=False))[turn.start - 1 :]
