"""A prompt that a group's rollouts share is written once, and is the one that DSPy would write for each of them."""

from typing import Any

import dspy
import pytest
from dspy.utils.callback import BaseCallback

from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import FormattedOnce, Rollouter, Task
from dspy_fst.types import Candidate, Problem, Rollout
from tests.fakes import fields, scripted_policy

QUESTIONS: list[Any] = ["q0", "q1", 1, True, "1", None]
PROBLEMS = [Problem(i, dspy.Example(question=q).with_inputs("question")) for i, q in enumerate(QUESTIONS)]


class Shown(dspy.Module):
    """Adds a demo of its own to each second question's prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.say = dspy.Predict("question -> answer")
        self.say.demos = [dspy.Example(question="2", answer="two")]

    def forward(self, question: object) -> dspy.Prediction:
        if isinstance(question, str):
            self.say.demos.append(dspy.Example(question="3", answer=f"three {question}"))
        return self.say(question=question)


def played(problems: list[Problem], program: dspy.Module | None = None, samples: int = 3) -> list[Rollout]:
    program = program or Shown()
    policy, engine = scripted_policy(lambda messages, seed: fields(answer="4"))
    program.set_lm(policy)
    rollouter = Rollouter(program, Reward(lambda gold, pred: 1.0), RolloutSettings(num_threads=1), engine.expect)
    seed = read_texts(program)
    other = Candidate({name: f"{text} Be brief." for name, text in seed.texts.items()})
    return rollouter.rollout([Task(p, c, n) for p in problems for c in (seed, other) for n in range(samples)], "test")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of the adapter, for each prompt that was written."""
    written: list[str] = []
    plain = dspy.Adapter.format
    for kind in FormattedOnce.ADAPTERS:

        def format(self: dspy.Adapter, *arguments: Any, of: Any = kind.format) -> Any:
            written.append(type(self).__name__)
            return of(self, *arguments)

        monkeypatch.setattr(kind, "format", format)
    assert plain is dspy.Adapter.format
    return written


@pytest.mark.parametrize("adapter", [None, *FormattedOnce.ADAPTERS], ids=["none", "chat", "json", "xml"])
def test_prompts_are_those_that_dspy_writes_for_each_call(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with dspy.context(adapter=adapter and adapter()):
        once = played(PROBLEMS)
        monkeypatch.setattr(FormattedOnce, "settings", lambda self: {})
        each = played(PROBLEMS)
    assert [r.calls[0].prompt_ids for r in once] == [r.calls[0].prompt_ids for r in each]
    assert [(r.calls[0].completion_ids, r.outcome) for r in once] == [
        (r.calls[0].completion_ids, r.outcome) for r in each
    ]
    assert len({r.calls[0].prompt_ids for r in once}) > len(PROBLEMS)


def test_a_prompt_is_written_once_for_the_rollouts_that_have_it(written: list[str]) -> None:
    played(PROBLEMS)
    assert written == ["ChatAdapter"] * 2 * len(PROBLEMS)


def test_a_prompt_of_values_that_may_print_alike_is_written_each_time(written: list[str]) -> None:
    played([Problem(0, dspy.Example(question=["q0"]).with_inputs("question"))])
    assert len(written) == 6


def test_who_listens_to_prompts_hears_of_each_and_an_adapter_of_somebody_s_own_is_left_alone(
    written: list[str],
) -> None:
    class Listener(BaseCallback):
        heard = 0

        def on_adapter_format_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            Listener.heard += 1

    class Own(dspy.ChatAdapter):
        pass

    with dspy.context(callbacks=[Listener()]):
        played(PROBLEMS[:1])
    with dspy.context(adapter=Own()):
        played(PROBLEMS[:1])
    with dspy.context(adapter=dspy.ChatAdapter(callbacks=[Listener()])):
        played(PROBLEMS[:1])
    assert written == [*["ChatAdapter"] * 6, *["Own"] * 6, *["ChatAdapter"] * 6]
    assert Listener.heard == 12


def test_the_oldest_prompts_go_first_and_the_caller_s_list_is_its_own(
    written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FormattedOnce, "MOST", 2)
    adapter = FormattedOnce().settings()["adapter"]
    assert isinstance(adapter, dspy.ChatAdapter)
    signature = dspy.Signature("question -> answer")

    def write(question: str) -> list[dict[str, Any]]:
        return adapter.format(signature, [], {"question": question})

    first = write("a")
    first[0]["content"] = "altered"
    assert write("a")[0]["content"] != "altered"
    for question in ("b", "c", "b", "c", "a"):
        write(question)
    assert len(written) == 4


def test_rollouts_add_one_callback_to_the_user_s() -> None:
    seen: list[int] = []

    class Counts(Shown):
        def forward(self, question: object) -> dspy.Prediction:
            seen.append(len(dspy.settings.callbacks))
            return super().forward(question)

    played(PROBLEMS[:1], Counts(), samples=1)
    assert seen == [1, 1]
