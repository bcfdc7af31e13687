"""The penalty for replies near ``max_tokens`` (`overlong_penalty`), on numbers that one can check by hand."""

from dataclasses import replace
from functools import partial

import pytest

from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError
from dspy_fst.preflight.reply_limits import limit_faults
from dspy_fst.report.from_events import record_of
from dspy_fst.report.step_options import option_charts, option_lines, step_words
from dspy_fst.run.directory import read_events
from dspy_fst.slow.credit import credit
from dspy_fst.slow.length_penalty import overlong, penalty_of
from dspy_fst.slow.losses.cispo import CISPO
from dspy_fst.slow.losses.rft import RFT
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.training.resampling import is_flat
from dspy_fst.types import Group
from tests.relay import relay
from tests.slow.makers import make_call, make_group, make_rollout
from tests.test_compile import compile_relay, same_weights

PENALTY = penalty_of(TrainingSettings(overlong_penalty=1.0, overlong_share=0.2))


def reply(tokens, limit=100, predictor="answer"):
    return replace(make_call([7] * tokens, predictor=predictor), max_tokens=limit)


@pytest.mark.parametrize(
    ("tokens", "taken"),
    [(16_384, 0.0), (16_385, 1 / 4096), (18_432, 0.5), (20_480, 1.0), (1, 0.0)],
    ids=["expected", "one-more", "half", "longest", "short"],
)
def test_dapo_s_own_numbers(tokens, taken):
    """Section 4.1: 16,384 tokens are expected, 4096 more are the soft part, 20,480 the longest."""
    assert overlong(reply(tokens, 20_480), 1.0, 0.2) == pytest.approx(taken)
    assert overlong(reply(tokens, 20_480), 0.5, 0.2) == pytest.approx(taken / 2)


def test_a_call_without_a_limit_costs_nothing_and_a_share_of_1_counts_every_token():
    assert overlong(reply(500, None), 1.0, 0.2) == 0.0
    assert overlong(reply(30), 1.0, 1.0) == pytest.approx(0.3)


def test_it_is_taken_off_before_the_advantages_and_told_apart():
    """Rewards 1, 1, 0 less 0.25, 1, 0 are 0.75, 0, 0: mean 0.25, standard deviation the root of 1/8."""
    rollouts = [make_rollout(1.0, reply(85)), make_rollout(1.0, reply(100)), make_rollout(0.0, reply(50))]
    batch = credit([Group(0, tuple(rollouts))], penalty=PENALTY)
    assert [row.advantage for row in batch.rows] == pytest.approx([2**0.5, -(0.5**0.5), -(0.5**0.5)], abs=1e-4)
    assert batch.length_penalty == pytest.approx(1.25 / 3)
    assert batch.counts["overlong_rollouts"] == 2
    plain = credit([Group(0, tuple(rollouts))])
    assert [row.advantage for row in plain.rows] == pytest.approx([0.5**0.5, 0.5**0.5, -(2**0.5)], abs=1e-4)
    assert plain.length_penalty is None
    assert "overlong_rollouts" not in plain.counts


@pytest.mark.parametrize("reward", [0.0, 1.0], ids=["all-wrong", "all-right"])
@pytest.mark.parametrize("loss", [CISPO, RFT], ids=["cispo", "rft"])
def test_rollouts_that_scored_alike_are_flat_whatever_their_length(reward, loss):
    """Else any penalty, however small, divided by its own deviation, pushes as hard as a wrong answer; the shortest of
    wrong answers would be the best; and a stuck step would pass for a lively one."""
    group = Group(0, (make_rollout(reward, reply(90)), make_rollout(reward, reply(60))))
    batch = credit([group], penalty=PENALTY, loss=loss)
    assert batch.rows == ()
    assert batch.counts["flat_groups"] == 1
    assert batch.length_penalty == pytest.approx(0.25)
    assert is_flat(group, partial(credit, penalty=PENALTY))


def test_a_rollout_of_several_calls_pays_for_the_longest_by_its_own_limit():
    several = make_rollout(1.0, reply(90), reply(10, 10), *[reply(80)] * 9)
    batch = credit([Group(0, (several, make_rollout(1.0, reply(80))))], penalty=PENALTY)
    assert batch.length_penalty == pytest.approx(0.5)  # 1 for the call of 10 tokens of 10, and 0


def test_calls_that_are_not_trained_and_masked_rollouts_pay_nothing():
    frozen = make_rollout(1.0, reply(100, predictor="frozen"), reply(10))
    group = Group(0, (frozen, make_rollout(0.0, reply(10)), make_rollout(None, reply(100), mask="timeout")))
    assert credit([group], penalty=PENALTY, trained={"answer"}).length_penalty == 0.0
    assert credit([group], penalty=PENALTY).length_penalty == 0.5


