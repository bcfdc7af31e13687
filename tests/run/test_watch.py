"""Histories of steps -> warnings. A healthy run hears nothing; each trouble is told once an episode."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_fst.monitoring.observer import CALM, Watch
from dspy_fst.run.phase_reports import StepReport
from dspy_fst.types import PredictorReport, UpdateReport

HEALTHY_COUNTS = {"groups": 10, "flat_groups": 2, "rollouts": 80, "calls": 80, "no_trained_calls": 0, "greedy_calls": 0}
HEALTHY_UPDATE = {
    "loss": 0.0,
    "grad_norm": 0.5,
    "kl_to_start": 0.1,
    "entropy": 0.3,
    "capped_share": 0.0,
    "mean_log_ratio": 0.0,
    "max_log_ratio": 0.0,
    "effective_sample_share": 1.0,
    "learning_rate": 1e-6,
    "tokens": 1000,
    "rows": 60,
    "skipped": None,
    "halved_to": None,
}


def step(at=0, reward=0.5, **changes):
    """A healthy step's report; ``changes`` are fields of its update, or counts."""
    update = {**HEALTHY_UPDATE, **{key: value for key, value in changes.items() if key in HEALTHY_UPDATE}}
    counts = {**HEALTHY_COUNTS, **{key: value for key, value in changes.items() if key not in HEALTHY_UPDATE}}
    return StepReport(at, 0, reward, counts, UpdateReport(**update), 1000, {})


def history(*parts):
    """``(steps, changes)`` one after the other."""
    changes = [change for count, change in parts for _ in range(count)]
    return [step(at, **change) for at, change in enumerate(changes)]


def told(reports, **settings):
    """``(step, warning)`` in order."""
    watch = Watch(**settings)
    return [(report.step, warning) for report in reports for warning in watch.see(report)]


GOOD = (6, {})
FIRES = {
    "entropy collapse": (
        [GOOD, (3, {"entropy": 0.02})],
        (8, "steps 6 to 8: entropy is 0.02 nats a token, after 0.3 in the first steps", "Lower learning_rate"),
    ),
    "no entropy from the start": ([(6, {"entropy": 0.005})], (5, "entropy is 0.005", "temperature")),
    "all wrong": (
        [(5, {"flat_groups": 9, "reward": 0.05})],
        (4, "steps 0 to 4: 90% of the groups were flat", "easier problems"),
    ),
    "all right": ([(5, {"flat_groups": 8, "reward": 0.9})], (4, "80% of the groups were flat", "harder problems")),
    "all alike": ([(5, {"flat_groups": 8, "reward": 0.5})], (4, "mean reward 0.5", "finer metric")),
    "no parse": ([(1, {"failed: parse": 8})], (0, "step 0: 10% of the rollouts ended in a reply", "max_tokens")),
    "masked": (
        [GOOD, (1, {"masked: timeout": 20, "masked: metric raised KeyError": 5})],
        (6, "steps 4 to 6: 10% of the rollouts measured nothing, most often because of 'timeout'", "Mend the cause"),
    ),
    "truncated": ([(1, {"truncated_calls": 8})], (0, "10% of the replies were cut off", "PolicyLM(max_tokens=...)")),
    "context full": ([(1, {"truncated_by_context": 8})], (0, "before max_tokens", "max_model_len")),
    "reward fell": (
        [(5, {"reward": 0.8}), (5, {"reward": 0.55})],
        (9, "steps 5 to 9: mean reward is 0.55, down from 0.8 in steps 0 to 4", "kl_coefficient"),
    ),
    "kl runs away": (
        [GOOD, (1, {"kl_to_start": 0.6})],
        (6, "steps 1 to 6: KL to the start grew from 0.1 to 0.6 nats a token", "Lower learning_rate"),
    ),
    "few tokens carry the update": (
        [(1, {"effective_sample_share": 0.8})],
        (0, "effective sample share 0.8 (1 is exact)", "same precision"),
    ),
    "log-ratio": ([(1, {"mean_log_ratio": -0.06})], (0, "mean log-ratio -0.06 nats", "same precision")),
    "capped": ([(1, {"capped_share": 0.02})], (0, "2.0% of the tokens reached its cap", "importance_cap")),
    "spike": ([GOOD, (1, {"grad_norm": 6.0})], (6, "step 6: gradient norm 6, 12 times the usual 0.5", "max_grad_norm")),
    "skipped": (
        [GOOD, (1, {"skipped": "loss nan", "tokens": 0, "entropy": 0.0})],
        (6, "step 6: the update was skipped: loss nan", "max_grad_norm"),
    ),
    "out of memory": (
        [GOOD, (1, {"halved_to": 2048})],
        (6, "step 6: the update ran out of memory and was made again with micro-batches of 2048", "micro_batch_tokens"),
    ),
    "untrained": ([(1, {"no_trained_calls": 40})], (0, "50% of the rollouts hold no call", "on every path")),
    "greedy": ([(1, {"greedy_calls": 3})], (0, "3 calls were greedy", "temperature above 0")),
}
QUIET = {
    "a healthy run": [(40, {})],
    "entropy that falls to a quarter": [GOOD, (9, {"entropy": 0.075})],
    "steps that trained nothing have no entropy": [
        GOOD,
        (9, {"tokens": 0, "entropy": 0.0, "effective_sample_share": None}),
    ],
    "most groups flat, but not in five steps running": [
        *[(4, {"flat_groups": 10}), (1, {})] * 3,
    ],
    "no groups at all": [(6, {"groups": 0, "flat_groups": 0, "rollouts": 0, "calls": 0, "reward": None})],
    "a few parse failures and masks": [(6, {"failed: parse": 7, "masked: timeout": 7, "truncated_calls": 7})],
    "truncation was not counted": [(6, {"calls": 0, "truncated_calls": 0})],
    "reward that wavers": [(5, {"reward": 0.6}), (5, {"reward": 0.45})],
    "a small reward that vanishes": [(5, {"reward": 0.05}), (5, {"reward": 0.0})],
    "reward that rises": [(5, {"reward": 0.2}), (5, {"reward": 0.9})],
    "kl that grows fast from nothing": [(6, {"kl_to_start": 0.001}), (6, {"kl_to_start": 0.3})],
    "kl that is high and stays": [(12, {"kl_to_start": 2.0})],
    "kl that was not measured": [(12, {"kl_to_start": None})],
    "rounding of another precision": [(9, {"effective_sample_share": 0.98, "mean_log_ratio": -0.01})],
    "a spike before there is a usual norm": [(3, {}), (1, {"grad_norm": 50.0})],
    "a spike long ago": [GOOD, (1, {"grad_norm": 4.0}), (20, {})],
    "a rollout without a trained call": [(6, {"no_trained_calls": 8})],
}


