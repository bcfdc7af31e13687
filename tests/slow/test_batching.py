"""Micro-batches hold every beginning once, within their budget."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dspy_fst.engine.tree import BLOCK_KEYS, KEYS_PER_TOKEN
from dspy_fst.slow.batching import Scored, chains, micro_batches

shapes = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(0, 3), st.integers(1, 30), st.integers(1, 5)),
    min_size=1,
    max_size=20,
)


def sequences_of(shapes):
    """``(candidate, length of its text, problem, tokens of the problem, of the reply)``; few of each, so many share."""
    return [
        Scored(
            (
                *range(100 * candidate, 100 * candidate + text),
                *range(1000 * (problem + 1), 1000 * (problem + 1) + asked),
                *range(9000 + 10 * (i % 15), 9000 + 10 * (i % 15) + reply),
            ),
            text + asked,
        )
        for i, (candidate, text, problem, asked, reply) in enumerate(shapes)
    ]


def texts_before(micro):
    """For every scored token, what the model attends to when it predicts it: the tokens up to there, in order."""
    flat = micro.ids.flatten().tolist()
    if micro.tree is None:
        width = micro.ids.shape[1]
        return [tuple(flat[at - at % width : at + 1]) for at in micro.predict_at.tolist()]
    seen = []
    for block in micro.tree.blocks:
        assert block.keys.numel() <= BLOCK_KEYS or len(block.keys) == 1
        for row, keys in enumerate(block.keys.tolist()):
            for query in range(block.queries.shape[1]):
                mask = [k <= query for k in range(len(keys))] if block.mask is None else block.mask[row, 0, query]
                seen.append([key for key, allowed in zip(keys, mask, strict=True) if allowed])
    order = micro.tree.order.tolist()
    for at, place in enumerate(order):
        assert seen[place][-1] == at  # a token attends to itself, and is the last that it attends to
        assert len(seen[place]) == micro.tree.positions[0, at] + 1
    return [tuple(flat[key] for key in seen[order[at]]) for at in micro.predict_at.tolist()]


def assert_all_are_read(sequences, budget, share):
    seen = {}
    for micro in micro_batches(sequences, budget, share=share):
        assert micro.tokens == tuple(sequences[i].tokens for i in micro.members)
        pairs = iter(zip(texts_before(micro), micro.targets.tolist(), micro.temperatures.tolist(), strict=True))
        for index in micro.members:
            assert index not in seen
            seen[index] = [next(pairs) for _ in range(sequences[index].tokens)]
        assert micro.tokens_read <= budget or micro.chains == 1
    assert sorted(seen) == list(range(len(sequences)))
    for index, one in enumerate(sequences):
        assert seen[index] == [(one.ids[:at], one.ids[at], one.temperature) for at in range(one.start, len(one.ids))]


def tokens_read(sequences, budget=10_000, share=True):
    return sum(micro.tokens_read for micro in micro_batches(sequences, budget, share=share))


def test_padding_is_on_the_right_and_the_last_token_is_left_out():
    (micro,) = micro_batches([Scored((1, 2), 1), Scored((3, 4, 5, 6), 2)], budget=100, share=False)
    assert micro.members == (1, 0)
    assert micro.ids.tolist() == [[3, 4, 5], [1, 0, 0]]
    assert micro.tree is None
    assert micro.predict_at.tolist() == [1, 2, 3]
    assert micro.targets.tolist() == [5, 6, 2]
    assert micro.tokens == (2, 1)


def test_each_beginning_is_held_once_at_any_depth():
    system, first, other = tuple(range(20)), tuple(range(30, 50)), tuple(range(60, 90))
    replies = [(1, 2, 3), (4, 5), (7, 8, 9, 4)]
    sequences = [Scored((*system, *asked, *reply), 20 + len(asked)) for asked in (first, other) for reply in replies]
    (micro,) = micro_batches(sequences, budget=1000, share=True)
    read = [*system, *first, 1, 2, 4, 7, 8, 9, *other, 1, 2, 4, 7, 8, 9]
    assert micro.ids.tolist() == [read]
    assert micro.tree.positions[0, :46].tolist() == [*range(40), 40, 41, 40, 40, 41, 42]
    assert (micro.members, micro.chains) == ((0, 1, 2, 3, 4, 5), 6)
    assert_all_are_read(sequences, 1000, True)


def test_replies_that_begin_alike_by_chance_are_no_branch_of_their_own():
    prompt, opening, other = tuple(range(250)), (900, 901, 902), Scored((*range(250), 960, 961), 250)
    replies = [Scored((*prompt, *opening, *range(1000 * i, 1000 * i + 9)), 250) for i in range(1, 9)]
    assert len(opening) * 4 * KEYS_PER_TOKEN < 253 < len(opening) * 7 * KEYS_PER_TOKEN
    assert tokens_read([other, *replies[:5]]) == 250 + 1 + 5 * (3 + 8)
    assert tokens_read([other, *replies]) == 250 + 1 + 3 + 8 * 8
    assert tokens_read(replies[:5]) == 250 + 3 + 5 * 8  # no branch more: all of them share it


def test_a_dspy_batch_reads_a_third_of_the_tokens_in_its_rows():
    """8 problems, 4 candidates with 2 replies each: 170 tokens of a system message, 80 of a problem, 48 of a reply."""
    fresh = itertools.count()

    def ids(count):
        return tuple(itertools.islice(fresh, count))

    systems, problems = [ids(170) for _ in range(4)], [ids(80) for _ in range(8)]
    rows = [(*system, *problem, *ids(48)) for problem in problems for system in systems for _ in range(2)]
    sequences = [Scored(row, 250) for row in rows]
    in_rows = sum(map(len, rows))
    assert tokens_read(sequences, 16384) == 4 * 170 + 32 * 80 + 64 * 47
    assert tokens_read(sequences, 4096) == tokens_read(sequences, 16384)  # no candidate's tree is cut
    assert tokens_read(sequences, 4096) <= 0.35 * in_rows
    assert tokens_read(sequences, 1024) <= 0.40 * in_rows
    assert tokens_read(sequences, 4096, share=False) == 64 * 297


@given(shapes, st.integers(1, 200), st.booleans())
def test_every_scored_token_is_predicted_once_from_all_that_stands_before_it(shapes, budget, share):
    assert_all_are_read(sequences_of(shapes), budget, share)


@given(shapes, st.integers(1, 400))
def test_sharing_never_reads_more(shapes, budget):
    sequences = sequences_of(shapes)
    assert tokens_read(sequences, budget) <= tokens_read(sequences, budget, share=False)


@given(shapes, st.integers(1, 200), st.booleans())
def test_the_largest_micro_batch_comes_first(shapes, budget, share):
    sizes = [micro.ids.shape[1] for micro in micro_batches(sequences_of(shapes), budget, share=share)]
    assert sizes == sorted(sizes, reverse=True)


def test_sequences_of_different_adapters_are_never_read_together():
    prompt = tuple(range(40))
    sequences = [Scored((*prompt, i), 40, adapter=("one", "two")[i % 2]) for i in range(6)]
    found = {micro.adapter: micro.members for micro in micro_batches(sequences, 1000, share=True)}
    assert found == {"one": (0, 2, 4), "two": (1, 3, 5)}


def test_turns_whose_prompt_begins_with_the_turn_before_are_one_chain():
    first, second, third = Scored((1, 2, 3), 2), Scored((1, 2, 3, 4, 5), 4), Scored((1, 2, 3, 4, 5, 6, 7, 8), 6)
    retold = Scored((1, 2, 3, 4, 9, 6, 7), 6)  # another reply stands where the second turn's was
    assert chains([third, retold, first, second]) == [[2, 3, 0], [1]]


def test_a_turn_that_two_others_continue_is_in_one_chain_only():
    again = Scored((1, 2, 3), 2)
    one, other = Scored((1, 2, 3, 4, 5), 4), Scored((1, 2, 3, 6, 7), 4)
    assert sorted(map(sorted, chains([again, one, other]))) == [[0, 1], [2]]
    assert_all_are_read([again, again, one, other], 100, False)


def test_replies_that_are_the_same_are_read_once_and_each_keeps_its_temperature():
    twice = [Scored((1, 2, 3, 4), 2), Scored((1, 2, 3, 4), 2, temperature=0.5), Scored((1, 2, 3, 9), 2)]
    assert chains(twice) == [[0, 1, 2]]  # the last token is not read
    assert tokens_read(twice) == 3
    for share in (True, False):
        assert_all_are_read(twice, 100, share)


def test_a_chain_is_read_once_and_its_first_prompt_may_be_shared():
    prompt = tuple(range(20, 50))
    turns = [Scored((*prompt, 1, 2, 3), 32), Scored((*prompt, 1, 2, 3, 4, 5, 6), 34, temperature=0.5)]
    (micro,) = micro_batches([*turns, Scored((*prompt, 1, 7, 8), 31)], budget=100, share=True)
    assert micro.ids.tolist() == [[*prompt, 1, 2, 3, 4, 5, 7]]
    assert (micro.members, micro.tokens) == ((0, 1, 2), (1, 2, 2))
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
    assert_all_are_read(turns, budget, share)
