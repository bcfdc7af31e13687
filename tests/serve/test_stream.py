"""What is told while a program runs: tokens where the engine gives them, and never a finished text cut up."""

import asyncio
import threading

import dspy
import httpx
import pytest

from dspy_fst.serve.app import create_app
from dspy_fst.serve.events import EventStream
from dspy_fst.serve.serving_settings import ServeSettings
from tests.fakes import fields
from tests.serve.fake_vllm import FakeVLLM, behind
from tests.serve.makers import (
    AUTH,
    KEY,
    PATH,
    Hold,
    ask,
    asked,
    compiled,
    events,
    figures,
    question,
    served,
    wait_until,
)

STREAM = f"{PATH}/stream"


class TwoSteps(dspy.Module):
    def __init__(self):
        super().__init__()
        self.plan = dspy.Predict("question: str -> steps: list[str]")
        self.solve = dspy.Predict("question: str, steps: list[str] -> answer: str, sure: bool")

    def forward(self, question: str):
        steps = self.plan(question=question).steps
        return self.solve(question=question, steps=steps)


def speak(messages, seed):
    if "steps" in messages[-1]["content"].partition("Respond with")[0]:
        return fields(answer=f"the answer to {asked(messages, 'question')}", sure="True")
    return fields(steps='["one", "two"]')


RESULT = {"answer": "the answer to x", "sure": True}


@pytest.fixture
def two_steps():
    return compiled(speak, TwoSteps())[0]


def app_behind(program, **settings):
    return create_app(program, ServeSettings(api_key=KEY, **settings))


def test_in_process_each_module_s_outputs_are_told_when_it_has_finished_and_no_tokens(two_steps):
    told = events(ask(app_behind(two_steps), question("x"), STREAM).text)
    assert told[:3] == [
        ("start", {"tokens": False}),
        ("module", {"module": "plan", "outputs": {"steps": ["one", "two"]}}),
        ("module", {"module": "solve", "outputs": RESULT}),
    ]
    assert [name for name, _ in told] == ["start", "module", "module", "result"]
    assert told[3][1]["outputs"] == RESULT


def test_a_module_s_outputs_arrive_before_the_next_module_has_answered():
    hold = Hold()

    def slow_at_last(messages, seed):
        if "steps" in messages[-1]["content"].partition("Respond with")[0]:
            assert hold.free.wait(30)
        return speak(messages, seed)

    program, _ = compiled(slow_at_last, TwoSteps())
    with (
        served(app_behind(program)) as url,
        httpx.stream("POST", url + STREAM, json=question("x"), headers=AUTH, timeout=60) as reply,
    ):
        lines = reply.iter_lines()
        assert any("plan" in line for line in lines)
        hold.free.set()
        assert any("event: result" in line for line in lines)


def test_behind_a_server_the_last_module_s_fields_come_token_by_token(two_steps):
    fake = FakeVLLM(speak)
    with behind(two_steps, fake) as engine:
        app = app_behind(two_steps)
        told = events(ask(app, question("x"), STREAM).text)
    assert told[0] == ("start", {"tokens": True})
    pieces = [data for name, data in told if name == "delta"]
    assert {piece["module"] for piece in pieces} == {"solve"}
    assert "".join(piece["text"] for piece in pieces if piece["field"] == "answer") == RESULT["answer"]
    assert "".join(piece["text"] for piece in pieces if piece["field"] == "sure") == "True"
    assert len(pieces) > 3
    assert told[-1][1]["outputs"] == RESULT
    assert engine.whole_replies == 1  # of the module that nobody listens to
    meta = told[-1][1]["meta"]
    assert figures(app)['dspy_fst_tokens_total{kind="completion"}'] == meta["completion_tokens"]
    assert meta["completion_tokens"] > len(speak([{"content": "steps\n[[ ## question ## ]]\nx"}], 0))


def test_tokens_arrive_while_the_model_still_speaks(two_steps):
    fake, go_on = FakeVLLM(speak), threading.Event()
    fake.wait = lambda sent: sent < 12 or go_on.wait(30)
    with (
        behind(two_steps, fake),
        served(app_behind(two_steps)) as url,
        httpx.stream("POST", url + STREAM, json=question("x"), headers=AUTH, timeout=30) as reply,
    ):
        lines = reply.iter_lines()
        assert any("event: delta" in line for line in lines)
        assert not go_on.is_set()
        go_on.set()
        assert any("event: result" in line for line in lines)


