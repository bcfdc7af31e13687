"""What is measured is what the program and the policy did: judges, outages and odd values on a scripted policy."""

import asyncio
import threading
import time

import dspy
import pydantic
import pytest
from dspy.utils import DummyLM
from dspy.utils.exceptions import LMRateLimitError

from dspy_fst.errors import EngineError
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import PREDICTOR_TAG, Problem
from tests.fakes import fields, scripted_policy

GOLD = dspy.Example(question="q1", answer="1").with_inputs("question")
FAILURE, FORMAT = -1.0, -2.0


def says_one(messages, seed):
    return fields(answer="1")


def right(gold, pred, trace=None):
    return float(pred.answer == gold.answer)


def play(program, speak=says_one, metric=right, example=GOLD, lm=True, asks_again=False):
    """One rollout of a program over a scripted policy, and that policy."""
    policy, _ = scripted_policy(speak, version="step-000000")
    policy.use_json_adapter_fallback = asks_again
    if lm:
        program.set_lm(policy)
    settings = RolloutSettings(num_threads=2, failure_score=FAILURE, format_failure_score=FORMAT, rollout_timeout_s=60)
    with dspy.context(lm=policy):
        rollouter = Rollouter(program, Reward(metric), settings)
        return rollouter.rollout([Task(Problem(0, example), read_texts(program))], "test")[0]


class FrozenLM(dspy.LM):
    """Does what it is told for each call in turn: raises an exception, or says a text."""

    def __init__(self, *acts):
        super().__init__("frozen/lm", cache=False)
        self.acts = iter(acts)
        self.lock = threading.Lock()

    def forward(self, prompt=None, messages=None, **kwargs):
        raise AssertionError("not used")

    def __call__(self, prompt=None, messages=None, **kwargs):
        return self.said()

    def said(self):
        with self.lock:
            act = next(self.acts)
        if isinstance(act, Exception):
            raise act
        return [act]

    def __deepcopy__(self, memo):
        return self


class Asks(dspy.Module):
    """One predictor; ``after`` says what becomes of its answer."""

    def __init__(self, after=lambda pred: pred, signature="question -> answer"):
        super().__init__()
        self.solve, self.after = dspy.Predict(signature), after

    def forward(self, question):
        return self.after(self.solve(question=question))


# ---- a metric that asks a judge ----------------------------------------------------------------


class Judging:
    """A metric with a judge of its own; keeps the traces that it was given."""

    def __init__(self, lm=None):
        self.judge = dspy.ChainOfThought("question, gold_answer, given_answer -> verdict: float")
        self.judge.set_lm(lm)
        self.traces = []

    def __call__(self, gold, pred, trace=None, pred_name=None, pred_trace=None):
        self.traces.append(list(trace))
        verdict = self.judge(question=gold.question, gold_answer=gold.answer, given_answer=pred.answer).verdict
        return dspy.Prediction(score=float(verdict), feedback="judged")


def test_what_a_judge_was_asked_is_in_no_trace():
    metric = Judging(DummyLM([{"reasoning": "r", "verdict": "0.5"}] * 9))
    rollout = play(Asks(), metric=metric)
    assert rollout.reward == 0.5
    assert [getattr(predictor, PREDICTOR_TAG, "?") for predictor, _, _ in rollout.trace] == ["solve"]
    outer = []
    with dspy.context(trace=outer):  # as in a search, whose second call is for a predictor
        finished = list(rollout.trace)
        Reward(metric)(GOLD, rollout.prediction, finished, "solve", finished)
        Reward(metric)(GOLD, rollout.prediction, finished, "solve", finished)
    assert outer == []
    assert [len(trace) for trace in metric.traces] == [1, 1, 1]


