"""Step reports -> whether the weights moved, and why not."""

from dataclasses import replace

import pytest

from dspy_fst.monitoring.rules import Form
from dspy_fst.run.learning import standstill, update_summary
from tests.run.test_watch import step, told

FLAT = {"tokens": 0, "rows": 0, "flat_groups": 10, "live_groups": 0}
STILL = {
    "solved": ({"reward": 1.0}, "flat at the top: mean reward 1"),
    "floor": ({"reward": 0.0}, "flat at the floor: mean reward 0, and the rollouts of each problem scored alike"),
    "alike": ({"reward": 0.5}, "flat at mean reward 0.5"),
    "unparsed": ({"reward": 0.0, "failed: parse": 80}, "nothing parsed: 100% of the rollouts"),
    "failed": ({"reward": 0.0, "failed: context": 76}, "95% of the rollouts failed (context: 152)"),
    "unmeasured": ({"reward": None, "masked: timeout": 80}, "100% of the rollouts were masked (timeout: 160)"),
    "untrained": ({"reward": 0.4, "no_trained_calls": 80, "greedy_calls": 80}, "160 calls were greedy (temperature 0)"),
    "not finite": ({"reward": 0.4, "skipped": "loss nan", "rows": 60}, "not finite (loss nan)"),
}


def still(**changes):
    return step(**{**FLAT, **changes})


@pytest.mark.parametrize("cause", STILL)
def test_the_cause_of_a_standstill_is_read_from_the_counts(cause):
    changes, seen = STILL[cause]
    found = standstill([step(0), still(at=1, **changes), still(at=2, **changes)])
    assert (found.cause, [report.step for report in found.steps]) == (cause, [1, 2])
    assert seen in found.words
    assert found.words.startswith("steps 1 to 2: 2 steps in a row had no gradient: ")


def test_most_that_do_not_parse_are_the_cause_although_some_do():
    found = standstill([still(reward=0.0, **{"failed: parse": 48})])
    assert (found.cause, found.seen.split(":")[0]) == ("unparsed", "hardly anything parsed")
    assert standstill([still(reward=0.0, **{"failed: parse": 20})]).cause == "floor"


def test_a_reward_just_below_the_best_is_no_success():
    assert standstill([still(reward=0.9)]).cause == "alike"
    assert standstill([still(reward=90.0)], 0.0, 100.0).cause == "alike"
    assert standstill([still(reward=99.0)], 0.0, 100.0).cause == "solved"


def test_a_step_that_moved_the_weights_ends_a_standstill():
    assert standstill([still(at=0, reward=0.0), step(1)]) is None
    assert standstill([]) is None


def test_the_ending_never_says_less_than_that_nothing_changed():
    flat = still(reward=0.0)
    assert update_summary([flat, flat]).words.startswith("no update changed the weights: flat at the floor")
    assert update_summary([]).words == "no update of the weights was made"
    assert update_summary([step(0), step(1)]).words == "2 of 2 updates changed the weights"
    assert update_summary([step(0), flat]).words.startswith(
        "1 of 2 updates changed the weights; the last ones did not: flat"
    )
    assert [update_summary(of).nothing_learned for of in ([flat], [], [step(0)])] == [True, False, False]


def test_reports_of_older_releases_are_read():
    """They hold None where a release wrote nothing."""
    report = step(0)
    assert update_summary([replace(report, update=replace(report.update, rows=None))]).moved == 1


def parse_warning(form):
    from dspy_fst.monitoring.observer import Watch

    (text,) = Watch().see(step(**{"failed: parse": 80}), form, "A reply of 'solve': 'x'. Expected a field")
    return text


def test_a_warning_holds_a_reply_and_does_not_advise_what_is_done_already():
    text = parse_warning(Form("JSONAdapter", demos=True, temperature=1.0))
    assert "A reply of 'solve': 'x'. Expected a field. Raise max_tokens" in text
    assert "a lower temperature" in text
    assert "JSONAdapter" not in text
    assert "demos" not in text
    assert "shifts all rewards alike" in text
    assert "format_failure_score below" not in text


def test_what_helped_when_it_was_tried_is_advised_instead_of_the_list():
    text = parse_warning(Form(tried=True, helped="JSONAdapter, 2 demos (75% parsed)"))
    assert "what did best when it was tried on this model: JSONAdapter, 2 demos (75% parsed)" in text
    assert "dspy.configure" not in text
    nothing = parse_warning(Form(tried=True))
    assert "else try simpler output fields, a warm start (warm_start='labels', or teacher=program), or a" in nothing


def test_a_fault_of_the_form_is_not_told_as_wrong_answers_too():
    flat = {**FLAT, "reward": 0.0, "failed: parse": 80}
    texts = [text for _, text in told([step(at, **flat) for at in range(8)])]
    assert len(texts) == 1
    assert "does not parse" in texts[0]
