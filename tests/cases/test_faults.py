"""Whose fault a failure is, on more ways: outages in tasks and pools, over HTTP clients; judges; hidden odd numbers."""

import asyncio
import contextvars
from multiprocessing.pool import ThreadPool

import dspy
import httpx
import pydantic
import pytest
from dspy.utils.exceptions import LMRateLimitError

from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Problem
from tests.cases.test_measured import FAILURE, Asks, FrozenLM, frozen, only_solve, play
from tests.fakes import fields, scripted_policy

LIMIT = "frozen lm: LMRateLimitError"


class BusyLM(FrozenLM):
    """Is busy whenever it is asked."""

    def said(self):
        raise LMRateLimitError("429")

    async def acall(self, prompt=None, messages=None, **kwargs):
        await asyncio.sleep(0)
        return self.said()


class Helped(dspy.Module):
    """Asks the policy, then a helper that is busy, on one of the ways below."""

    def __init__(self, way):
        super().__init__()
        self.solve, self.helper, self.way = dspy.Predict("question -> answer"), frozen(), way
        self.helper.lm = BusyLM()

    def forward(self, question):
        said = self.solve(question=question)
        return self.way(self, said)


def gathered(*asked):
    """What came back without an exception, as programs pick it."""

    async def gather():
        return await asyncio.gather(*(ask() for ask in asked), return_exceptions=True)

    return [one for one in asyncio.run(gather()) if not isinstance(one, Exception)]


def predict(program, said):
    return gathered(lambda: program.helper.acall(hint="h"))[0]


def own_coroutine(program, said):
    async def one():
        try:
            return await program.helper.acall(hint="h")
        finally:
            said.get("answer")

    return gathered(one, one)[0]


def to_thread(program, said):
    return gathered(lambda: asyncio.to_thread(program.helper, hint="h"))[0]


def own_to_thread(program, said):
    async def one():
        found = await asyncio.to_thread(program.helper, hint="h")
        return found.help

    return gathered(one)[0]


def asyncified(program, said):
    return gathered(lambda: dspy.asyncify(program.helper)(hint="h"))[0]


def waits_a_while(program, said):
    return gathered(lambda: asyncio.wait_for(program.helper.acall(hint="h"), 5))[0]


def task_group(program, said):
    async def both():
        async with asyncio.TaskGroup() as group:
            task = group.create_task(program.helper.acall(hint="h"))
        return task.result()

    return asyncio.run(both())


def pool(program, said):
    context = contextvars.copy_context()
    with ThreadPool(1) as threads:
        asked = threads.apply_async(lambda: context.run(program.helper, hint="h"))
        asked.wait()
        return asked.get() if asked.successful() else {}["help"]


def own_wrapped(program, said):
    async def one():
        try:
            return await program.helper.acall(hint="h")
        except LMRateLimitError as error:
            raise RuntimeError("no help") from error

    return gathered(one)[0]


def raises_its_own(program, said):
    try:
        return program.helper(hint="h")
    except Exception:
        raise ValueError("no help")  # noqa: B904 - as programs do


@pytest.mark.parametrize(
    "way",
    [
        predict,
        own_coroutine,
        to_thread,
        own_to_thread,
        asyncified,
        waits_a_while,
        task_group,
        pool,
        own_wrapped,
        raises_its_own,
    ],
)
def test_an_outage_masks_on_whatever_way_it_was_asked(way):
    rollout = play(only_solve(Helped(way)), lm=False)
    assert (rollout.reward, rollout.mask) == (None, LIMIT)


def tries_again(program, said):
    async def one():
        try:
            return await program.helper.acall(hint="h")
        except Exception:
            return said

    return {}[gathered(one)[0].answer]


def asks_otherwise(program, said):
    try:
        return program.helper(hint="h")
    except Exception:
        return int(said.answer + " apples")


def raises_to_its_caller(program, said):
    async def one():
        return await program.helper.acall(hint="h")

    try:
        asyncio.run(one())
    except Exception:
        said.get("answer")
    return {}[said.answer]


@pytest.mark.parametrize(
    ("way", "failure"), [(tries_again, "KeyError"), (asks_otherwise, "ValueError"), (raises_to_its_caller, "KeyError")]
)
def test_what_comes_after_an_outage_that_was_taken_up_is_measured(way, failure):
    rollout = play(only_solve(Helped(way)), lm=False)
    assert (rollout.reward, rollout.failure) == (FAILURE, failure)


def answered(status):
    request = httpx.Request("GET", "http://search.test")
    response = httpx.Response(status, request=request)
    return httpx.HTTPStatusError(str(status), request=request, response=response)


