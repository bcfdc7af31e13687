"""What people are shown of a step's rollouts."""

import dspy
from dspy.teleprompt.bootstrap_trace import FailedPrediction

from dspy_fst.outcomes.outcome import Outcome
from dspy_fst.rollout.call_recorder import tag_predictors
from dspy_fst.rollout.summaries import CALLS, LONGEST, failed_reply_of, summarize, telling
from dspy_fst.types import Call, Candidate, Group, Rollout

CANDIDATE = Candidate({"self": "Sort."})


def rollout(reward, problem=0, failure=None, feedback="", **fields):
    told = {"mask": "timeout" if reward is None else None, "failure": failure, "feedback": feedback}
    return Rollout(problem, CANDIDATE, (), reward, Outcome.of_fields(told), **fields)


def test_the_best_and_the_worst_of_the_widest_group_are_shown():
    flat = Group(0, tuple(rollout(0.5) for _ in range(3)))
    wide = Group(1, tuple(rollout(reward, problem=1) for reward in (0.1, None, 0.9, 0.4)))
    best, worst = telling([flat, wide])
    assert (best.reward, worst.mask) == (0.9, "timeout")


def test_nothing_is_shown_of_nothing():
    assert telling([]) == []


def test_a_module_shows_what_went_in_and_came_out():
    program = dspy.Predict("question -> answer")
    tag_predictors(program)
    long = "x" * (3 * LONGEST)
    entries = (
        (program, {"question": "2 1"}, dspy.Prediction(answer=long)),
        (program, {"question": "3"}, FailedPrediction("no fields")),
    )
    data = summarize(rollout(0.5, trace=entries, feedback="Nearly."))
    first, second = data["modules"]
    assert (first["name"], first["inputs"]) == ("self", {"question": "2 1"})
    assert len(first["outputs"]["answer"]) < LONGEST + 10
    assert second["reply"] == "no fields"
    assert data["feedback"] == "Nearly."


def test_one_of_each_kind_of_failure_comes_before_drawn_ones_and_a_draw_is_the_same_again():
    wide = Group(0, (rollout(0.0), rollout(1.0)))
    failed = [rollout(0.2, problem=1, failure=kind) for kind in ("parse", "parse", "context")]
    other = Group(1, (*failed, *(rollout(0.1 * i, problem=1) for i in range(3, 6))))
    shown_first = telling([wide, other], 4, "step 3")
    assert [one.reward for one in shown_first[:2]] == [1.0, 0.0]
    assert {one.failure for one in shown_first[2:]} == {"parse", "context"}
    everything = telling([wide, other], 99, "step 3")
    assert len(everything) == 8
    assert everything == telling([wide, other], 99, "step 3")
    assert telling([wide, other], 0) == []


def test_replies_are_shown_as_they_were_sampled_the_last_calls_of_many():
    calls = tuple(
        Call("self", (1,), tuple(map(ord, f"reply {i}")), (0.0,) * 7, "length" if i == 9 else "stop", "step-000000")
        for i in range(10)
    )
    data = summarize(Rollout(0, CANDIDATE, calls, 0.5), decode=lambda ids: "".join(map(chr, ids)))
    assert [call["reply"] for call in data["calls"]] == [f"reply {i}" for i in range(10 - CALLS, 10)]
    assert [call["cut"] for call in data["calls"]] == [False] * (CALLS - 1) + [True]


def test_a_failed_reply_is_told_with_its_predictor_and_what_was_missed():
    feedback = "The reply could not be parsed: x\nLM Response: no fields\nExpected to find output fields: [answer]"
    entry = (dspy.Predict("question -> answer"), {}, FailedPrediction("no fields"))
    parse = rollout(0.0, failure="parse", failed_in="solve", feedback=feedback, trace=(entry,))
    assert failed_reply_of([rollout(1.0), parse]) == (
        "A reply of 'solve': 'no fields'. Expected to find output fields: [answer]"
    )
    context = rollout(0.0, failure="context", feedback="too long")
    assert failed_reply_of([context]) == "One failed (context): too long"
    assert failed_reply_of([rollout(1.0)]) == ""