def test_a_judge_that_is_the_policy_is_no_call_of_the_program_and_draws_the_same_when_played_again():
    seeds = []

    def speak(messages, seed):
        if "gold_answer" in messages[0]["content"]:
            seeds.append(seed)
            return fields(reasoning="r", verdict="0.25")
        return fields(answer="1")

    rollouts = [play(Asks(), speak=speak, metric=Judging()) for _ in range(2)]
    assert [rollout.reward for rollout in rollouts] == [0.25, 0.25]
    assert [[call.predictor for call in rollout.calls] for rollout in rollouts] == [["solve"], ["solve"]]
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize(
    ("asks_again", "measured"), [(True, (0.75, None)), (False, (None, "metric raised AdapterParseError"))]
)
def test_a_judge_that_is_the_policy_asks_as_it_does_outside_of_a_rollout(asks_again, measured):
    def speak(messages, seed):
        if "gold_answer" not in messages[0]["content"]:
            return fields(answer="1")
        return '{"reasoning": "r", "verdict": 0.75}'  # ChatAdapter cannot read it, its second call can

    rollout = play(Asks(), speak=speak, metric=Judging(), asks_again=asks_again)
    assert (rollout.reward, rollout.mask) == measured
    assert len(rollout.calls) == 1


def test_a_metric_cannot_change_the_run_s_trace():
    def clears(gold, pred, trace=None):
        trace.clear()
        return 1.0

    assert len(play(Asks(), metric=clears).trace) == 1


# ---- outages -----------------------------------------------------------------------------------

BUSY = LMRateLimitError("429")


class Fan(dspy.Module):
    """Asks the policy, then two helpers at once; what comes back is read without looking."""

    def __init__(self, helper, **options):
        super().__init__()
        self.solve, self.helper, self.options = dspy.Predict("question -> answer"), helper, options

    def forward(self, question):
        answer = self.solve(question=question).answer
        ask = dspy.Parallel(num_threads=2, disable_progress_bar=True, **self.options)
        helped = ask([(self.helper, {"hint": str(i)}) for i in range(2)])
        return dspy.Prediction(answer=answer, help=[one.help for one in helped])


class Tool(dspy.Module):
    """Speaks with no LM and is gone, as the socket says or as a client wraps it."""

    def __init__(self, wraps):
        super().__init__()
        self.wraps = wraps

    def forward(self, hint):
        try:
            raise ConnectionRefusedError("refused")
        except ConnectionRefusedError as error:
            if self.wraps:
                raise WrappedError("no route") from error
            raise


def frozen(*acts):
    helper = dspy.Predict("hint -> help")
    helper.lm = FrozenLM(*acts)
    return helper


class WrappedError(Exception):
    """As httpx wraps what the socket said."""


def only_solve(program):
    program.solve.lm = scripted_policy(says_one, version="step-000000")[0]
    return program


OUTAGES = {
    "a frozen LM's 429": (lambda: Fan(frozen(fields(help="h"), BUSY)), "frozen lm: LMRateLimitError"),
    "a frozen LM that does not parse": (lambda: Fan(frozen("?", "?", "?", "?")), "frozen lm: AdapterParseError"),
    "a tool": (lambda: Fan(Tool(wraps=False)), "outage: ConnectionRefusedError"),
    "a tool whose client wraps it": (lambda: Fan(Tool(wraps=True)), "outage: ConnectionRefusedError"),
}


@pytest.mark.parametrize("name", OUTAGES)
def test_an_outage_that_parallel_swallows_masks(name):
    make, mask = OUTAGES[name]
    rollout = play(only_solve(make()), lm=False)
    assert (rollout.reward, rollout.mask) == (None, mask)


class Votes(dspy.Module):
    """Asks the policy the same three times at once."""

    def __init__(self):
        super().__init__()
        self.solve = dspy.Predict("question -> answer")

    def forward(self, question):
        ask = dspy.Parallel(num_threads=1, disable_progress_bar=True)
        said = ask([(self.solve, {"question": question})] * 3)
        return dspy.Prediction(answer=max(one.answer for one in said))