class OpenAIStyleError(Exception):
    """As openai and litellm raise it."""

    def __init__(self, status):
        super().__init__(str(status))
        self.status_code = status


def raising(error):
    def after(said):
        raise error

    return Asks(after)


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError("down"), httpx.ReadTimeout("slow"), answered(503), answered(429), OpenAIStyleError(500)],
    ids=repr,
)
def test_a_server_that_is_gone_busy_or_broken_masks(error):
    rollout = play(raising(error))
    assert (rollout.reward, rollout.mask) == (None, f"outage: {type(error).__name__}")


@pytest.mark.parametrize("error", [answered(404), OpenAIStyleError(400), httpx.UnsupportedProtocol("ask://")], ids=repr)
def test_a_request_that_is_wrong_is_the_policy_s_failure(error):
    rollout = play(raising(error))
    assert (rollout.reward, rollout.failure) == (FAILURE, type(error).__name__)


# ---- judges ------------------------------------------------------------------------------------

SET = [dspy.Example(question=f"q{i}", answer=str(i)).with_inputs("question") for i in range(4)]


class Judge(FrozenLM):
    """Knows the answers of the set, and says "unsure" of any other."""

    def __call__(self, prompt=None, messages=None, **kwargs):
        given = messages[-1]["content"].split("[[ ## given ## ]]")[1].split("\n")[1]
        return [fields(verdict="1.0" if given in "0123" else "unsure")]


def over_the_set(metric, written, signature="question -> answer"):
    program = Asks(signature=signature)
    policy, _ = scripted_policy(lambda m, s: fields(answer=written), version="step-000000")
    program.set_lm(policy)
    with dspy.context(lm=policy):
        rollouter = Rollouter(program, Reward(metric, peers=SET), RolloutSettings(num_threads=1, failure_score=FAILURE))
        return rollouter.rollout([Task(Problem(0, SET[0]), read_texts(program))], "test")[0]


def test_a_verdict_that_cannot_be_read_is_the_judge_s_fault():
    judge = dspy.Predict("given -> verdict")
    judge.lm = Judge()

    def judged(gold, pred, trace=None):
        return float(judge(given=pred.answer).verdict)

    assert over_the_set(judged, "2").reward == 1.0
    rollout = over_the_set(judged, "nine")
    assert (rollout.reward, rollout.mask, rollout.failure) == (None, "metric raised ValueError", None)


def test_an_answer_that_cannot_be_read_stays_the_policy_s_fault():
    rollout = over_the_set(lambda gold, pred, trace=None: float(float(pred.answer) == float(gold.answer)), "nine")
    assert (rollout.reward, rollout.mask) == (FAILURE, None)


# ---- numbers that are not finite where they are not looked for ---------------------------------


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")


HIDDEN = {
    "a nested prediction": (lambda v: [dspy.Prediction(v=v)], lambda hidden: hidden[0].v),
    "a nested example": (lambda v: dspy.Example(v=v), lambda hidden: hidden.v),
    "an extra of pydantic": (lambda v: Open(v=v), lambda hidden: hidden.v),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("score", [abs, round])
def test_a_hidden_number_that_is_not_finite_is_the_policy_s_failure(name, score):
    hide, seek = HIDDEN[name]
    program = Asks(lambda said: dspy.Prediction(answer=said.answer, hidden=hide(float("inf"))))
    rollout = play(program, metric=lambda gold, pred, trace=None: score(seek(pred.hidden)))
    assert (rollout.reward, rollout.failure) == (FAILURE, "not finite")


@pytest.mark.parametrize("written", ["nan", "inf", "-Infinity", "1e400"])
@pytest.mark.parametrize("score", [lambda v: -abs(v - 1.0), lambda v: 1.0 / (1 + int(v))])
def test_a_text_that_float_reads_as_no_finite_number_is_the_policy_s_failure(written, score):
    gold = dspy.Example(question="q1", target=1.0).with_inputs("question")
    told = Asks(lambda said: dspy.Prediction(answer=f" {said.answer} "))
    metric = lambda gold, pred, trace=None: score(float(pred.answer))  # noqa: E731
    rollout = play(told, speak=lambda m, s: fields(answer=written), metric=metric, example=gold)
    assert (rollout.reward, rollout.failure) == (FAILURE, "not finite")


def test_a_text_that_merely_looks_like_a_number_is_scored_as_the_metric_says():
    rollout = play(Asks(), speak=lambda m, s: fields(answer="nan"), metric=lambda gold, pred, trace=None: 0.5)
    assert (rollout.reward, rollout.failure) == (0.5, None)
