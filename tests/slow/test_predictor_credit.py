"""Credit by predictor: a score of its own on numbers that can be checked by hand, and what holds for any scores."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_fst.errors import TrainingError
from dspy_fst.slow.credit import credit
from dspy_fst.types import Candidate, Group
from tests.slow.makers import make_call, make_rollout

NAMES = ("query", "answer", "check")


def played(reward, *, problem=0, failure=None, calls=("query", "answer"), said="Answer.", **scores):
    """A rollout of one call of two tokens for each name in ``calls``; ``scores`` are the predictors' own."""
    mask = "timeout" if reward is None else None
    made = make_rollout(
        reward, *(make_call(predictor=name) for name in calls), problem=problem, mask=mask, failure=failure
    )
    return replace(made, predictor_scores=scores, candidate=Candidate({"answer": said}))


def advantages(batch, predictor):
    return [row.advantage for row in batch.rows if row.predictor == predictor]


def test_a_predictor_with_scores_of_its_own_is_held_against_them_and_the_others_against_the_reward():
    group = Group(0, (played(1.0, query=0.5), played(0.0, query=1.0), played(0.0, failure="parse")))
    batch = credit([group], epsilon=0.0)
    # rewards 1, 0, 0: mean 1/3, variance 2/9
    assert advantages(batch, "answer") == pytest.approx([2**0.5, -(2**-0.5), -(2**-0.5)])
    # 0.5, 1, and the failure's 0: mean 1/2, variance (0 + 1/4 + 1/4) / 3 = 1/6
    assert advantages(batch, "query") == pytest.approx([0.0, 1.5**0.5, -(1.5**0.5)])
    assert [row.token_weight for row in batch.rows] == pytest.approx([1 / 12] * 6)
    assert batch.predictors["query"].score == pytest.approx(0.5)
    assert batch.predictors["answer"].score is None


def test_a_predictor_whose_scores_are_flat_gives_no_rows_and_leaves_its_tokens_to_the_others():
    batch = credit([Group(0, (played(1.0, query=0.3), played(0.0, query=0.3)))])
    assert [row.predictor for row in batch.rows] == ["answer", "answer"]
    assert [row.token_weight for row in batch.rows] == pytest.approx([1 / 4, 1 / 4])
    assert (batch.counts["live_groups"], batch.counts["flat_groups"]) == (1, 0)
    assert (batch.predictors["query"].flat_groups, batch.predictors["answer"].flat_groups) == (1, 0)
    assert (batch.predictors["query"].rows, batch.predictors["query"].advantage) == (0, None)


def test_a_group_whose_rewards_are_flat_teaches_the_predictor_that_was_told_apart():
    batch = credit([Group(0, (played(1.0, query=0.0), played(1.0, query=1.0)))], epsilon=0.0)
    assert [(row.predictor, row.advantage) for row in batch.rows] == [("query", -1.0), ("query", 1.0)]
    assert (batch.counts["live_groups"], batch.counts["flat_groups"]) == (1, 0)
    assert batch.predictors["answer"].flat_groups == 1


def test_a_group_whose_every_call_is_held_against_flat_scores_is_flat_though_its_rewards_differ():
    batch = credit([Group(0, (played(1.0, query=1, answer=1), played(0.0, query=1, answer=1)))])
    assert (batch.rows, batch.counts["live_groups"], batch.counts["flat_groups"]) == ((), 0, 1)


def test_a_call_that_was_not_scored_inherits_its_rollout_s_advantage():
    group = Group(0, (played(1.0, query=0.0), played(0.0, query=1.0), played(0.0)))
    batch = credit([group], epsilon=0.0)
    assert advantages(batch, "query") == pytest.approx([-1.0, 1.0, -(2**-0.5)])


def test_scores_of_predictors_that_are_not_trained_or_not_called_change_no_credit():
    group = Group(0, (played(1.0, query=0.0, check=1.0), played(1.0, query=1.0, check=0.0)))
    batch = credit([group], trained={"answer", "check"})
    assert (batch.rows, batch.counts["flat_groups"]) == ((), 1)
    assert batch.predictors["check"].score == 0.5
    assert batch.predictors["query"].score == 0.5


def test_batch_normalisation_keeps_scores_of_another_scale_apart():
    groups = [
        Group(0, (played(1.0, query=0.0), played(0.0, query=100.0))),
        Group(1, (played(4.0, query=0.0, problem=1), played(0.0, query=300.0, problem=1))),
    ]
    batch = credit(groups, normalize="batch", epsilon=0.0)
    # centred rewards +-0.5 and +-2, centred scores -+50 and -+150
    rewards, scores = 2.125**0.5, (50**2 / 2 + 150**2 / 2) ** 0.5
    assert advantages(batch, "answer") == pytest.approx([0.5 / rewards, -0.5 / rewards, 2 / rewards, -2 / rewards])
    assert advantages(batch, "query") == pytest.approx([-50 / scores, 50 / scores, -150 / scores, 150 / scores])


def test_a_candidate_s_own_baseline_holds_for_own_scores_too():
    rollouts = [played(1.0, said=said, query=score) for said, score in (("A", 0.0), ("A", 0.0), ("B", 1.0), ("B", 0.0))]
    batch = credit([Group(0, tuple(rollouts))], baseline="candidate", epsilon=0.0)
    assert advantages(batch, "query") == [1.0, -1.0]
    assert batch.predictors["query"].flat_groups == 1