def in_turn(*acts):
    left = iter(acts)

    def speak(messages, seed):
        act = next(left)
        if isinstance(act, Exception):
            raise act
        return act

    return speak


def test_an_engine_that_is_gone_in_parallel_masks_though_other_calls_answered():
    ok = fields(answer="1")
    rollout = play(Votes(), speak=in_turn(ok, EngineError("gone"), ok))
    assert (rollout.reward, rollout.mask) == (None, "lm: EngineError")


def test_a_reply_in_parallel_that_does_not_parse_is_a_format_failure():
    ok = fields(answer="1")
    rollout = play(Votes(), speak=in_turn(ok, "nonsense", ok))
    assert (rollout.reward, rollout.failure, rollout.failed_in) == (FORMAT, "parse", "solve")
    assert len(rollout.calls) == 3


@pytest.mark.parametrize("kind", [dspy.BestOfN, dspy.Refine])
@pytest.mark.parametrize("tries", [1, 2, 4])
def test_no_prediction_because_the_engine_is_down_masks(kind, tries):
    best = kind(dspy.Predict("question -> answer"), N=tries, reward_fn=lambda inputs, pred: 1.0, threshold=1.0)
    rollout = play(best, speak=in_turn(*[EngineError("gone")] * 9))
    assert (rollout.reward, rollout.mask) == (None, "lm: EngineError")


def test_no_prediction_because_nothing_parsed_is_the_policy_s_failure():
    best = dspy.BestOfN(dspy.Predict("question -> answer"), N=2, reward_fn=lambda inputs, pred: 1.0, threshold=1.0)
    rollout = play(best, speak=in_turn(*["nonsense"] * 9))
    assert (rollout.reward, rollout.failure) == (FORMAT, "parse")


class Recovers(dspy.Module):
    """Asks a helper again when it is busy, then trips over the policy's answer."""

    def __init__(self, trips):
        super().__init__()
        self.solve, self.helper = dspy.Predict("question -> answer"), frozen(BUSY, fields(help="h"))
        self.trips = trips

    def forward(self, question):
        try:
            self.helper(hint="h")
        except LMRateLimitError:
            self.helper(hint="h")
        said = self.solve(question=question)
        return {}[said.answer] if self.trips else said


@pytest.mark.parametrize(("trips", "reward", "failure"), [(False, 1.0, None), (True, FAILURE, "KeyError")])
def test_a_program_that_asks_again_after_an_outage_is_measured(trips, reward, failure):
    rollout = play(only_solve(Recovers(trips)), lm=False)
    assert (rollout.reward, rollout.failure, rollout.mask) == (reward, failure, None)


def test_a_later_try_of_best_of_n_makes_an_outage_good():
    best = dspy.BestOfN(dspy.Predict("question -> answer"), N=2, reward_fn=lambda inputs, pred: 1.0, threshold=1.0)

    class Trips(dspy.Module):
        def __init__(self):
            super().__init__()
            self.best = best

        def forward(self, question):
            return {}[self.best(question=question).answer]

    rollout = play(Trips(), speak=in_turn(EngineError("gone"), fields(answer="1")))
    assert (rollout.reward, rollout.failure) == (FAILURE, "KeyError")


def test_an_agent_that_is_told_of_a_tool_s_outage_goes_on():
    def search(query: str) -> str:
        raise ConnectionError("down")

    steps = in_turn(
        fields(next_thought="t", next_tool_name="search", next_tool_args='{"query": "x"}'),
        fields(next_thought="t", next_tool_name="finish", next_tool_args="{}"),
        fields(reasoning="r", answer="1"),
    )
    rollout = play(dspy.ReAct("question -> answer", tools=[search]), speak=steps)
    assert (rollout.reward, rollout.mask) == (1.0, None)


# ---- stragglers --------------------------------------------------------------------------------


