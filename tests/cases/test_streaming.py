"""dspy.streamify on programs that speak with a PolicyLM. On a real vLLM server: tests/engine/test_vllm_server.py."""

import asyncio
import json
import threading
from contextlib import suppress

import dspy
import pytest
from dspy.streaming import StreamListener, StreamResponse
from dspy.utils.exceptions import AdapterParseError

from dspy_fst import PolicyLM
from dspy_fst.engine.base import Completion
from dspy_fst.rollout.chat_adapters import keep
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Problem
from programs.lab import BASE
from tests.fakes import ScriptedEngine, fields, scripted_policy
from tests.pipelines.watched import lab_policy, says

ANSWER = "first this, then that"
REPLIES = {
    "ChatAdapter": fields(plan="think", answer=ANSWER),
    "JSONAdapter": json.dumps({"plan": "think", "answer": ANSWER}),
    "XMLAdapter": f"<plan>\nthink\n</plan>\n\n<answer>\n{ANSWER}\n</answer>",
}
ADAPTERS = {"ChatAdapter": dspy.ChatAdapter, "JSONAdapter": dspy.JSONAdapter, "XMLAdapter": dspy.XMLAdapter}


class StreamingScript(ScriptedEngine):
    """Tells a reply four characters at a time; ``heard`` are the pieces that somebody took."""

    def __init__(self, speak):
        super().__init__(speak)
        self.heard = []

    def stream(self, request, seed):
        completion: Completion = self.complete(request, seed)
        text = completion.response.message.text
        for at in range(0, len(text), 4):
            self.heard.append(text[at : at + 4])
            yield text[at : at + 4]
        return completion


def program_over(reply, engine=StreamingScript):
    program = (
        dspy.ChainOfThought("question -> plan, answer") if callable(reply) else dspy.Predict("question -> plan, answer")
    )
    policy, plain = scripted_policy(lambda messages, seed: reply)
    scripted = engine(plain.speak)
    scripted.version = plain.version
    policy.handle._make = lambda: scripted
    program.set_lm(policy)
    return program, scripted


async def gathered(stream):
    return [item async for item in stream]


def heard(program, *, async_streaming=True, is_async=False, fields=("answer",), **inputs):
    """Everything that dspy.streamify gives for one call."""
    listeners = [StreamListener(name) for name in fields]
    ask = dspy.streamify(
        program, stream_listeners=listeners, async_streaming=async_streaming, is_async_program=is_async
    )
    inputs = inputs or {"question": "what now?"}
    return asyncio.run(gathered(ask(**inputs))) if async_streaming else list(ask(**inputs))


