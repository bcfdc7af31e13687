"""The chat endpoint: OpenAI's shape over both engines, and nothing of the server behind it."""

import asyncio
import json
import shutil
import threading

import openai
import pytest
from dspy import lm15

from dspy_fst import PolicyLM
from dspy_fst.errors import EngineError
from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import CHAT, ServeSettings
from programs.lab import BASE
from tests.serve.fake_vllm import UPSTREAM_KEY, FakeVLLM, behind
from tests.serve.makers import AUTH, KEY, ask, client_of, compiled, events, figures, get, served, wait_until


def speak(messages, seed):
    return f"{messages[-1]['content']} ({len(messages)} messages)"


def chat(text="hello", **more):
    return {"model": "policy", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture
def program():
    return compiled(speak)[0]


@pytest.fixture
def app(program):
    return create_app(program, ServeSettings(api_key=KEY))


@pytest.fixture
def fake():
    return FakeVLLM(speak)


@pytest.fixture
def app_behind(program, fake):
    with behind(program, fake):
        yield create_app(program, ServeSettings(api_key=KEY, model_name="mine"))


# ---- in process ---------------------------------------------------------------------------------


def test_the_openai_client_gets_an_answer_in_process(app):
    with served(app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        assert [model.id for model in client.models.list()] == ["policy"]
        messages = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ]
        reply = client.chat.completions.create(
            model="policy", messages=messages, temperature=0.5, max_tokens=9, top_p=1
        )
        client.close()
    assert reply.choices[0].message.content == "hello (2 messages)"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert figures(app)['dspy_fst_tokens_total{kind="completion"}'] == reply.usage.completion_tokens


def test_the_same_seed_draws_the_same_reply_in_process():
    app = create_app(compiled(lambda messages, seed: str(seed))[0], ServeSettings(api_key=KEY))

    def said(**more):
        return ask(app, chat(**more), CHAT).json()["choices"][0]["message"]["content"]

    assert said(seed=4) == "4"
    assert said() != said()


@pytest.mark.parametrize(
    "more",
    [
        {"top_p": 0.5},
        {"stop": ["x"]},
        {"presence_penalty": 1},
        {"logprobs": True},
        {"tools": [{"type": "function", "function": {"name": "add"}}]},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_what_the_engine_in_process_would_silently_not_do_is_refused_by_name(app, more):
    reply = ask(app, chat(**more), CHAT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported")
    assert next(iter(more)) in reply.json()["error"]["message"]


def test_a_stream_in_process_tells_the_reply_when_it_is_whole(app):
    told = [data for _, data in events(ask(app, chat(stream=True), CHAT).text)]
    assert told[-1] == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in told[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "hello (1 messages)"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in told[:-1]] == [None, None, "stop"]
    assert len({chunk["id"] for chunk in told[:-1]}) == 1


def test_another_model_is_not_found(app):
    reply = ask(app, {**chat(), "model": "gpt-5"}, CHAT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"model": "policy", "messages": []},
        chat(n=2),
        chat(temperature=-1),
        chat(chat_template="{{ cycler.__init__ }}"),
        {
            "model": "policy",
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        },
    ],
)
def test_what_is_not_offered_is_refused(app, body):
    reply = ask(app, body, CHAT)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("error", "status", "type"),
    [
        (EngineError("secret-token-123"), 503, "engine"),
        (lm15.ContextLengthError("the prompt has 9 tokens"), 400, "context_length_exceeded"),
        (RuntimeError("secret-token-123"), 500, "internal"),
    ],
)
def test_a_failing_engine_is_told_in_openai_s_shape(error, status, type):
    def fail(messages, seed):
        raise error

    reply = ask(create_app(compiled(fail)[0], ServeSettings(api_key=KEY)), chat(), CHAT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, type)
    assert "secret-token-123" not in reply.text


def test_what_the_model_s_chat_template_refuses_is_the_caller_s_mistake_and_told_in_its_words(program, tmp_path):
    folder = shutil.copytree(BASE, tmp_path / "model")
    template = folder / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('Roles must alternate.') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    program.set_lm(PolicyLM(folder, engine="in_process", max_tokens=4))
    app = create_app(program, ServeSettings(api_key=KEY))
    with served(app):
        wait_until(lambda: get(app, "/ready").status_code == 200, "the engine serves weights")
        refused = ask(app, {**chat(), "messages": [{"role": "assistant", "content": "hello"}]}, CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")
        assert "Roles must alternate." in refused.json()["error"]["message"]
        assert ask(app, chat(), CHAT).status_code == 200


# ---- behind a server ----------------------------------------------------------------------------


def test_the_openai_client_streams_from_the_server_behind(app_behind, fake):
    with served(app_behind) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        stream = client.chat.completions.create(
            model="mine", messages=chat()["messages"], stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        client.close()
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "hello (1 messages)"
    assert len(chunks) > 4
    assert {chunk.model for chunk in chunks} == {"mine"}
    assert chunks[-1].usage.completion_tokens == len(text)
    assert figures(app_behind)['dspy_fst_tokens_total{kind="completion"}'] == len(text)


def test_usage_is_counted_and_not_sent_to_who_did_not_ask(app_behind):
    told = events(ask(app_behind, {**chat(), "model": "mine", "stream": True}, CHAT).text)
    assert told[-1] == ("message", "[DONE]")
    assert all("usage" not in data for _, data in told[:-1])
    assert figures(app_behind)['dspy_fst_tokens_total{kind="completion"}'] == len("hello (1 messages)")


def test_chunks_arrive_while_the_model_still_speaks(app_behind, fake):
    go_on = threading.Event()
    fake.wait = lambda sent: sent < 3 or go_on.wait(30)
    with served(app_behind) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        stream = client.chat.completions.create(model="mine", messages=chat()["messages"], stream=True)
        first = next(chunk for chunk in stream if chunk.choices[0].delta.content)
        assert not go_on.is_set()
        go_on.set()
        rest = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        client.close()
    assert first.choices[0].delta.content + rest == "hello (1 messages)"


def test_a_whole_reply_shows_nothing_of_the_server_behind(app_behind, fake):
    reply = ask(app_behind, {**chat(temperature=0.3, top_p=0.5), "model": "mine"}, CHAT)
    assert reply.json()["choices"][0]["message"]["content"] == "hello (1 messages)"
    assert reply.json()["model"] == "mine"
    for hidden in (UPSTREAM_KEY, "weights-of-the-server", "inside"):
        assert hidden not in reply.text + str(reply.headers)
    (asked,) = fake.asked
    assert (asked["model"], asked["temperature"], asked["top_p"]) == ("weights-of-the-server", 0.3, 0.5)
    assert asked["max_tokens"] == 64  # the policy's own
    assert set(fake.paths) == {"/v1/models", CHAT}


@pytest.mark.parametrize("path", ["/collective_rpc", "/pause", "/v1/completions", "/reset_prefix_cache", "/sleep"])
def test_no_other_endpoint_of_the_server_can_be_reached(app_behind, fake, path):
    assert ask(app_behind, {"method": "x"}, path).status_code == 404
    assert get(app_behind, path).status_code == 404
    assert fake.paths == []


@pytest.mark.parametrize("models", [[], "page", {"data": []}, {"data": [7]}, {"object": "list"}], ids=str)
def test_a_list_of_models_that_is_none_is_a_failure_of_the_engine(app_behind, fake, models):
    fake.models = models
    reply = ask(app_behind, {**chat(), "model": "mine"}, CHAT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("answer", "status", "type"),
    [
        ((400, {"error": {"message": "too long by 3 tokens"}}), 400, "invalid_request"),
        ((500, {"error": {"message": "at /inside/file.py"}}), 503, "engine"),
        ((401, {"error": {"message": "at /inside/file.py"}}), 503, "engine"),
    ],
)
def test_what_the_server_behind_refuses_keeps_its_status_and_only_the_request_s_faults_their_words(
    app_behind, fake, answer, status, type, stream
):
    fake.answer = answer
    reply = ask(app_behind, {**chat(stream=stream), "model": "mine"}, CHAT)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, type)
    assert ("too long by 3 tokens" in reply.text) == (status == 400)
    assert "inside" not in reply.text


def test_a_stream_that_breaks_off_is_no_end(app_behind, fake):
    fake.break_after = 3
    told = events(ask(app_behind, {**chat(stream=True), "model": "mine"}, CHAT).text)
    assert told[-1][0] == "error"
    assert told[-1][1]["error"]["code"] == "engine"
    with served(app_behind) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        with pytest.raises(openai.APIError, match="engine"):
            list(client.chat.completions.create(model="mine", messages=chat()["messages"], stream=True))
        client.close()


def test_a_server_that_is_gone_is_started_again_through_its_engine(program, fake):
    with behind(program, fake) as engine:
        app = create_app(program, ServeSettings(api_key=KEY, model_name="mine"))
        assert ask(app, {**chat(), "model": "mine"}, CHAT).status_code == 200
        gone = engine.address
        fake.stop()
        assert ask(app, {**chat(), "model": "mine"}, CHAT).status_code == 200
        assert engine.address != gone


def test_while_its_server_is_started_again_the_engine_s_weights_do_not_count_as_served(program, fake):
    with behind(program, fake) as engine:
        app = create_app(program, ServeSettings(api_key=KEY, model_name="mine"))
        assert get(app, "/ready").status_code == 200
        engine.address, there = None, engine.address
        assert get(app, "/ready").status_code == 503
        assert ask(app, {**chat(), "model": "mine"}, CHAT).status_code == 503
        engine.address = there
        assert ask(app, {**chat(), "model": "mine"}, CHAT).status_code == 200


def test_a_caller_who_leaves_ends_the_stream_on_the_server_too(app_behind, fake):
    fake.speak = lambda messages, seed: "x" * 3000
    go_on = threading.Event()
    fake.wait = lambda sent: sent < 3 or go_on.wait(0.01)
    queue = app_behind.state.service.queue
    with served(app_behind) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        stream = client.chat.completions.create(model="mine", messages=chat()["messages"], stream=True)
        next(iter(stream))
        stream.close()
        client.close()
        assert fake.cut.wait(30)
        wait_until(lambda: not queue.at_work(), "the place is free")


def test_replies_at_the_same_time_do_not_mix(app_behind):
    async def all_at_once():
        async with client_of(app_behind) as client:
            bodies = [{**chat(f"number {i}", stream=bool(i % 2)), "model": "mine"} for i in range(40)]
            return await asyncio.gather(*(client.post(CHAT, json=body, headers=AUTH) for body in bodies))

    for number, reply in enumerate(asyncio.run(all_at_once())):
        if number % 2:
            chunks = [data for _, data in events(reply.text) if data != "[DONE]"]
            text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        else:
            text = json.loads(reply.text)["choices"][0]["message"]["content"]
        assert text == f"number {number} (1 messages)"