def test_a_slow_call_in_parallel_is_not_asked_again():
    asked = []

    def slow(messages, seed):
        asked.append(seed)
        if len(asked) == 1:
            time.sleep(2.5)
        return fields(answer="1")

    class Pair(dspy.Module):
        def __init__(self):
            super().__init__()
            self.solve = dspy.Predict("question -> answer")

        def forward(self, question):
            ask = dspy.Parallel(num_threads=2, disable_progress_bar=True, timeout=1)
            return ask([(self.solve, {"question": f"{question} {i}"}) for i in range(2)])[0]

    rollout = play(Pair(), speak=slow)
    assert rollout.reward == 1.0
    assert len(rollout.calls) == len(asked) == 2


# ---- what the policy writes --------------------------------------------------------------------

NUMBER = dspy.Example(question="q1", answer=2.0).with_inputs("question")


def close(gold, pred, trace=None):
    return 1.0 / (1.0 + abs(gold.answer - pred.answer)) if pred.answer == pred.answer else pred.answer


def rounded(gold, pred, trace=None):
    return float(round(pred.answer) == round(gold.answer))


def negative(gold, pred, trace=None):
    return -abs(gold.answer - pred.answer)


@pytest.mark.parametrize("metric", [negative, rounded])
@pytest.mark.parametrize("written", ["nan", "inf", "-inf", "1e400"])
def test_a_number_that_is_not_finite_is_the_policy_s_failure(written, metric):
    program = Asks(signature="question -> answer: float")
    rollout = play(program, speak=lambda m, s: fields(answer=written), metric=metric, example=NUMBER)
    assert (rollout.reward, rollout.failure) == (FAILURE, "not finite")
    assert "answer" in rollout.feedback


class Point(pydantic.BaseModel):
    x: float
    others: list[float] = []


def test_it_is_found_in_nested_values():
    class Places(dspy.Signature):
        question: str = dspy.InputField()
        places: list[Point] = dspy.OutputField()

    reply = fields(places='[{"x": 1, "others": [2, "1e400"]}]')
    rollout = play(
        Asks(signature=Places),
        speak=lambda m, s: reply,
        metric=lambda gold, pred, trace=None: sum(pred.places[0].others),
    )
    assert (rollout.reward, rollout.failure) == (FAILURE, "not finite")
    assert "places.0.others.1 = inf" in rollout.feedback


def test_a_score_that_is_not_finite_by_the_metric_s_own_doing_masks():
    rollout = play(Asks(), metric=lambda gold, pred, trace=None: float("nan"))
    assert rollout.mask == "metric returned nan"


def test_an_infinite_answer_that_the_label_has_too_is_not_the_policy_s_failure():
    gold = dspy.Example(question="q1", answer=float("inf")).with_inputs("question")
    program = Asks(signature="question -> answer: float")
    rollout = play(program, speak=lambda m, s: fields(answer="inf"), metric=negative, example=gold)
    assert rollout.mask == "metric returned nan"


class Gathers(Asks):
    """Asks a tool in a task, keeps its exception, and reads the result without looking."""

    async def ask_tool(self, question):
        raise ConnectionError("down")

    async def both(self, question):
        return await asyncio.gather(self.ask_tool(question), return_exceptions=True)

    def forward(self, question):
        said = self.solve(question=question)
        (found,) = asyncio.run(self.both(question))
        return dspy.Prediction(answer=said.answer, found=found.text)


class TooMany(Votes):
    """dspy.Parallel gives up after its first error."""

    def forward(self, question):
        with dspy.context(max_errors=1):
            return super().forward(question)


def test_an_exception_that_is_read_as_a_result_masks():
    rollout = play(Gathers())
    assert (rollout.reward, rollout.mask) == (None, "outage: ConnectionError")


def test_a_parallel_that_gives_up_because_of_an_outage_masks():
    rollout = play(TooMany(), speak=in_turn(fields(answer="1"), EngineError("gone"), fields(answer="1")))
    assert (rollout.reward, rollout.mask) == (None, "lm: EngineError")