def test_a_predictor_s_own_score_pays_for_its_own_calls_alone():
    """Own scores 1 and 0.8 less 0.5 and 0; the rewards 1 and 0 credit the other predictor, whose replies are short."""

    def rollout(reward, own, tokens):
        calls = (reply(tokens, predictor="query"), reply(10))
        return replace(make_rollout(reward, *calls), predictor_scores={"query": own})

    batch = credit([Group(0, (rollout(1.0, 1.0, 90), rollout(0.0, 0.8, 60)))], penalty=PENALTY)
    advantages = {(row.predictor, len(row.completion_ids)): row.advantage for row in batch.rows}
    assert advantages["query", 90] == pytest.approx(-1.0, abs=1e-4)
    assert advantages["query", 60] == pytest.approx(1.0, abs=1e-4)
    assert sorted(row.advantage for row in batch.rows if row.predictor == "answer") == pytest.approx([-1, 1], abs=1e-4)
    assert next(row.advantage for row in batch.rows if row.predictor == "answer") > 0  # the reward paid nothing
    assert batch.predictors["query"].score == pytest.approx(0.9)  # as the metric gave it


def test_without_a_penalty_nothing_is_computed():
    assert penalty_of(TrainingSettings()) is None
    assert credit([make_group(0.0, 1.0)]).length_penalty is None


def test_replies_without_a_limit_and_a_method_without_rewards_are_refused():
    config = FSTConfig(overlong_penalty=0.5)
    program = relay()
    assert limit_faults(program, config) == []
    program.first.lm = program.first.lm.copy(max_tokens=None)
    (fault,) = limit_faults(program, config)
    assert "overlong_penalty=0.5: replies are measured against max_tokens, and those of first have none" in fault
    assert (
        limit_faults(program, FSTConfig())
        == limit_faults(program, FSTConfig(overlong_penalty=1, trained=("last",)))
        == []
    )
    distill = {"method": "distill", "seed_kl_coefficient": 1.0, "seed_kl_teacher": "population"}
    with pytest.raises(ConfigurationError, match=r"resample_flat=1 and overlong_penalty=0.5 would do nothing"):
        FSTConfig.checked({**distill, "overlong_penalty": 0.5, "resample_flat": 1})


@pytest.mark.parametrize(
    ("share", "trained", "refused"),
    [
        (0.02, None, "first (max_tokens=49), last (max_tokens=12); use 0.0834 or more"),
        (0.05, None, "of last (max_tokens=12); use 0.0834 or more"),
        (0.02, ("first",), "of first (max_tokens=49); use 0.0205 or more"),
        (1 / 49, ("first",), None),  # one token but for rounding: 1 / 49 * 49 is less than 1
        (0.05, ("first",), None),
        (0.0834, None, None),
    ],
    ids=["both", "one", "trained", "one-token", "untrained", "enough"],
)
def test_a_penalty_that_grows_over_less_than_a_token_is_refused(share, trained, refused):
    """Silent, it would meet replies of max_tokens alone, and say that it grows."""
    program = relay()
    program.first.lm = program.first.lm.copy(max_tokens=49)
    faults = limit_faults(program, FSTConfig(overlong_penalty=0.5, overlong_share=share, trained=trained))
    assert len(faults) == bool(refused)
    assert (refused or "") in "".join(faults)
    assert limit_faults(program, FSTConfig(overlong_share=share, trained=trained)) == []


@pytest.mark.slow
def test_a_run_learns_from_it_and_neither_search_nor_validation_nor_reward_sees_it(tmp_path):
    small = {"cycles": 1, "steps_per_cycle": 1, "problems_per_step": 4}
    plain = compile_relay(tmp_path / "plain", **small)
    penalized = compile_relay(tmp_path / "run", overlong_penalty=0.5, overlong_share=1.0, **small)
    before, events = (read_events(tmp_path / name) for name in ("plain", "run"))

    def of(kind, where):
        return [{**event["report"], "seconds": None} for event in where if event["event"] == kind]

    assert of("cycle", before) == of("cycle", events)
    (old,), (new,) = of("step", before), of("step", events)
    assert (old["reward"], old["length_penalty"]) == (new["reward"], None)
    assert 0 < new["length_penalty"] <= 0.5
    assert 0 < new["counts"]["overlong_rollouts"] <= 16
    starts = [next(event["scores"] for event in where if event["event"] == "validation") for where in (before, events)]
    assert starts[0] == starts[1]
    assert not same_weights(plain, penalized)
    record = record_of(events)
    assert step_words(new) == f", length penalty {new['length_penalty']:.3f}"
    assert "overlong_penalty: " in option_lines(record.steps)[0]
    assert [chart.name for chart in option_charts([record])] == ["length-penalty"]
