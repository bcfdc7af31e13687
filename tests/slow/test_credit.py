"""Credit on numbers that can be checked by hand, and what holds for any groups."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_fst.errors import TrainingError
from dspy_fst.slow.credit import credit
from dspy_fst.types import Candidate, Group, Rollout, SeedKLRollout
from tests.slow.makers import make_call, make_group, make_rollout


def advantages(batch):
    return [row.advantage for row in batch.rows]


def test_advantage_is_the_reward_about_the_mean_in_units_of_the_population_std():
    batch = credit([make_group(1.0, 0.0, 0.0, 0.0)], epsilon=0.0)
    # mean 1/4, variance (9/16 + 3/16) / 4 = 3/16
    assert advantages(batch) == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])


def test_epsilon_is_added_to_the_std():
    assert advantages(credit([make_group(1.0, 0.0)], epsilon=0.5)) == pytest.approx([0.5, -0.5])


def test_batch_normalisation_divides_all_groups_by_one_std():
    groups = [make_group(1.0, 0.0), make_group(4.0, 0.0, problem=1), make_group(7.0, 7.0, problem=2)]
    # centred: +-0.5, +-2; mean of squares (0.25 + 0.25 + 4 + 4) / 4 = 2.125; the flat group is not in it
    scale = 2.125**0.5
    batch = credit(groups, normalize="batch", epsilon=0.0)
    assert advantages(batch) == pytest.approx([0.5 / scale, -0.5 / scale, 2 / scale, -2 / scale])


def test_tokens_are_averaged_within_a_problem_and_then_over_live_problems():
    long = Group(0, (make_rollout(1.0, make_call([7] * 6)), make_rollout(0.0, make_call([7] * 2))))
    batch = credit([long, make_group(1.0, 0.0, problem=1, tokens=1), make_group(0.0, 0.0, problem=2)])
    assert [row.token_weight for row in batch.rows] == pytest.approx([1 / 16, 1 / 16, 1 / 4, 1 / 4])
    assert batch.counts["tokens"] == 10


def test_a_flat_group_is_dropped_and_counted():
    batch = credit([make_group(0.1, 0.1, 0.1), make_group(1.0, 0.0, problem=1)])
    assert {row.problem for row in batch.rows} == {1}
    assert (batch.counts["groups"], batch.counts["live_groups"], batch.counts["flat_groups"]) == (2, 1, 1)


def test_equal_rewards_are_flat_even_without_an_epsilon():
    assert credit([make_group(0.1, 0.1, 0.1)], epsilon=0.0).rows == ()


def test_a_batch_of_flat_groups_is_empty_and_keeps_its_version():
    batch = credit([make_group(1.0, 1.0), make_group(0.0, 0.0, problem=1)])
    assert (batch.rows, batch.weights, batch.counts["rows"]) == ((), "step-000000", 0)


def test_a_masked_rollout_enters_neither_the_baseline_nor_the_rows():
    batch = credit([make_group(1.0, None, 0.0)], epsilon=0.0)
    assert advantages(batch) == pytest.approx([1.0, -1.0])
    assert batch.counts["masked: timeout"] == 1
    assert batch.counts["rollouts"] == 3


def test_a_group_measured_once_has_no_baseline_and_is_counted():
    batch = credit([make_group(1.0, None), make_group(None, None, problem=1)])
    assert batch.rows == ()
    assert (batch.counts["unmeasured_groups"], batch.counts["flat_groups"]) == (2, 0)


def test_a_failure_is_measured_trained_and_counted():
    rollouts = (make_rollout(1.0, make_call()), make_rollout(0.0, make_call(), failure="parse"))
    batch = credit([Group(0, rollouts)])
    assert len(batch.rows) == 2
    assert batch.counts["failed: parse"] == 1


def test_every_call_of_a_rollout_inherits_its_advantage_however_many_there_are():
    query, answer = make_call([8], predictor="query"), make_call([9, 9], predictor="answer")
    group = Group(0, (make_rollout(1.0, query, query, answer), make_rollout(0.0, answer)))
    batch = credit([group], epsilon=0.0)
    assert [(row.predictor, row.advantage) for row in batch.rows] == [
        ("query", 1.0),
        ("query", 1.0),
        ("answer", 1.0),
        ("answer", -1.0),
    ]
    assert [row.token_weight for row in batch.rows] == pytest.approx([1 / 6] * 4)


def test_calls_of_untrained_predictors_carry_no_row_but_their_rollout_stays_in_the_baseline():
    query, answer = make_call(predictor="query"), make_call(predictor="answer")
    group = Group(0, (make_rollout(1.0, query, answer), make_rollout(0.0, query)))
    batch = credit([group], trained={"answer"}, epsilon=0.0)
    assert [(row.predictor, row.advantage) for row in batch.rows] == [("answer", 1.0)]
    assert batch.counts["no_trained_calls"] == 1


def test_a_problem_without_rows_is_not_in_the_mean_over_problems():
    mute = Group(1, (make_rollout(1.0, problem=1), make_rollout(0.0, make_call([]), problem=1)))
    batch = credit([make_group(1.0, 0.0), mute])
    assert sum(len(row.completion_ids) * row.token_weight for row in batch.rows) == pytest.approx(1)
    assert batch.counts["no_trained_calls"] == 2


def test_rows_carry_the_tokens_as_they_were_sampled():
    call = make_call([5, 6], prompt=[1, 2], logprobs=[-0.25, -0.5])
    row = credit([Group(0, (make_rollout(1.0, call), make_rollout(0.0, call)))]).rows[0]
    assert (row.prompt_ids, row.completion_ids, row.logprobs) == ((1, 2), (5, 6), (-0.25, -0.5))


def test_groups_sampled_by_different_weights_are_refused():
    later = make_call(weights="step-000001")
    other = Group(1, (make_rollout(1.0, later, problem=1), make_rollout(0.0, later, problem=1)))
    with pytest.raises(TrainingError, match=r"step-000000.*step-000001"):
        credit([make_group(1.0, 0.0), other])


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_refused_with_its_problem(reward):
    with pytest.raises(TrainingError, match="problem 3"):
        credit([make_group(1.0, reward, problem=3)])


rewards = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0]), st.floats(-10, 10))
batches = st.lists(st.lists(rewards, min_size=1, max_size=8), min_size=1, max_size=5)


def groups_of(sampled, lengths):
    """Groups whose rollouts have calls of drawn lengths."""
    return [
        Group(
            problem,
            tuple(
                make_rollout(
                    reward,
                    make_call([7] * lengths.randint(1, 5)),
                    problem=problem,
                    mask="timeout" if reward is None else None,
                )
                for reward in group
            ),
        )
        for problem, group in enumerate(sampled)
    ]


@given(batches, st.randoms(use_true_random=False), st.sampled_from(["group", "batch"]))
def test_token_weights_sum_to_one_and_advantages_to_zero_within_each_problem(sampled, lengths, normalize):
    batch = credit(groups_of(sampled, lengths), normalize=normalize)
    problems = {row.problem for row in batch.rows}
    for problem in problems:
        rows = [row for row in batch.rows if row.problem == problem]
        assert sum(row.advantage for row in rows) == pytest.approx(0, abs=1e-6)
        assert sum(row.token_weight * len(row.completion_ids) for row in rows) == pytest.approx(1 / len(problems))
    assert len(problems) == batch.counts["live_groups"]


@given(batches, st.randoms(use_true_random=False), st.integers(0, 99))
def test_the_order_of_groups_and_rollouts_changes_nothing(sampled, lengths, seed):
    groups = groups_of(sampled, lengths)
    shuffle = random.Random(seed)
    shuffled = [Group(g.problem, tuple(shuffle.sample(g.rollouts, len(g.rollouts)))) for g in groups]
    shuffle.shuffle(shuffled)
    one, two = credit(groups), credit(shuffled)
    assert one.counts == two.counts

    def by_value(batch):
        return sorted((r.problem, len(r.completion_ids), r.token_weight, r.advantage) for r in batch.rows)

    for left, right in zip(by_value(one), by_value(two), strict=True):
        assert left == pytest.approx(right)


def test_a_greedy_call_carries_no_row_and_is_counted():
    drawn, greedy = make_call([5, 6]), make_call([7], temperature=0.0)
    group = Group(0, (make_rollout(1.0, drawn, greedy), make_rollout(0.0, drawn, greedy)))
    batch = credit([group])
    assert [row.completion_ids for row in batch.rows] == [(5, 6), (5, 6)]
    assert batch.counts["greedy_calls"] == 2


def test_a_candidate_s_own_baseline_leaves_out_what_the_instruction_brought():
    calls = [make_call([token]) for token in (5, 6, 7, 8)]
    texts = [Candidate({"answer": text}) for text in ("Good.", "Good.", "Bad.", "Bad.")]
    rollouts = tuple(
        Rollout(0, text, (call,), reward) for text, call, reward in zip(texts, calls, (1, 1, 0, 1), strict=True)
    )
    pooled = credit([Group(0, rollouts)], epsilon=0.0)
    assert len(pooled.rows) == 4
    own = credit([Group(0, rollouts)], baseline="candidate", epsilon=0.0)
    assert [(row.completion_ids, row.advantage) for row in own.rows] == [((7,), -1.0), ((8,), 1.0)]
    assert own.counts["flat_groups"] == 1


def test_held_rollouts_give_calls_without_an_advantage_and_must_be_of_the_same_weights():
    group = make_group(1.0, 0.0)
    held = make_rollout(None, make_call([9, 9]), make_call([9], predictor="other"), mask="metric")
    shown = SeedKLRollout(held, ((1, 2), (3,)))
    batch = credit([group], seed_rollouts=[shown], trained={"answer"})
    assert [(one.call.completion_ids, one.start_prompt_ids) for one in batch.seed_kl_calls] == [((9, 9), (1, 2))]
    assert (len(batch.rows), batch.counts["held_rollouts"], batch.counts["rollouts"]) == (2, 1, 2)
    with pytest.raises(TrainingError, match="step-000007"):
        credit([group], seed_rollouts=[SeedKLRollout(make_rollout(1.0, make_call(weights="step-000007")), ((1,),))])


def test_held_calls_wait_for_a_live_group_unless_they_are_all_there_is_to_learn():
    held = SeedKLRollout(make_rollout(1.0, make_call([9, 9]), make_call([8])), ((1, 2), None))
    assert credit([], seed_rollouts=[held]).seed_kl_calls == ()
    alone = credit([], seed_rollouts=[held], seed_kl_alone=True)
    assert len(alone.seed_kl_calls) == 1
    assert (alone.counts["held_calls"], alone.counts["held_calls_unread"]) == (1, 1)
