"""Predictors that code reads past the program: the program's own are refused, others are told before the start."""

import functools
from typing import ClassVar

import dspy
import pytest
import torch

from dspy_fst.errors import ConfigurationError
from dspy_fst.rollout.copy_faults import copy_faults
from programs.lab import build
from tests.cases.test_copies import compile_short
from tests.pipelines.watched import lab_policy, run_watched, says

ASK = says("Reverse the list.")
STEPS = {"last": [says("Drop the last number.")]}
OTHER = says("Sort the list.")
TRAINSET = build(train=4, val=1, test=1).trainset


class Registry:
    asks: ClassVar[dict[str, dspy.Predict]] = {"a": ASK}


def through_a_function(numbers):
    return ASK(numbers=numbers)


class Own(dspy.Module):
    def __init__(self):
        super().__init__()
        self.ask, self.steps = ASK, STEPS["last"]

    def forward(self, numbers):
        return self.ask(numbers=numbers)


class FromGlobal(Own):
    def forward(self, numbers):
        return ASK(numbers=numbers)


class FromContainer(Own):
    def forward(self, numbers):
        return self.inner(numbers)

    def inner(self, numbers):
        answers = [STEPS["last"][0](numbers=n) for n in [numbers]]
        return answers[0]


class FromFunction(Own):
    def forward(self, numbers):
        return through_a_function(numbers)


class FromClass(Own):
    @property
    def first(self):
        return Registry.asks["a"]

    def forward(self, numbers):
        return self.first(numbers=numbers)


class FromDefault(Own):
    def forward(self, numbers, ask=ASK):
        return ask(numbers=numbers)


class WithLambda(Own):
    def __init__(self):
        super().__init__()
        self.go = lambda numbers: STEPS["last"][0](numbers=numbers)

    def forward(self, numbers):
        return self.go(numbers)


class FromBase(FromGlobal):
    def forward(self, numbers):
        return super().forward(numbers)


def from_an_enclosing_function():
    ask = says("Reverse the list.")

    class Enclosed(dspy.Module):
        def __init__(self):
            super().__init__()
            self.inner = Own()
            self.inner.ask = ask

        def forward(self, numbers):
            return ask(numbers=numbers)

    return Enclosed()


REFUSED = {
    FromGlobal: "FromGlobal.forward() reads the global variable ASK, which is or holds 'ask' of this program",
    FromContainer: "FromContainer.inner() reads the global variable STEPS, which is or holds 'steps[0]'",
    FromFunction: "through_a_function() reads the global variable ASK, which is or holds 'ask' of this program",
    FromClass: "FromClass.first() reads the global variable Registry.asks, which is or holds 'ask' of this program",
    FromDefault: "FromDefault.forward() reads the default of an argument, which is or holds 'ask' of this program",
    WithLambda: "the function at go reads the global variable STEPS, which is or holds 'steps[0]' of this program",
    FromBase: "FromGlobal.forward() reads the global variable ASK, which is or holds 'ask' of this program",
    from_an_enclosing_function: "Enclosed.forward() reads the enclosing function's variable ask, which is or holds",
}


@pytest.mark.parametrize(("make", "message"), REFUSED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_program_s_predictor_that_is_read_past_it_is_refused_before_any_work(tmp_path, make, message):
    with dspy.context(lm=lab_policy()), pytest.raises(ConfigurationError) as refused:
        compile_short(make(), tmp_path)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


class OnClass(dspy.Module):
    more: ClassVar[list[dspy.Predict]] = [says("Drop the last number.")]

    def __init__(self):
        super().__init__()
        self.ask = says("Reverse the list.")

    def forward(self, numbers):
        return self.more[0](numbers=self.ask(numbers=numbers).answer)


class OnModule(OnClass):
    def forward(self, numbers):
        return OTHER(numbers=self.ask(numbers=numbers).answer)


class Late(OnClass):
    @functools.cached_property
    def made(self):
        return says("Drop the last number.")

    def forward(self, numbers):
        return self.made(numbers=self.ask(numbers=numbers).answer)


@pytest.mark.parametrize(
    ("kind", "place"),
    [(OnClass, "class attribute OnClass.more[0]"), (OnModule, "global variable OTHER"), (Late, None)],
    ids=["class", "global", "made late"],
)
def test_other_predictors_of_the_policy_are_told_before_the_start(tmp_path, kind, place):
    told = []
    with dspy.context(lm=lab_policy()):
        run = run_watched(kind(), tmp_path / "run", method="rl", listeners=[lambda e: told.append(e.get("text", ""))])
    told = told[: next(index for index, text in enumerate(told) if text.startswith("slow:"))]
    named = f"student: 1 predictor at {place!r} cannot be seen by DSPy's named_predictors()"
    assert any(named in text for text in told) == (place is not None)
    assert any(
        "4 of 8 calls of the first rollouts were made by predictors that the program does not" in x for x in told
    )
    assert {call.predictor for call in run.calls} == {"ask", ""}


class Overridden(FromGlobal):
    def forward(self, numbers):
        return self.ask(numbers=numbers)


class Careful(OnClass):
    """Reads a judge with an LM of its own; takes up a global predictor; has its attribute under a class's name."""

    more = (ASK,)
    unread = STEPS

    def __init__(self):
        super().__init__()
        self.take_up()
        self.more = [self.ask]

    def take_up(self):
        self.ask = ASK

    def unused(self, numbers):
        return ASK(numbers=numbers)

    def forward(self, numbers):
        assert TRAINSET
        assert dspy.settings.lm
        assert JUDGE.lm
        return self.more[0](numbers=numbers)


JUDGE = dspy.Predict("numbers -> score")
JUDGE.lm = dspy.LM("openai/judge", api_key="none")


def test_what_the_code_of_a_rollout_does_not_read_is_neither_refused_nor_told(tmp_path):
    assert copy_faults(Own()) == copy_faults(Careful()) == copy_faults(Overridden()) == []
    told = []
    with dspy.context(lm=lab_policy()):
        run_watched(Careful(), tmp_path / "run", method="rl", listeners=[lambda e: told.append(e.get("text", ""))])
    assert not [text for text in told if "predictor" in text]


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_run_inside_of_a_mode_without_gradients_learns(tmp_path, mode):
    reports = []
    for name, context in [("plain", torch.enable_grad()), (mode, getattr(torch, mode)())]:
        with dspy.context(lm=lab_policy()), context:
            run = run_watched(Own(), tmp_path / name, method="rl")
        reports.append(run.reports("step")[0]["update"])
    assert reports[0] == reports[1]
    assert reports[0]["grad_norm"] > 0
