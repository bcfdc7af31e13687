"""What a run tells or refuses before it starts, and what it tells of its validation; on the laboratory's base."""

import dspy
import pytest

from dspy_fst import FSTOptimizer
from dspy_fst.errors import ConfigurationError
from dspy_fst.run.directory import read_events
from programs.lab import build
from tests.fakes import fields, scripted_policy
from tests.pipelines.watched import SHORT, append_words, lab_policy, run_watched, says, shorter

WORK = "Work out the answer from the numbers."
RL = {"method": "rl", "problems_per_step": 3, "group_size": 2}


class Asks(dspy.Module):
    """One predictor; ``after`` says what becomes of its answer."""

    def __init__(self, after=lambda pred, numbers: pred):
        super().__init__()
        self.solve, self.after = says(WORK), after
        self.set_lm(lab_policy(linger_s=0.2))

    def forward(self, numbers):
        return self.after(self.solve(numbers=numbers), numbers)


def problems(count, start=0, **labels):
    numbers = [f"{1 + i} 2 3 {i}" for i in range(start, start + count)]
    return [
        dspy.Example(numbers=of, **(labels or {"answer": str(float(i))})).with_inputs("numbers")
        for i, of in enumerate(numbers)
    ]


def compiled(tmp_path, program, metric, valset=None, trainset=None, **recipe):
    optimizer = FSTOptimizer(
        metric=metric, propose=append_words, run_dir=tmp_path / "run", **{**SHORT, **RL, "population_size": 1, **recipe}
    )
    try:
        return optimizer.compile(program, trainset=trainset or problems(8), valset=valset)
    finally:
        program.get_lm().release()


def told(tmp_path):
    return [event["text"] for event in read_events(tmp_path / "run") if event["event"] in ("note", "warning")]


def reads_answer(gold, pred, trace=None):
    return 1.0 / (1 + abs(len(gold.answer) - len(str(pred.answer))))


# ---- the valset --------------------------------------------------------------------------------


def test_a_valset_that_the_metric_cannot_read_is_refused_before_the_start(tmp_path):
    with pytest.raises(ConfigurationError, match=r"4 of the 4 examples of the valset .* cannot be measured") as error:
        compiled(tmp_path, Asks(), reads_answer, valset=problems(9, label="x"))
    assert "metric raised AttributeError" in str(error.value)
    assert "mend the metric" in str(error.value)


def test_one_bad_example_among_those_spread_over_the_valset_is_refused(tmp_path):
    valset = [*problems(4), *problems(4, start=4, label="x")]
    with pytest.raises(ConfigurationError, match="2 of the 4 examples of the valset"):
        compiled(tmp_path, Asks(), reads_answer, valset=valset)


def test_validation_rollouts_that_measure_nothing_are_counted_and_told(tmp_path):
    valset = problems(8)
    del valset[7]["answer"]  # not among the four that are tried
    program = compiled(tmp_path, Asks(), reads_answer, valset=valset)
    (done,) = [event for event in read_events(tmp_path / "run") if event["event"] == "done"]
    assert done["validation_counts"]["rollouts"] == 8
    assert done["validation_counts"]["masked: metric raised AttributeError"] == 1
    assert program.detailed_results.validation_counts == done["validation_counts"]
    assert any(
        "validation: 1 of 8 rollouts measured nothing (metric raised AttributeError: 1)" in t for t in told(tmp_path)
    )
    assert len(done["validation"]) == 1


def test_a_validation_without_any_measure_is_told(tmp_path):
    calls = []

    def gives_up(gold, pred, trace=None):
        calls.append(gold.numbers)
        if gold.kind == "val" and calls.count(gold.numbers) > 1:  # it was tried once, before the start
            raise RuntimeError("the judge has gone home")
        return shorter(gold, pred)

    compiled(tmp_path, Asks(), gives_up, trainset=problems(8, kind="train"), valset=problems(4, start=20, kind="val"))
    assert any("validation: nothing was measured" in text for text in told(tmp_path))


# ---- what the policy writes --------------------------------------------------------------------


@pytest.mark.parametrize("written", ["nan", "1e400"])
def test_numbers_that_are_not_finite_do_not_stop_the_start(written, tmp_path):
    def metric(gold, pred, trace=None):
        return -abs(float(gold.answer) - pred.answer)

    program = Asks(after=lambda pred, numbers: dspy.Prediction(answer=float(written)))
    run = run_watched(program, tmp_path / "run", metric=metric, trainset=problems(8), population_size=1, **RL)
    assert run.outcomes("step") == {"failed: not finite": 6}
    assert run.reports("step")[0]["counts"]["failed: not finite"] == 6


def number(gold, pred, trace=None):
    return -abs(float(gold.answer) - float(pred.answer))