def test_what_is_streamed_is_sampled_as_the_engine_samples(two_steps):
    fake = FakeVLLM(speak)
    with behind(two_steps, fake):
        app = app_behind(two_steps)
        first = events(ask(app, question("x", seed=5), STREAM).text)[-1][1]
        events(ask(app, question("x", seed=5), STREAM).text)
    one, again = fake.asked
    assert one == again
    assert one["model"] == "weights-of-the-server"
    assert (one["temperature"], one["max_tokens"]) == (1.0, 64)
    assert (one["top_p"], one["top_k"], one["min_p"], one["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
    assert first["meta"]["seed"] == 5


def test_a_caller_who_leaves_ends_the_reply_on_the_server_too(two_steps):
    fake, go_on = FakeVLLM(lambda messages, seed: speak(messages, seed) + "x" * 3000), threading.Event()
    fake.wait = lambda sent: sent < 12 or go_on.wait(0.01)
    with behind(two_steps, fake):
        app = app_behind(two_steps)
        with served(app) as url:
            with httpx.stream("POST", url + STREAM, json=question("x"), headers=AUTH, timeout=30) as reply:
                assert any("event: delta" in line for line in reply.iter_lines())
            wait_until(fake.cut.is_set, "the server behind has noticed")
            wait_until(lambda: app.state.service.queue.at_work() == 0, "the place is free")


def test_a_server_that_breaks_off_in_the_middle_ends_the_stream_with_an_error(two_steps):
    fake = FakeVLLM(speak)
    fake.break_after = 12
    with behind(two_steps, fake):
        app = app_behind(two_steps)
        told = events(ask(app, question("x"), STREAM).text)
    assert [name for name, _ in told][-1] == "error"
    assert told[-1][1]["error"]["code"] == "engine"
    assert len(fake.asked) == 1  # what a listener has heard is not asked for again
    assert figures(app)['dspy_fst_errors_total{type="engine"}'] == 1


def test_a_server_that_refuses_the_first_piece_is_asked_through_the_engine(two_steps):
    fake = FakeVLLM(speak)
    fake.answer = (500, {"error": {"message": "inside"}})
    with behind(two_steps, fake) as engine:
        told = events(ask(app_behind(two_steps), question("x"), STREAM).text)
    assert [name for name, _ in told] == ["start", "module", "module", "result"]
    assert told[-1][1]["outputs"] == RESULT
    assert engine.whole_replies == 2


def test_without_a_listener_the_engine_is_asked_as_ever(two_steps):
    fake = FakeVLLM(speak)
    with behind(two_steps, fake) as engine:
        assert ask(app_behind(two_steps), question("x")).json()["outputs"] == RESULT
        assert engine.whole_replies == 2
    assert fake.asked == []


def test_a_program_that_fails_ends_the_stream_with_an_error():
    program, _ = compiled(lambda messages, seed: "no fields")
    told = events(ask(app_behind(program), question("x"), STREAM).text)
    assert [name for name, _ in told] == ["start", "error"]
    assert told[1][1]["error"]["code"] == "reply_not_parsed"


def test_a_reply_that_was_heard_is_not_asked_for_again_in_json_also_where_the_program_may():
    def says(messages, seed):
        return '{"answer": "yes"}' if "JSON object" in messages[-1]["content"] else "no fields"

    program, _ = compiled(says)
    program.lm.use_json_adapter_fallback = True
    fake = FakeVLLM(says)
    with behind(program, fake) as engine:
        app = app_behind(program)
        told = events(ask(app, question("x"), STREAM).text)
        assert told[-1][1]["error"]["code"] == "reply_not_parsed"
        assert len(fake.asked) == 1
        assert ask(app, question("x")).json()["outputs"] == {"answer": "yes"}  # nobody heard the first reply
        assert engine.whole_replies == 2


def test_listeners_at_the_same_time_hear_their_own_answers(two_steps):
    fake = FakeVLLM(speak)
    with behind(two_steps, fake), served(app_behind(two_steps)) as url:
        heard = {}

        def listen(number):
            reply = httpx.post(url + STREAM, json=question(f"number {number}"), headers=AUTH, timeout=60)
            pieces = [data for name, data in events(reply.text) if name == "delta" and data["field"] == "answer"]
            heard[number] = "".join(piece["text"] for piece in pieces)

        threads = [threading.Thread(target=listen, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert heard == {number: f"the answer to number {number}" for number in range(16)}


def test_a_stream_s_source_is_closed_also_when_the_caller_reads_no_further():
    closed = []

    async def source():
        try:
            yield b"data: 1\n\n"
        finally:
            closed.append(True)

    async def hang(*arguments):
        await asyncio.sleep(60)

    async def give_up():
        held = source()
        task = asyncio.ensure_future(EventStream(held)({"type": "http", "asgi": {"spec_version": "2.4"}}, hang, send))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        assert closed == [True]

    async def send(message):
        if message["type"] == "http.response.body":
            await hang()

    asyncio.run(give_up())