def test_the_report_of_a_predictor_counts_its_calls_tokens_and_failures():
    cut = replace(make_call([5, 6, 7], predictor="query"), finish_reason="length")
    rollouts = (
        replace(make_rollout(0.0, cut, failure="parse"), failed_in="query"),
        make_rollout(
            1.0, make_call([5], predictor="query"), make_call([8], predictor="answer"), make_call(predictor="")
        ),
        make_rollout(None, make_call([9, 9], predictor="answer"), mask="timeout"),
    )
    reports = credit([Group(0, rollouts)], epsilon=0.0).predictors
    assert reports.keys() == {"answer", "query"}
    query, answer = reports["query"], reports["answer"]
    assert (query.calls, query.tokens, query.truncated, query.unparsed) == (2, 4, 1, 1)
    assert (query.rows, query.positive_rows, query.advantage) == (2, 1, 0.0)
    assert (answer.calls, answer.tokens, answer.truncated, answer.unparsed) == (2, 3, 0, 0)
    assert (answer.rows, answer.positive_rows, answer.advantage) == (1, 1, 1.0)


def test_a_score_that_is_no_number_is_refused_with_its_problem_and_predictor():
    with pytest.raises(TrainingError, match=r"problem 3: scores of 'query'"):
        credit([Group(3, (played(1.0, problem=3, query=float("nan")), played(0.0, problem=3, query=1.0)))])


values = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-10, 10))


@st.composite
def groups(draw, everyone=False):
    """Groups whose rollouts call predictors any number of times; with ``everyone`` each is scored."""

    def rollout(problem):
        reward = draw(st.none() | values)
        calls = draw(st.lists(st.sampled_from(NAMES), max_size=5))
        failure = None if reward is None else draw(st.sampled_from([None, None, "parse"]))
        judged = reward is not None and failure is None
        scored = set(NAMES) if everyone else draw(st.sets(st.sampled_from(NAMES)))
        scores = {name: draw(values) for name in sorted(scored) if judged}
        return played(reward, problem=problem, failure=failure, calls=calls, **scores)

    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    return [Group(i, tuple(rollout(i) for _ in range(size))) for i, size in enumerate(sizes)]


def problems_of(batch):
    return {row.problem for row in batch.rows}


@given(groups(), st.sampled_from(["group", "batch"]), st.none() | st.sets(st.sampled_from(NAMES)))
def test_token_weights_sum_to_one_and_to_equal_shares_of_the_problems(played_groups, normalize, trained):
    batch = credit(played_groups, normalize=normalize, trained=trained)
    for problem in problems_of(batch):
        rows = [row for row in batch.rows if row.problem == problem]
        share = sum(row.token_weight * len(row.completion_ids) for row in rows)
        assert share == pytest.approx(1 / len(problems_of(batch)))
    assert trained is None or {row.predictor for row in batch.rows} <= trained


@given(groups(), st.none() | st.sets(st.sampled_from(NAMES)))
def test_every_trained_call_is_a_row_or_counted_as_flat(played_groups, trained):
    batch = credit(played_groups, trained=trained)
    for name, report in batch.predictors.items():
        called = {
            group.problem
            for group in played_groups
            if sum(r.reward is not None for r in group.rollouts) > 1
            and any(r.reward is not None and any(c.predictor == name for c in r.calls) for r in group.rollouts)
        }
        taught = {row.problem for row in batch.rows if row.predictor == name}
        assert report.flat_groups == (len(called - taught) if trained is None or name in trained else 0)
    counts = batch.counts
    assert counts["live_groups"] + counts["flat_groups"] + counts["unmeasured_groups"] == counts["groups"]


@given(groups(everyone=True), st.sampled_from(NAMES), st.sampled_from(["group", "batch"]))
def test_a_predictor_that_is_always_scored_learns_as_in_a_program_of_its_own(played_groups, name, normalize):
    def alone(rollout):
        calls = tuple(call for call in rollout.calls if call.predictor == name)
        return replace(
            rollout, calls=calls, reward=rollout.predictor_scores.get(name, rollout.reward), predictor_scores={}
        )

    whole = [group for group in played_groups if any(r.predictor_scores for r in group.rollouts)]
    lone = [Group(group.problem, tuple(map(alone, group.rollouts))) for group in whole]
    lone = [group for group in lone if any(r.calls and r.reward is not None for r in group.rollouts)]
    expected = [row.advantage for row in credit(lone, normalize=normalize).rows]
    assert advantages(credit(whole, normalize=normalize), name) == pytest.approx(expected)


@given(groups())
def test_own_scores_that_equal_the_reward_change_nothing(played_groups):
    def scored(rollout, names):
        judged = rollout.reward is not None and rollout.failure is None
        return replace(rollout, predictor_scores=dict.fromkeys(names, rollout.reward) if judged else {})

    plain, own = (
        credit([Group(g.problem, tuple(scored(r, names) for r in g.rollouts)) for g in played_groups])
        for names in ((), NAMES)
    )
    assert own.rows == plain.rows
    assert own.counts == plain.counts
