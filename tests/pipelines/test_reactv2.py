"""dspy.ReActV2 with native tools: what the policy does wrong is scored, and a frozen LM keeps DSPy's second call."""

from dataclasses import replace
from types import SimpleNamespace

import dspy
import pytest

from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Problem
from tests.fakes import fields, scripted_policy


def search(query: str) -> str:
    """Looks things up."""
    return "found"


def rollout_of(program, engine):
    rollouter = Rollouter(
        program, Reward(lambda gold, pred, trace=None: 1.0), RolloutSettings(num_threads=1), engine.expect
    )
    problem = Problem(0, dspy.Example(question="q").with_inputs("question"))
    (rollout,) = rollouter.rollout([Task(problem, read_texts(program))], "test")
    return rollout


@pytest.mark.parametrize("native", [True, False])
def test_a_policy_that_never_calls_a_tool_is_scored_and_not_masked(native):
    program = dspy.ReActV2("question -> answer", tools=[search], max_iters=2)
    policy, engine = scripted_policy(lambda messages, seed: "no tool call at all")
    policy.handle._reader = replace(policy.handle.reader, takes_tools=True)
    program.set_lm(policy)
    with dspy.context(adapter=dspy.ChatAdapter(use_native_function_calling=native)):
        rollout = rollout_of(program, engine)
    assert (rollout.mask, rollout.reward) == (None, 0.0)
    assert rollout.failure is not None
    assert rollout.calls


class AnswersInJson(dspy.BaseLM):
    """A frozen model that answers ChatAdapter's prompt in JSON, and so is asked twice by DSPy."""

    def __init__(self):
        super().__init__("frozen")
        self.asked = asked = []
        self.ask = lambda: asked.append(1)  # copies of it note in the same list

    def forward(self, prompt=None, messages=None, **config):
        self.ask()
        message = SimpleNamespace(content='{"verdict": "ok"}', tool_calls=None)
        return SimpleNamespace(
            choices=[SimpleNamespace(message=message, finish_reason="stop")], usage={}, model="frozen"
        )


class Judged(dspy.Module):
    def __init__(self):
        super().__init__()
        self.solve, self.judge = dspy.Predict("question -> answer"), dspy.Predict("answer -> verdict")

    def forward(self, question):
        return self.judge(answer=self.solve(question=question).answer)


def test_a_frozen_lm_is_asked_as_it_is_outside_of_a_rollout():
    program, frozen = Judged(), AnswersInJson()
    policy, engine = scripted_policy(lambda messages, seed: fields(answer="x"))
    program.set_lm(policy)
    program.judge.lm = frozen
    rollout = rollout_of(program, engine)
    assert (rollout.mask, rollout.reward, len(frozen.asked)) == (None, 1.0, 2)