@pytest.mark.parametrize("engine", [StreamingScript, ScriptedEngine], ids=["in pieces", "whole"])
@pytest.mark.parametrize("async_streaming", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("adapter", sorted(REPLIES))
def test_a_listener_hears_its_field_in_pieces(adapter, is_async, async_streaming, engine):
    program, _ = program_over(REPLIES[adapter], engine)
    with dspy.context(adapter=ADAPTERS[adapter]()):
        told = heard(program, async_streaming=async_streaming, is_async=is_async)
    *pieces, prediction = told
    assert all(isinstance(piece, StreamResponse) for piece in pieces)
    assert len(pieces) > 2
    said = "".join(piece.chunk for piece in pieces)
    assert said.strip('"') == ANSWER  # DSPy's listener to JSON tells the quotes, too
    assert prediction.answer == ANSWER


@pytest.mark.parametrize("adapter", sorted(REPLIES))
def test_a_listener_hears_a_program_that_keeps_another_adapter_than_the_one_that_dspy_is_set_to(adapter):
    program, _ = program_over(REPLIES[adapter])
    keep(program, ADAPTERS[adapter]())
    *pieces, prediction = heard(program)
    assert len(pieces) > 2
    assert "".join(piece.chunk for piece in pieces).strip('"') == ANSWER
    assert prediction.answer == ANSWER


def test_without_listeners_every_piece_of_text_is_told():
    program, _ = program_over(REPLIES["ChatAdapter"])
    *chunks, prediction = heard(program, fields=())
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == REPLIES["ChatAdapter"]
    assert prediction.answer == ANSWER


def test_pieces_arrive_while_the_model_still_speaks():
    program, engine = program_over(REPLIES["ChatAdapter"])
    stream = dspy.streamify(program, async_streaming=False)(question="what now?")
    next(stream)
    # DSPy's channel holds 16 pieces; the engine has not been read to its end.
    assert len(engine.heard) < len(REPLIES["ChatAdapter"]) // 4
    assert list(stream)[-1].answer == ANSWER


@pytest.mark.parametrize("reply", [*REPLIES.values(), " 1,\n\t2 ", "", '"', "é\u2028 [[ ##"])
def test_the_pieces_of_a_reply_that_came_whole_make_up_the_reply(reply):
    policy, _ = scripted_policy(lambda messages, seed: reply)
    request = dspy.lm15.Request(model=policy.model, messages=(dspy.lm15.Message.user("hello"),))
    told = list(policy.handle.stream(request))
    assert [told[0].type, told[-1].type] == ["start", "end"]
    assert "".join(event.delta.text for event in told[1:-1]) == reply
    assert len(told) > 4 or len(reply.split()) < 3


ANSWERS = ["3", "x.", "3 1 2", "He said: no!", "a\nb", 'with "marks", and {more}', "an_underscore [1]"]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("order", [("plan", "answer"), ("answer", "plan")], ids=["last", "first"])
@pytest.mark.parametrize("adapter", sorted(REPLIES))
def test_a_listener_hears_exactly_its_field_of_a_reply_that_came_whole(adapter, order, answer):
    values = {name: {"plan": "think", "answer": answer}[name] for name in order}
    xml = "\n\n".join(f"<{name}>\n{value}\n</{name}>" for name, value in values.items())
    forms = {
        "ChatAdapter": [fields(**values), fields(**values).removesuffix("[[ ## completed ## ]]").rstrip()],
        "JSONAdapter": [json.dumps(values), json.dumps(values, indent=2), json.dumps(values, separators=(",", ":"))],
        "XMLAdapter": [xml, xml.replace("\n\n", "")],
    }
    for reply in forms[adapter]:
        program, _ = program_over(reply, ScriptedEngine)
        with dspy.context(adapter=ADAPTERS[adapter]()):
            *pieces, prediction = heard(program)
        said = "".join(piece.chunk for piece in pieces)
        if adapter == "JSONAdapter":
            # DSPy's listener tells the value as JSON, and of a field that is not the last one also `, "`.
            rest = said
            said, length = json.JSONDecoder().raw_decode(rest)
            assert "".join(rest[length:].split()) in ("", ',"')
        assert said == prediction.answer == answer


def test_a_listener_hears_its_field_of_a_model_in_process():
    policy = lab_policy(temperature=0.5)
    program = says("Reverse the list.")
    program.set_lm(policy)
    *pieces, prediction = heard(program, numbers="1 2 3")
    policy.release()
    assert prediction.answer
    assert "".join(piece.chunk for piece in pieces) == prediction.answer


@pytest.mark.parametrize("is_async", [True, False])
def test_a_model_in_process_streams_at_least_one_piece(is_async):
    policy = PolicyLM(BASE, engine="in_process", max_tokens=16)
    program = dspy.Predict("numbers -> answer")
    program.set_lm(policy)
    ask = dspy.streamify(program, is_async_program=is_async)
    told = []

    async def listen():
        async for item in ask(numbers="3 1 2"):
            told.append(item)

    with suppress(AdapterParseError):  # the small model's business
        asyncio.run(listen())
    assert [item for item in told if getattr(item, "choices", None) and item.choices[0].delta.content]
    policy.release()


class Streams(dspy.Module):
    """A program that listens to a part of its own."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, question):
        return list(dspy.streamify(self.part, async_streaming=False)(question=question))[-1]


def test_a_call_that_is_streamed_inside_a_rollout_is_recorded_with_its_exact_tokens():
    part, engine = program_over(REPLIES["ChatAdapter"])
    program = Streams(part)
    rollouter = Rollouter(program, Reward(lambda gold, pred: float(pred.answer == ANSWER)), RolloutSettings())
    problem = Problem(0, dspy.Example(question="what now?").with_inputs("question"))
    (rollout,) = rollouter.rollout([Task(problem, read_texts(program))], "test")
    assert rollout.reward == 1.0
    (call,) = rollout.calls
    assert call.predictor == "part"
    assert "".join(map(chr, call.completion_ids)) == REPLIES["ChatAdapter"]
    assert call.logprobs == (-1.0,) * len(call.completion_ids)
    assert len(engine.heard) > 1


def test_one_lm_is_streamed_by_several_threads_at_once():
    said = {}

    def listen(number):
        program, _ = program_over(fields(plan="p", answer=f"answer {number}"))
        said[number] = heard(program, async_streaming=False)[-1].answer

    threads = [threading.Thread(target=listen, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert said == {number: f"answer {number}" for number in range(6)}


def test_a_listener_who_leaves_ends_the_reply():
    closed = threading.Event()

    class Watched(StreamingScript):
        def stream(self, request, seed):
            try:
                yield from super().stream(request, seed)
            except GeneratorExit:
                closed.set()
                raise

    program, _ = program_over(REPLIES["ChatAdapter"] * 30, Watched)
    policy = program.lm
    request = dspy.lm15.Request(model=policy.model, messages=(dspy.lm15.Message.user("hello"),))
    stream = policy.handle.stream(request)
    assert [next(stream).type for _ in range(3)] == ["start", "delta", "delta"]
    stream.close()
    assert closed.is_set()
