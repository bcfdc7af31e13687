"""What a warm start teaches: the prompt that the engine reads, a reply that parses; and what is left out, and why."""

import json
from types import SimpleNamespace

import dspy
import pytest
from transformers import AutoTokenizer

from dspy_fst import PolicyLM
from dspy_fst.config import FSTConfig
from dspy_fst.fast.search_settings import own_texts
from dspy_fst.preflight.warm_start_checks import warm_start_faults, warm_start_warnings, warm_start_words
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.state import start_version, to_publish_from, version_in
from dspy_fst.training.warm_start import CUT, LONG, LOW, UNKNOWN, UNWRITTEN, Taught, _by_labels, _by_teacher
from dspy_fst.types import WARM_START, Population, Problem, version_of
from programs.lab import BASE
from tests.fakes import fields, scripted_policy

EXAMPLES = [dspy.Example(numbers=f"{i} 2 3 4", answer=f"4 3 2 {i}").with_inputs("numbers") for i in range(4)]
CONFIG = FSTConfig(warm_start="labels")


class Steps(dspy.Module):
    """Two predictors; labels hold the outputs of the second alone."""

    def __init__(self, lm):
        super().__init__()
        self.plan, self.solve = dspy.Predict("numbers -> plan"), dspy.Predict("numbers -> answer")
        self.set_lm(lm)

    def forward(self, numbers):
        plan = self.plan(numbers=numbers).plan
        return dspy.Prediction(plan=plan, answer=self.solve(numbers=numbers).answer)


def metric(gold, pred, trace=None):
    return float(pred.answer == gold.answer)


@pytest.fixture(scope="module")
def policy():
    policy = PolicyLM(BASE, engine="in_process", max_tokens=24)
    yield policy
    policy.release()


def session_of(policy, trainset=EXAMPLES, config=CONFIG, context=1000):
    """As much of a run as a warm start reads before it learns."""
    program = Steps(policy)
    return SimpleNamespace(
        config=config,
        trainset=trainset,
        program=program,
        policy=policy,
        trained=frozenset({"plan", "solve"}),
        population=Population.of_seed(own_texts(program, config), 2),
        rollouter=SimpleNamespace(reward=Reward(metric)),
        trainer=SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(BASE), policy=SimpleNamespace(context=context)),
        phase=lambda words: None,
    )


@pytest.mark.parametrize("form", [dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter])
def test_a_pair_is_the_prompt_that_the_engine_reads_and_a_reply_that_the_chat_adapter_reads(policy, form):
    session, adapter = session_of(policy), form()
    with dspy.context(adapter=adapter):
        taught = _by_labels(session)
        rollouter = Rollouter(dspy.Predict("numbers -> answer"), Reward(metric), FSTConfig(num_threads=1))
        rollouter.program.set_lm(policy)
        rollout = rollouter.rollout([Task(Problem(2, EXAMPLES[2]), own_texts(rollouter.program, CONFIG))], "x")[0]
        assert taught.left_out == {UNKNOWN: 4}  # the first predictor's outputs are no labels
        assert [pair.predictor for pair in taught.pairs] == ["solve"] * 4
        pair, decode = taught.pairs[2], session.trainer.tokenizer.decode
        assert pair.prompt_ids == rollout.calls[0].prompt_ids
        *reply, end = pair.reply_ids
        assert end == session.trainer.tokenizer.eos_token_id
        assert adapter.parse(session.program.solve.signature, decode(reply)) == {"answer": "4 3 2 2"}


def test_what_cannot_be_taught_is_counted_by_its_reason(policy):
    odd = dspy.Example(numbers="9", answer="9 " * 30).with_inputs("numbers")
    with dspy.context(adapter=dspy.ChatAdapter()):
        assert _by_labels(session_of(policy, [odd])).left_out == {UNKNOWN: 1, CUT: 1}
        assert _by_labels(session_of(policy, context=21)).left_out == {UNKNOWN: 4, LONG: 4}
        session = session_of(policy)
        session.program.solve.config["max_tokens"] = 2  # a predictor's own
        assert _by_labels(session).left_out == {UNKNOWN: 4, CUT: 4}

    class Mute(dspy.ChatAdapter):
        def parse(self, signature, completion):
            raise ValueError

    with dspy.context(adapter=Mute()):
        assert _by_labels(session_of(policy)).left_out == {UNKNOWN: 4, UNWRITTEN: 4}


