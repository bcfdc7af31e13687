"""Several optimizer steps for one batch: who learns from what, and what is reported of it."""

import random
from collections import Counter
from dataclasses import asdict, replace

import pytest

from dspy_fst.config import FSTConfig
from dspy_fst.errors import ConfigurationError, MismatchError
from dspy_fst.report.step_options import step_words
from dspy_fst.slow.credit import credit, mini_batches
from dspy_fst.slow.update_metrics import NO_UPDATE, in_one_report
from dspy_fst.types import AdapterReport, Group, SeedKLCall
from tests.slow.makers import VOCABULARY, make_call, make_group, make_rollout
from tests.slow.test_trainer import as_sampled_by, assert_close, hand_gradient, make_trainer, recorded_gradients

GROUPS = [make_group(0.0, 1.0, problem=problem, tokens=2 + problem) for problem in range(5)]


def weight_of(batch):
    return sum(row.token_weight * len(row.completion_ids) for row in batch.rows)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_problems_are_shared_out_whole_and_each_part_is_what_credit_makes_of_them_alone(count):
    parts = mini_batches(credit(GROUPS), count, random.Random(1))
    assert len(parts) == count
    assert Counter(row.problem for part in parts for row in part.rows) == dict.fromkeys(range(5), 2)
    assert {len({row.problem for row in part.rows}) for part in parts} <= {5 // count, -(-5 // count)}
    for part in parts:
        alone = credit([GROUPS[problem] for problem in sorted({row.problem for row in part.rows})]).rows
        assert [replace(row, token_weight=0.0) for row in part.rows] == [replace(r, token_weight=0.0) for r in alone]
        assert [row.token_weight for row in part.rows] == pytest.approx([row.token_weight for row in alone])
        assert weight_of(part) == pytest.approx(1.0)


def test_each_problem_weighs_the_same_where_candidates_are_compared_apart():
    first = [make_rollout(reward, make_call([7, 7]), problem=0) for reward in (0.0, 1.0)]
    parts = mini_batches(credit([Group(0, tuple(first)), *GROUPS[1:3]], baseline="candidate"), 3, random.Random(0))
    assert [weight_of(part) for part in parts] == pytest.approx([1.0] * 3)


def test_one_optimizer_step_and_a_batch_of_one_problem_are_the_batch_itself():
    batch, single, empty = credit(GROUPS), credit(GROUPS[:1]), credit([make_group(1.0, 1.0)])
    assert mini_batches(batch, 1, random.Random(0)) == [batch]
    assert mini_batches(single, 4, random.Random(0)) == [single]
    assert mini_batches(empty, 4, random.Random(0)) == [empty]


def test_calls_that_hold_the_policy_at_its_start_are_shared_out_too():
    held = tuple(SeedKLCall(make_call([token]), (1,)) for token in range(5))
    parts = mini_batches(replace(credit(GROUPS), seed_kl_calls=held), 2, random.Random(0))
    assert [len(part.seed_kl_calls) for part in parts] == [3, 2]
    assert {call for part in parts for call in part.seed_kl_calls} == set(held)


def drawn_groups():
    """Four problems with two rollouts of three random tokens each."""
    draw = random.Random(5)

    def group(problem):
        calls = [make_call([draw.randrange(VOCABULARY) for _ in range(3)], [problem, 2, 3]) for _ in range(2)]
        return Group(problem, tuple(make_rollout(r, call, problem=problem) for r, call in enumerate(calls)))

    return [group(problem) for problem in range(4)]


def test_the_second_step_weighs_tokens_by_how_far_the_first_moved_the_policy(start, tmp_path):
    """Against a gradient that is written out in float64 from the definition, on the weights that the first one left."""
    trainer = make_trainer(start, learning_rate=0.02, warmup_steps=0)
    groups = as_sampled_by(trainer, drawn_groups())
    first, second = mini_batches(credit(groups), 2, random.Random(0))
    assert trainer.step(first).max_log_ratio < 1e-5  # sampled by these very weights
    left = trainer.publish(tmp_path / "step-000001", "step-000001").path
    with recorded_gradients(trainer) as gradients:
        report = trainer.step(second)
    assert report.max_log_ratio > 0.01
    own = [groups[problem] for problem in dict.fromkeys(row.problem for row in second.rows)]
    wanted, loss = hand_gradient(left, start, own, trainer.settings)
    assert_close(gradients, wanted)
    assert report.loss == pytest.approx(loss, rel=1e-4)


def test_weights_that_a_batch_s_own_steps_moved_are_no_mismatch_with_its_sampler(start):
    """A first step moves the policy far. Its rollouts are then off-policy by right, in the same batch alone."""
    trainer = make_trainer(start, learning_rate=0.5, warmup_steps=0, min_effective_share=0.9)
    groups = as_sampled_by(trainer, drawn_groups())
    first, second = mini_batches(credit(groups), 2, random.Random(0))
    assert trainer.step(first).effective_sample_share == pytest.approx(1.0)
    with pytest.raises(MismatchError, match="effective sample share"):
        trainer.step(second)
    assert trainer.updates == 1
    assert trainer.step(second, moved=True).effective_sample_share < 0.9


MEASURED = replace(
    NO_UPDATE,
    **{"loss": 1.0, "grad_norm": 2.0, "kl_to_start": 0.5, "entropy": 1.0, "capped_share": 0.0, "mean_log_ratio": 1e-6},
    **{"max_log_ratio": 1e-5, "effective_sample_share": 1.0, "learning_rate": 0.1, "tokens": 30, "rows": 3},
    **{"sequences": 2, "optimizer_steps": 1, "row_tokens": 90, "tokens_read": 50},
    adapters={"ask": AdapterReport(2, 20, 1.0, 0.25, 0.5), "say": AdapterReport(1, 10, 2.0, None, 0.5)},
)
LATER = replace(
    MEASURED,
    **{"loss": 2.0, "grad_norm": 4.0, "kl_to_start": 1.5, "entropy": 3.0, "capped_share": 0.5, "mean_log_ratio": 0.2},
    **{"max_log_ratio": 0.9, "effective_sample_share": 0.8, "learning_rate": 0.2, "tokens": 10, "halved_to": 64},
    adapters={"ask": AdapterReport(2, 20, 3.0, 0.75, 1.5)},
)


def test_one_report_of_all_steps():
    """Means by tokens; the sampler is measured by the first step alone, whose weights sampled the batch."""
    assert in_one_report([MEASURED]) is MEASURED
    assert in_one_report([MEASURED, LATER]) == replace(
        MEASURED,
        **{"loss": 1.25, "grad_norm": 2.5, "kl_to_start": 0.75, "entropy": 1.5, "capped_share": 0.125},
        **{"learning_rate": 0.2, "tokens": 40, "rows": 6, "sequences": 4, "halved_to": 64, "optimizer_steps": 2},
        **{"row_tokens": 180, "tokens_read": 100, "later_log_ratio": 0.9},
        adapters={"ask": AdapterReport(4, 40, 2.0, 0.5, 1.0), "say": AdapterReport(1, 10, 2.0, None, 0.5)},
    )
    unmeasured = replace(MEASURED, kl_to_start=None)
    assert in_one_report([unmeasured, unmeasured]).kl_to_start is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ", 2 optimizer steps (12.5% of tokens capped, log-ratio up to 0.9)"),
        ({"capped_share": None}, ", 2 optimizer steps (log-ratio up to 0.9)"),
        ({"capped_share": None, "later_log_ratio": None}, ", 2 optimizer steps"),
        ({"optimizer_steps": 1}, ""),
        ({"optimizer_steps": 0}, ""),
    ],
    ids=["all", "no-weights", "older", "one", "none"],
)
def test_a_step_s_line_tells_of_several_steps_alone(changes, words):
    update = asdict(replace(in_one_report([MEASURED, LATER]), **changes))
    assert step_words({"counts": {}, "update": update}) == words


