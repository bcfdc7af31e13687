"""Stand-in proposers say which feedback they could not read, and a run tells it."""

import warnings
from importlib.resources import files
from string import Template

import dspy
import pytest

from dspy_fst.fast.proposer_warnings import collected_warnings
from dspy_fst.fast.search_warnings import search_warnings
from programs.lab import FeedbackProposer
from programs.lab.world import describe_fault
from tests.pipelines.watched import SHORT

TEXT = {"solve": "Work out the answer."}


def records(*feedback):
    return {
        "solve": [
            {"Inputs": {"numbers": "4 2 1"}, "Generated Outputs": {"answer": "4 2"}, "Feedback": said}
            for said in feedback
        ]
    }


def test_the_laboratory_s_proposer_tells_feedback_that_it_cannot_read_once():
    proposer = FeedbackProposer()
    with collected_warnings() as said:
        for _ in range(3):
            proposer(TEXT, records("I wanted 1 2 4.", "Not what I wanted: 4 2."), ["solve"])
    assert len(said) == 1
    assert "FeedbackProposer could not read the feedback 'I wanted 1 2 4.'" in said[0] or "Not what I" in said[0]
    assert "'Wrong. Too many values; ... Expected: 9 1 7. Got: 9 1.'" in said[0]
    assert "name a reflection LM" in said[0]


@pytest.mark.parametrize("shows", [True, False])
def test_the_laboratory_s_own_feedback_is_read(shows):
    own = [describe_fault("1 2 4", got, shows) for got in ("1 2 4", "1 2", "1 2 4 4", "4 2 1", "1 2 5")]
    unparsed = "Your output failed to parse. Follow this structure:\n..."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeedbackProposer(reads=9)(TEXT, records(*own, unparsed), ["solve"])


def own_project():
    """The module that `dspy-fst init` writes."""
    namespace = {}
    source = (files("dspy_fst") / "templates" / "own" / "my_program.py").read_text("utf-8")
    exec(compile(Template(source).substitute(), "my_program.py", "exec"), namespace)
    return namespace


def test_the_template_s_proposer_tells_feedback_of_another_metric_and_reads_its_own():
    module = own_project()
    with collected_warnings() as said:
        texts = module["propose"](TEXT, records("The code is wrong."), ["solve"])
    assert texts == TEXT
    assert len(said) == 1
    assert "propose could not read the feedback 'The code is wrong.'" in said[0]
    gold, pred = dspy.Example(code="PLUM-7-THU"), dspy.Prediction(code="plum-7-THU")
    with collected_warnings() as said:
        texts = module["propose"](TEXT, records(module["metric"](gold, pred).feedback, "Right."), ["solve"])
    assert said == []
    assert module["PARTS"][0] in texts["solve"]


def test_only_plain_warnings_of_the_user_s_code_are_heard():
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("always")
        with collected_warnings() as said:
            warnings.warn("unread", stacklevel=1)
            warnings.warn("unread", stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert said == ["unread"]
    assert [str(other.message) for other in others] == ["old"]


def test_what_a_search_s_proposer_warned_of_is_a_warning_of_the_run():
    assert search_warnings({"reflections": 1}, 2, ("could not read 'x'",)) == [
        "cycle 2: the proposer says: could not read 'x'"
    ]


@pytest.mark.slow
def test_a_run_tells_it_and_repeats_it_from_its_journal_after_a_kill(tmp_path):
    from dspy_fst import FSTOptimizer
    from dspy_fst.run.directory import read_events
    from programs.lab import build
    from tests.pipelines.watched import lab_policy

    calls = []

    class KilledError(Exception):
        pass

    def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
        return dspy.Prediction(score=len(pred.answer) / 99, feedback="Longer, please.")

    def kill(event):
        calls.append(event["event"])
        if event["event"] == "cycle":
            raise KilledError

    def compiled(*listeners):
        lab = build(train=8, val=1, test=1)
        lab.program.set_lm(lab_policy())
        settings = {**SHORT, "method": "gepa", "run_dir": tmp_path / "run", "listeners": listeners}
        return FSTOptimizer(metric=metric, propose=FeedbackProposer(), **settings).compile(
            lab.program, trainset=lab.trainset
        )

    with pytest.raises(KilledError):
        compiled(kill)
    compiled().get_lm().release()
    told = [event["text"] for event in read_events(tmp_path / "run") if event["event"] == "warning"]
    assert [text for text in told if "could not read the feedback 'Longer, please.'" in text] == [told[0]]
    assert told[0].startswith("cycle 0: the proposer says: FeedbackProposer could not read")