def test_tokens_that_a_clip_takes_the_gradient_from_are_told_of_where_the_weights_had_not_moved():
    clipped = history((1, {"capped_share": 0.02}))
    ((_, warning),) = told(clipped, loss="gspo")
    assert "2.0% of the tokens had no gradient: their importance weight left the clip of gspo" in warning
    assert warning.endswith("before widening clip")
    assert told(clipped, loss="gspo", fresh=False) == []
    assert len(told(clipped, fresh=False)) == 1  # CISPO's cap is too far off to be reached by one batch's steps
    assert told(history((1, {"capped_share": None})), loss="rloo") == []


def test_a_step_that_played_nothing_is_no_share_of_anything():
    assert told([step(rollouts=0, **{"masked: timeout": 1})]) == []


@pytest.mark.parametrize("name", FIRES)
def test_a_trouble_is_told_at_its_step_with_what_was_seen_and_what_to_do(name):
    parts, (at, seen, advice) = FIRES[name]
    warnings = told(history(*parts))
    assert len(warnings) == 1
    assert warnings[0][0] == at
    assert seen in warnings[0][1]
    assert advice in warnings[0][1]


@pytest.mark.parametrize("name", QUIET)
def test_what_is_no_trouble_is_not_told(name):
    assert told(history(*QUIET[name])) == []


@pytest.mark.parametrize("name", FIRES)
def test_a_trouble_that_goes_on_is_told_once(name):
    parts, _ = FIRES[name]
    *before, (count, trouble) = parts
    kinds = [warning.split(": ")[1].split(" ")[0] for _, warning in told(history(*before, (count + 8, trouble)))]
    assert len(kinds) == len(set(kinds))


def test_a_trouble_that_went_and_came_back_is_told_again():
    trouble = (1, {"greedy_calls": 1})
    assert [at for at, _ in told(history(trouble, (CALM, {}), trouble))] == [0, CALM + 1]
    assert [at for at, _ in told(history(trouble, (CALM - 1, {}), trouble))] == [0]