def teacher_of(right):
    """A teacher on an engine of its own, whose ids are another model's; it is right on these examples."""

    def speak(messages, seed):
        said = messages[-1]["content"]
        if "plan" in said.split("Respond with")[-1]:
            return fields(plan="2 1")
        number = next(i for i in range(4) if f"{i} 2 3 4" in said)
        return fields(answer=f"4 3 2 {number}" if number in right else "no")

    return Steps(scripted_policy(speak)[0])


def test_a_teacher_s_good_traces_teach_every_predictor_in_the_policy_s_own_ids(policy):
    with dspy.context(adapter=dspy.ChatAdapter()):
        taught = _by_teacher(session_of(policy), teacher_of({1, 3}), policy)
        labels = _by_labels(session_of(policy))
    assert (taught.rollouts, taught.examples, taught.left_out) == (4, 4, {LOW: 2})
    assert [pair.predictor for pair in taught.pairs] == ["plan", "solve"] * 2
    assert taught.pairs[1] == labels.pairs[1]  # what the teacher said is what the label says
    assert taught.pairs[3] == labels.pairs[3]
    assert taught.tokens > 0


def faults_of(student, trainset=EXAMPLES, teacher=None, **settings):
    config = FSTConfig(**settings) if settings else CONFIG
    return " ".join(warm_start_faults(config, student, trainset, teacher))


def test_labels_that_are_no_outputs_are_refused_and_partial_ones_are_told(policy):
    cot = dspy.ChainOfThought("numbers -> answer")
    cot.set_lm(policy)
    assert "'predict' lacks reasoning; the first example holds numbers, answer" in faults_of(cot)
    told = list(warm_start_warnings(CONFIG, Steps(policy), EXAMPLES, None))
    assert len(told) == 1
    assert "'plan' is taught nothing, as no example holds its plan" in told[0]
    assert faults_of(Steps(policy)) == ""


def test_a_teacher_of_another_form_or_beside_labels_is_refused(policy):
    student, teacher = Steps(policy), Steps(policy)
    assert faults_of(student, teacher=teacher, warm_start=None, method="fst") == ""
    assert "give one of the two, not both" in faults_of(student, teacher=teacher)
    other = dspy.Predict("numbers -> answer")
    other.set_lm(policy)
    assert "has the name, inputs and outputs of a trained predictor (plan, solve)" in faults_of(
        student, teacher=other, method="rl"
    )
    assert "leave one of the two out" in faults_of(student, warm_start="labels", continue_optimizer=True)
    assert warm_start_words(FSTConfig(), EXAMPLES, None) is None
    assert "3 passes" in warm_start_words(CONFIG, EXAMPLES, None)


def test_what_a_teacher_said_survives_the_state_s_json(policy):
    with dspy.context(adapter=dspy.ChatAdapter()):
        taught = _by_labels(session_of(policy))
    assert Taught.from_json(json.loads(json.dumps(taught.as_json()))) == taught


def test_its_weights_lie_between_those_of_no_and_of_one_update_and_stay(tmp_path):
    warm = {"warm_start": True, "step": 0, "moved_at": 0}
    assert version_of(0) < WARM_START < version_of(1)
    assert (start_version({}), start_version(warm)) == (version_of(0), WARM_START)
    assert [version_in(fields) for fields in ({}, warm, {**warm, "moved_at": 3})] == [
        *(version_of(0), WARM_START, version_of(3))
    ]
    # A kill between its weights and its state leaves weights that are made again; those of a state are read.
    assert [to_publish_from(fields) for fields in ({}, warm)] == [version_of(0), version_of(1)]
    run = RunDirectory(tmp_path / "run", {})
    for version in (version_of(0), WARM_START, *map(version_of, range(1, 6))):
        run.weights_path(version).mkdir()
    run.prune_weights(keep=2)
    assert {path.name for path in (tmp_path / "run" / "weights").iterdir()} == {
        *(version_of(0), WARM_START, version_of(4), version_of(5))
    }
    run.close()
