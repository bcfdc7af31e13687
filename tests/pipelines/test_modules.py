"""Programs some of whose modules are trained, or scored by themselves, through compile() on the real base model."""

import dspy
import numpy as np
import pytest

from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.rollout.components import read_texts
from dspy_fst.types import version_of
from tests.pipelines.test_shapes import Chain
from tests.pipelines.watched import assert_tokens_are_exact, lab_policy, run_watched, says, shorter


def chain():
    program = Chain()
    program.set_lm(lab_policy())
    return program


def long_first(gold, pred, trace=None):
    """The run is paid for a short answer, its first module for a long one."""
    said = str(trace[0][2].answer)
    return dspy.Prediction(score=shorter(gold, pred), predictor_scores={"first": float(len(said))})


@pytest.mark.slow
def test_only_the_named_predictors_are_learnt_from_and_the_others_speak_with_the_newest_weights(tmp_path):
    program, before = chain(), read_texts(chain()).texts
    run = run_watched(program, tmp_path / "run", trained=["third", "first", "third"], cycles=2)
    assert_tokens_are_exact_before_the_first_update(run)
    assert {row.predictor for row in run.rows} == {"first", "third"}
    second = {(call.predictor, call.weights) for _, rollout in run.rollouts for call in rollout.calls}
    assert {("second", version_of(0)), ("second", version_of(1))} <= second
    assert any(rollout.candidate.texts["second"] != before["second"] for rollout in run.played("search"))
    plan = next(event for event in run.events if event["event"] == "plan")
    assert (plan["trained"], plan["untrained"], plan["frozen"]) == (["first", "third"], ["second"], {})
    for step in run.reports("step"):
        assert step["predictors"]["second"]["calls"] > 0
        assert step["predictors"]["second"]["rows"] == 0


def assert_tokens_are_exact_before_the_first_update(run):
    run.events = [event for event in run.events if event["event"] != "step" or event["report"]["step"] == 0]
    assert_tokens_are_exact(run)


@pytest.mark.slow
def test_a_run_is_continued_with_the_same_trained_predictors_only(tmp_path):
    run_watched(chain(), tmp_path / "run", trained=["third", "first"], method="rl")
    with pytest.raises(
        (ConfigurationError, RunDirectoryError), match=r"trained \(there \['first', 'third'\], now None\)"
    ):
        run_watched(chain(), tmp_path / "run", method="rl")
    run_watched(chain(), tmp_path / "run", trained=["first", "third", "first"], method="rl")


@pytest.mark.slow
def test_a_predictor_with_scores_of_its_own_learns_from_them_and_the_events_tell(tmp_path):
    run = run_watched(chain(), tmp_path / "run", metric=long_first, method="rl")
    rollouts, reports = run.played("step"), run.reports("step")[0]["predictors"]
    measured = {}
    for rollout in rollouts:
        if rollout.reward is not None:
            own = rollout.reward if rollout.failure else rollout.predictor_scores["first"]
            first = [call.completion_ids for call in rollout.calls if call.predictor == "first"]
            measured.setdefault(rollout.problem, []).append((own, first))
    taught = 0
    for problem, of in measured.items():
        scores = np.array([own for own, _ in of])
        rows = [row for row in run.rows if (row.problem, row.predictor) == (problem, "first")]
        taught += bool(rows)
        learnt = sorted((row.completion_ids, row.advantage) for row in rows)
        advantages = (scores - scores.mean()) / scores.std() if np.ptp(scores) > 1e-6 else ()
        earned = sorted((said, a) for (_, first), a in zip(of, advantages, strict=False) for said in first)
        assert [said for said, _ in learnt] == [said for said, _ in earned]
        assert [a for _, a in learnt] == pytest.approx([a for _, a in earned], abs=1e-4)
    assert taught
    assert reports["first"]["score"] == pytest.approx(
        sum(own for of in measured.values() for own, _ in of) / sum(map(len, measured.values()))
    )
    assert reports["second"]["score"] is None
    assert sum(of["calls"] for of in reports.values()) == run.reports("step")[0]["counts"]["calls"]
    assert sum(of["rows"] for of in reports.values()) == run.reports("step")[0]["counts"]["rows"] == len(run.rows)


def test_a_metric_that_scores_a_stranger_is_refused_before_the_run_with_what_there_is(tmp_path):
    def stranger(gold, pred, trace=None):
        return dspy.Prediction(score=1.0, predictor_scores={"fourth": 1.0})

    with pytest.raises(ConfigurationError, match=r"predictor_scores of \['fourth'\].*are first, second, third"):
        run_watched(chain(), tmp_path / "run", metric=stranger)


@pytest.mark.parametrize(
    ("trained", "fault"),
    [
        (
            ["first", "frist"],
            "trained: 'frist' is not a predictor that calls the PolicyLM; those that do: first, third",
        ),
        (["second"], "trained: 'second' is not a predictor that calls the PolicyLM; those that do: first, third"),
        ([], "trained=[]"),
        ("first", "trained='first'"),
        (["third"], "trained: third have temperature=0"),
    ],
)
def test_a_name_that_cannot_be_trained_is_refused(tmp_path, trained, fault):
    program = chain()
    program.second.lm = dspy.utils.DummyLM([{"answer": "3"}])
    program.third = says("Solve the problem.", temperature=0)
    program.third.lm = program.first.lm
    with pytest.raises(ConfigurationError) as caught:
        run_watched(program, tmp_path / "run", trained=trained)
    assert [fault in told for told in caught.value.faults].count(True) == 1