def test_parse_failures_are_a_share_of_what_was_measured():
    warnings = [warning for _, warning in told([step(**{"masked: timeout": 40, "failed: parse": 4})])]
    assert any("10% of the rollouts ended in a reply that does not parse" in warning for warning in warnings)


def test_a_number_that_is_not_finite_is_not_measured():
    assert told(history(GOOD, (6, {"entropy": float("nan"), "kl_to_start": float("inf")}))) == []


def test_a_spike_is_over_when_the_next_steps_train_nothing():
    spike, nothing = (1, {"grad_norm": 50.0}), (8, {"tokens": 0})
    assert [at for at, _ in told(history(GOOD, spike, nothing, spike))] == [6, 15]


def test_all_wrong_and_all_right_are_two_troubles():
    flat = {"flat_groups": 10}
    warnings = told(history((5, {**flat, "reward": 0.0}), (5, {**flat, "reward": 1.0})))
    assert [at for at, _ in warnings] == [4, 6, 8]
    assert ["Nearly every rollout fails" in text for _, text in warnings] == [True, False, False]
    assert "Nearly every rollout succeeds" in warnings[-1][1]


def in_cycles(*unparsed, steps_per_cycle=2):
    """Reports of 80 rollouts each, so many of which did not parse."""
    reports = [step(at, **{"failed: parse": count}) for at, count in enumerate(unparsed)]
    return [replace(report, cycle=report.step // steps_per_cycle) for report in reports]


def test_replies_that_do_not_parse_are_told_once_a_cycle():
    assert [at for at, _ in told(in_cycles(8, 40, 0, 9, 20, 20, 7, 7))] == [0, 3, 4]
    assert [at for at, _ in told(in_cycles(8, *[0] * 8, 8, steps_per_cycle=10))] == [0]


def test_the_share_that_may_not_parse_is_the_user_s():
    assert [at for at, _ in told(in_cycles(8, 16), parse_share=0.2)] == [1]
    assert told(in_cycles(0, 0), parse_share=1e-9) == []


def test_replies_that_do_not_parse_are_told_with_their_predictors_the_worst_first():
    of = {"calls": 80, "tokens": 1, "truncated": 0, "rows": 0, "positive_rows": 0, "flat_groups": 0}
    unparsed = {"answer": 2, "check": 0, "query": 6}
    predictors = {
        name: PredictorReport(**of, unparsed=count, advantage=None, score=None) for name, count in unparsed.items()
    }
    (report,) = in_cycles(8)
    ((_, text),) = told([replace(report, predictors=predictors)])
    assert "does not parse ('query' in 6 of its 80 calls; 'answer' in 2 of its 80 calls). Raise max_tokens" in text


def test_the_reward_s_range_is_the_user_s():
    parts = history((5, {"flat_groups": 10, "reward": 0.0}))
    assert "Nearly every rollout succeeds" in told(parts, worst=-1.0, best=0.0)[0][1]
    assert told(history((5, {"reward": 80.0}), (5, {"reward": 60.0})), worst=0.0, best=100.0) == []


numbers = st.none() | st.floats(-1e6, 1e6) | st.sampled_from([float("nan"), float("inf"), 0.0])
changes = st.fixed_dictionaries(
    {"reward": st.none() | st.floats(0, 1)},
    optional={
        **dict.fromkeys(("kl_to_start", "effective_sample_share"), numbers),
        **dict.fromkeys(("entropy", "grad_norm", "mean_log_ratio"), numbers.filter(lambda x: x is not None)),
        **{
            name: st.integers(0, 80)
            for name in ("groups", "flat_groups", "rollouts", "calls", "truncated_calls", "rows")
        },
        "tokens": st.integers(0, 2),
        "masked: timeout": st.integers(0, 80),
        "failed: parse": st.integers(0, 80),
        "skipped": st.none() | st.text(),
    },
)


@given(st.lists(changes, max_size=20), st.integers(0, 20))
def test_a_continued_run_hears_what_an_uninterrupted_one_does(steps, killed_at):
    reports = [step(at, **change) for at, change in enumerate(steps)]
    whole = told(reports)
    watch = Watch()
    for report in reports[:killed_at]:
        watch.see(read_back(report))
    rest = [(report.step, warning) for report in reports[killed_at:] for warning in watch.see(report)]
    assert rest == [(at, warning) for at, warning in whole if at >= killed_at]


def read_back(report):
    """The report as the run directory's events hold it: JSON has no NaN, such a number becomes None."""
    return StepReport.from_json(json.loads(json.dumps(asdict(report)), parse_constant=lambda name: None))
