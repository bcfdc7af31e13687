"""A run says why its alternation is over, and only then."""

import pytest

from dspy_fst.errors import MeasurementError
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_directory import read_records
from dspy_fst.report.from_events import record_of
from dspy_fst.run.directory import read_events
from dspy_fst.run.ending import StopReason, complete, halt_reason_in, stop_reason_in
from dspy_fst.training.session import Session
from tests.report.happenings import whole_run
from tests.test_compile import compile_relay


def reasons(run_dir):
    return [event["reason"] for event in read_events(run_dir) if event["event"] == "ended"]


def test_a_run_that_did_all_of_its_plan_says_so_once(tmp_path):
    policy_of(compile_relay(tmp_path / "run", method="rl", cycles=1)).release()
    assert reasons(tmp_path / "run") == [{"kind": "complete", "step": 2, "text": "all of the plan is done: 2 steps"}]
    (record,) = read_records([tmp_path / "run"])
    assert (record.state, record.ended) == ("finished", complete(2))
    assert not record.ended.early


def test_a_run_that_is_stopped_makes_no_further_step_and_goes_on_when_it_is_continued(tmp_path, monkeypatch):
    reason = StopReason("nothing_learned", 1, "three steps in a row taught nothing")
    commit = Session.commit_step

    def stops(session, step, *done):
        session.stop(reason)
        return commit(session, step, *done)

    monkeypatch.setattr(Session, "commit_step", stops)
    first = compile_relay(tmp_path / "run", cycles=2, checkpoint_every=10)
    policy_of(first).release()
    assert [step.step for step in first.detailed_results.steps] == [0]
    (record,) = read_records([tmp_path / "run"])
    assert (record.ended, record.ended.early) == (reason, True)

    monkeypatch.setattr(Session, "commit_step", commit)
    second = compile_relay(tmp_path / "run", cycles=2, checkpoint_every=10)  # the stop committed step 0
    policy_of(second).release()
    assert [step.step for step in second.detailed_results.steps] == [0, 1, 2, 3]
    assert reasons(tmp_path / "run") == [{"kind": "complete", "step": 4, "text": "all of the plan is done: 4 steps"}]


def test_what_stops_the_validation_of_the_end_is_told_and_not_hidden_by_an_end(tmp_path, monkeypatch):
    def stopped(session, population):
        raise MeasurementError("the judge is down")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "validate_end", stopped)
        with pytest.raises(MeasurementError):
            compile_relay(tmp_path / "run", method="rl", cycles=1)
    events = read_events(tmp_path / "run")
    assert (reasons(tmp_path / "run"), halt_reason_in(events)) == ([], "MeasurementError: the judge is down")
    policy_of(compile_relay(tmp_path / "run", method="rl", cycles=1)).release()
    assert [reason["kind"] for reason in reasons(tmp_path / "run")] == ["complete"]
    assert halt_reason_in(read_events(tmp_path / "run")) is None


def test_the_advice_is_apart_from_the_words_and_that_of_an_older_release_is_found():
    reason = StopReason("nothing_learned", 2, "2 steps had no gradient", "Try demos.\nA table")
    older = {"kind": reason.kind, "step": 2, "text": f"{reason.text}.\n{reason.advice}"}
    for event in (reason.as_event, older):
        assert stop_reason_in([{"event": "ended", "reason": event}]) == reason
    assert complete(2).as_event == {"kind": "complete", "step": 2, "text": "all of the plan is done: 2 steps"}


def test_a_run_that_was_killed_and_one_of_an_older_release_have_no_reason(tmp_path):
    class KilledError(Exception):
        pass

    def kill(event):
        if event["event"] == "step":
            raise KilledError

    with pytest.raises(KilledError):
        compile_relay(tmp_path / "run", method="rl", cycles=1, listeners=[kill])
    assert stop_reason_in(read_events(tmp_path / "run")) is None
    assert record_of(whole_run()).ended is None