@pytest.mark.parametrize("written", ["", "soon", None, "nan"])
def test_what_the_policy_writes_and_a_good_metric_cannot_read_is_scored(written, tmp_path):
    program = Asks(after=lambda pred, numbers: dspy.Prediction(answer=written if numbers.endswith("5") else "1.0"))
    trainset = problems(8)
    run = run_watched(
        program,
        tmp_path / "run",
        metric=number,
        trainset=trainset,
        population_size=1,
        failure_score=-9.0,
        **{**RL, "problems_per_step": 8},
    )
    lost = [rollout for rollout in run.played("step") if rollout.failure]
    assert {rollout.problem for rollout in lost} == {5}
    assert [(r.reward, r.mask) for r in lost] == [(-9.0, None)] * 2
    said = "not finite" if written == "nan" else "metric could not read what the policy wrote"
    assert {r.failure.split(" (")[0] for r in lost} == {said}


def test_a_bug_that_only_wrong_answers_meet_stays_the_metric_s(tmp_path):
    def metric(gold, pred, trace=None):
        if pred.answer == gold.answer:
            return 1.0
        return 0.5 * gold.answer.partial  # a bug: text has no such attribute

    program = Asks(after=lambda pred, numbers: dspy.Prediction(answer=f"{numbers[-1]}.0" if numbers[-1] < "4" else "x"))
    run = run_watched(
        program,
        tmp_path / "run",
        metric=metric,
        trainset=problems(8),
        population_size=1,
        **{**RL, "problems_per_step": 8},
    )
    assert run.outcomes("step") == {"scored": 8, "masked: metric raised AttributeError": 8}


def test_what_the_program_gives_in_another_type_than_the_label_s_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="4 of the first 4 examples cannot be measured"):
        compiled(tmp_path, Asks(after=lambda pred, numbers: dspy.Prediction(answer=["a", "list"])), number)


# ---- the scale of the metric -------------------------------------------------------------------


@pytest.mark.parametrize("best", [20, 100])
def test_a_metric_above_the_perfect_score_is_told_before_the_first_search(best, tmp_path):
    run = run_watched(
        Asks(),
        tmp_path / "run",
        metric=lambda gold, pred, trace=None: best * float(len(gold.numbers) > 3),
        trainset=problems(8),
    )
    assert f"up to {best} on the first examples, and perfect_score=1: " in run.told()


def test_a_metric_that_asks_a_judge_is_not_asked_for_labels():
    from dspy_fst.preflight.score_scale import scores_of_labels

    judge = dspy.Predict("given_answer -> verdict: float")
    asked = []

    def says_verdict(messages, seed):
        asked.append(seed)
        return fields(verdict="20")

    judge.set_lm(scripted_policy(says_verdict)[0])
    scores = scores_of_labels(
        lambda gold, pred, trace=None: float(judge(given_answer=pred.answer).verdict), problems(4)
    )
    assert (scores, asked) == ([], [])


def test_the_right_scale_is_not_warned_of(tmp_path):
    run = run_watched(
        Asks(), tmp_path / "run", metric=lambda g, p, t=None: 100.0, trainset=problems(8), perfect_score=100
    )
    assert "perfect_score" not in run.told()


# ---- where hardly any reply parses --------------------------------------------------------------


def test_where_nothing_parses_the_start_tries_other_forms_and_says_which_this_model_follows(tmp_path):
    lab = build(train=12, val=1, test=1)
    with dspy.context(adapter=dspy.JSONAdapter()):
        run = run_watched(Asks(), tmp_path / "run", trainset=lab.trainset, population_size=1, parse_trial=4, **RL)
    told = run.told()
    assert "every reply to the first examples failed (parse)" in told
    assert "A reply of 'solve': " in told
    assert "of the replies to the first examples 0% parse" in told
    assert "adapter = dspy.ChatAdapter(" in told
    assert "dspy.configure(adapter=adapter)" in told
    assert "XMLAdapter, 2 demos" in told
    played = [rollout for draw, rollout in run.rollouts if draw.startswith("parse trial")]
    setups = {draw for draw, _ in run.rollouts if draw.startswith("parse trial")}
    assert len(setups) in (6, 7)  # two other forms, three with demos, one cooler, and that with the best of the others
    assert len(played) == 4 * len(setups)
    (plan,) = [event for event in run.events if event["event"] == "plan"]
    assert plan["before_the_start"]["rollouts"] == 4 + len(played)
    assert run.outcomes("step") == {"failed: parse": 6}, "nothing is changed by itself"


def test_the_trial_can_be_switched_off_and_is_not_made_where_replies_parse(tmp_path):
    with dspy.context(adapter=dspy.JSONAdapter()):
        run = run_watched(Asks(), tmp_path / "off", population_size=1, parse_trial=0, **RL)
    assert {draw for draw, _ in run.rollouts} == {"preflight", "step-0"}
    run = run_watched(Asks(), tmp_path / "fine", population_size=1, **RL)
    assert {draw for draw, _ in run.rollouts} == {"preflight", "step-0"}