def test_one_report_of_steps_of_which_one_read_an_adapter_with_seed_kl_calls_alone():
    """A step of 100 learnt and 10 seed-KL tokens, then one of 50 seed-KL tokens alone (with another's learnt ones)."""
    learnt = AdapterReport(4, 100, 1.0, 0.1, 0.5, kl_under_seed=0.6, seed_tokens=10)
    seed_only = AdapterReport(0, 0, 4.0, None, 2.0, kl_under_seed=0.3, seed_tokens=50)
    other = AdapterReport(2, 30, 1.0, 0.2, 0.5)
    first = replace(MEASURED, tokens=100, kl_under_seed=0.6, seed_tokens=10, adapters={"ask": learnt})
    second = replace(MEASURED, tokens=30, kl_under_seed=0.3, seed_tokens=50, adapters={"ask": seed_only, "say": other})
    update = in_one_report([first, second])
    ask = update.adapters["ask"]
    assert (ask.rows, ask.tokens, ask.seed_tokens) == (4, 100, 60)
    assert ask.distance == ask.kl_to_start == pytest.approx(0.1)
    assert ask.kl_under_seed == update.kl_under_seed == pytest.approx((0.6 * 10 + 0.3 * 50) / 60)
    assert ask.entropy == 0.5, "of learnt tokens, where there are some"
    assert ask.grad_norm == pytest.approx((1.0 * 100 + 4.0 * 50) / 150)
    assert sum(each.tokens for each in update.adapters.values()) == update.tokens == 130
    assert update.seed_tokens == 60


DISTILL = {"method": "distill", "seed_kl_coefficient": 1.0, "seed_kl_teacher": "population"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"updates_per_batch": 9, "problems_per_step": 8}, "updates_per_batch=9 .* use updates_per_batch=8 or fewer"),
        (
            {"updates_per_batch": 2, **DISTILL},
            "updates_per_batch=2 .* method='distill' learns from no problem's reward",
        ),
        ({"updates_per_batch": 0}, "updates_per_batch=0"),
    ],
    ids=["problems", "distill", "none"],
)
def test_what_gives_no_optimizer_step_something_to_learn_from_is_refused(settings, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        FSTConfig.checked(settings)
