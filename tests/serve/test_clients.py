"""openai's, LiteLLM's and DSPy's own clients over real HTTP: single, multi-turn, streaming, errors, on both engines.

The vLLM server is the laboratory's that tests/engine/test_contract.py asks, too; the last test here ends it.
"""

import asyncio
import signal
from dataclasses import dataclass, field
from typing import Any

import dspy
import httpx
import litellm
import openai
import psutil
import pytest
from transformers import AutoTokenizer

from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import CHAT, ServeSettings
from programs.lab import BASE
from tests.engine.test_server_process import ended
from tests.serve.command import NUMBERS, Server, compiled_lab
from tests.serve.makers import KEY, PATH, events, served, wait_until

CONTEXT = 1024
USER = {"role": "user", "content": "4 7 1 9"}
TOO_LONG = {"role": "user", "content": "4 7 1 9 " * CONTEXT}
SAME = {"temperature": 0.0, "max_tokens": 8}


@dataclass
class Reached:
    """Where a server is, and the command behind it where there is one."""

    url: str
    key: str
    process: Server | None = None
    behind: list[psutil.Process] = field(default_factory=list)

    @property
    def base(self) -> str:
        return f"{self.url}/v1"

    def post(self, **body: Any) -> httpx.Response:
        body = {"model": "policy", "messages": [USER], **SAME, **body}
        return httpx.post(self.base + "/chat/completions", json=body, headers=self.auth, timeout=120)

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@pytest.fixture(scope="module", params=["in_process", pytest.param("vllm", marks=pytest.mark.vllm)])
def server(request):
    if request.param == "in_process":
        app = create_app(compiled_lab(), ServeSettings(api_key=KEY))
        with served(app) as url:
            wait_until(lambda: httpx.get(f"{url}/ready", timeout=60).status_code == 200, "weights are served", 120)
            yield Reached(url, KEY)
        return
    command = request.getfixturevalue("lab_on_vllm")
    behind = psutil.Process(command.process.pid).children(recursive=True)
    assert behind
    yield Reached(command.url, command.key, command, behind)


# ---- openai ---------------------------------------------------------------------------------------


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.base, api_key=server.key, max_retries=0) as client:
        yield client


def said(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_openai_s_client_asks_once_again_and_in_a_stream(client):
    assert client.models.retrieve("policy") == client.models.list().data[0]
    ask = client.chat.completions.create
    whole = ask(model="policy", messages=[USER], seed=1, **SAME)
    assert 0 < whole.usage.completion_tokens <= 8
    chunks = list(ask(model="policy", messages=[USER], stream=True, stream_options={"include_usage": True}, **SAME))
    assert said(chunks) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    message = whole.choices[0].message
    again = [ask(model="policy", messages=[USER, m, USER], **SAME) for m in (message, message.model_dump())]
    assert again[0].choices[0].message.content == again[1].choices[0].message.content
    assert again[0].usage.prompt_tokens > whole.usage.prompt_tokens
    assert again[0].usage == again[1].usage


@pytest.mark.parametrize("stream", [False, True])
def test_openai_s_client_raises_its_own_errors(server, client, stream):
    def refused(kind, **more):
        with pytest.raises(kind) as raised:
            list(client.chat.completions.create(**{"model": "policy", "messages": [USER], "stream": stream, **more}))
        assert raised.value.type == "invalid_request_error"
        return raised.value

    long = refused(openai.BadRequestError, messages=[TOO_LONG])
    assert (long.code, long.param) == ("context_length_exceeded", "messages")
    assert "1024 tokens" in long.message
    for name in ("max_tokens", "max_completion_tokens"):
        error = refused(openai.BadRequestError, **{name: CONTEXT + 1})
        assert (error.code, error.param) == ("invalid_value", name)
    assert refused(openai.NotFoundError, model="gpt-5").code == "model_not_found"
    assert refused(openai.BadRequestError, temperature=0.005).param == "temperature"
    with pytest.raises(openai.AuthenticationError) as raised:
        client.with_options(api_key="another-key-0123456").models.list()
    assert raised.value.code == "invalid_api_key"


def test_a_prompt_that_fills_the_context_is_too_long_and_one_token_less_is_not(client):
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def length(words):
        message = {**USER, "content": "4 " * words}
        return len(tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"])

    each = length(200) - length(199)
    fits = next(words for words in range(CONTEXT) if length(words) + each > CONTEXT - 1)
    filled = client.chat.completions.create(
        model="policy", messages=[{**USER, "content": "4 " * fits}], max_tokens=CONTEXT, temperature=0
    )
    assert filled.usage.total_tokens <= CONTEXT
    if filled.usage.total_tokens == CONTEXT:
        assert filled.choices[0].finish_reason == "length"
    for words in range(fits + 1, fits + 4):
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(model="policy", messages=[{**USER, "content": "4 " * words}], max_tokens=4)
        assert raised.value.code == "context_length_exceeded"


# ---- LiteLLM --------------------------------------------------------------------------------------


def test_litellm_asks_once_again_in_a_stream_and_raises_its_own_errors(server):
    reached = {"model": "openai/policy", "api_base": server.base, "api_key": server.key, "num_retries": 0}
    whole = litellm.completion(**reached, messages=[USER], **SAME)
    chunks = list(litellm.completion(**reached, messages=[USER], stream=True, **SAME))
    assert said(chunks) == whole.choices[0].message.content
    message = whole.choices[0].message
    for sent in (message, message.model_dump()):
        assert litellm.completion(**reached, messages=[USER, sent, USER], **SAME).choices[0].message.content is not None
    for stream in (False, True):
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(**reached, messages=[TOO_LONG], stream=stream)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**reached, "api_key": "another-key-0123456"}, messages=[USER])
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**{**reached, "model": "openai/other"}, messages=[USER])
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**reached, messages=[USER], temperature=0.005)


# ---- dspy.LM --------------------------------------------------------------------------------------


def test_dspy_s_lm_asks_once_again_in_a_stream_and_raises_its_own_errors(server):
    def lm(**more):
        options = {"api_base": server.base, "api_key": server.key, "cache": False, "num_retries": 0, **SAME}
        return dspy.LM("openai/policy", **{**options, **more})

    asked = lm()
    (text,) = asked("4 7 1 9")
    assert asked(messages=[USER, {"role": "assistant", "content": text}, USER])
    assert asked.history[-1]["usage"]["completion_tokens"] <= 8
    program = compiled_lab()
    program.set_lm(lm(max_tokens=12))

    async def streamed():
        chunks = dspy.streamify(program, is_async_program=False)(numbers="4 7 1 9")
        return [chunk async for chunk in chunks]

    *chunks, prediction = asyncio.run(streamed())
    assert prediction.answer == program(numbers="4 7 1 9").answer
    assert chunks
    with pytest.raises(dspy.ContextWindowExceededError):
        asked(messages=[TOO_LONG])
    with pytest.raises(dspy.LMAuthError):
        lm(api_key="another-key-0123456")("x")
    with pytest.raises(dspy.LMInvalidRequestError):
        lm(temperature=0.005)("x")


# ---- what the contract of `test_chat_alike` is on real engines -------------------------------------


def test_empty_settings_returned_messages_and_the_developer_s_role_are_taken(server):
    plain = server.post().json()["choices"][0]["message"]["content"]
    settings = (
        {"stop": [], "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "top_logprobs": 0},
        {"logit_bias": {}, "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True, "stream": None},
        {"logprobs": False, "n": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "user": "me"},
    )
    for more in settings:
        reply = server.post(**more)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"] == plain
    told = [server.post(messages=[{"role": role, "content": "Sort."}, USER]).json() for role in ("developer", "system")]
    assert told[0]["choices"] == told[1]["choices"]
    returned = {"role": "assistant", "content": "x", "refusal": None, "annotations": None, "reasoning": None}
    assert server.post(messages=[USER, returned, USER]).status_code == 200


def test_replies_hold_nothing_of_the_server_behind(server):
    whole = server.post().json()
    assert set(whole) == {"id", "object", "created", "model", "choices", "usage"}
    assert set(whole["choices"][0]) == {"index", "message", "logprobs", "finish_reason"}
    assert set(whole["choices"][0]["message"]) == {"role", "content", "refusal"}
    for _, chunk in events(server.post(stream=True).text)[:-1]:
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
        assert set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}


def test_what_nests_deep_is_a_bad_request(server):
    for levels in (60, 100, 1_000, 100_000):
        arguments = '{"a":' * levels + "1" + "}" * levels
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        history = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
        reply = server.post(messages=[*history, {"role": "tool", "tool_call_id": "1", "content": "2"}, USER])
        assert reply.status_code == (200 if levels < 64 else 400), reply.text
    body = '{"model":"policy","messages":[{"role":"user","content":"x"}],"tools":[{"type":"function","function":'
    for levels in (40, 100, 1_000):
        tool = body + '{"name":"f","parameters":' + '{"a":' * levels + "1" + "}" * levels + "}}]}"
        headers = {**server.auth, "Content-Type": "application/json"}
        reply = httpx.post(server.url + CHAT, content=tool, headers=headers, timeout=120)
        assert reply.status_code in ((200, 400) if levels < 64 else (400,)), reply.text
        assert "Unicode" not in reply.text
    assert httpx.get(f"{server.url}/ready", timeout=60).status_code == 200


# ---- vLLM alone, and its end -----------------------------------------------------------------------


def test_behind_vllm_a_program_streams_token_by_token_and_nothing_is_left_running(server):
    if (command := server.process) is None:
        pytest.skip("no command")
    told = next(filter(in_pieces, (events(command.ask(NUMBERS, f"{PATH}/stream").text) for _ in range(20))))
    assert told[0] == ("start", {"tokens": True})
    deltas = [data for name, data in told if name == "delta"]
    assert "".join(delta["text"] for delta in deltas).strip() == told[-1][1]["outputs"]["answer"].strip()
    assert told[-1][1]["outputs"] == command.ask(NUMBERS).json()["outputs"]
    assert httpx.post(f"{command.url}/collective_rpc", headers=command.auth, timeout=60).status_code == 404
    command.process.send_signal(signal.SIGTERM)
    assert command.end() == 0, command.said
    wait_until(lambda: all(map(ended, server.behind)), "nothing is left running")


def in_pieces(told):
    """Whether the answer came in several; a busy server may send all tokens of one so short in one piece."""
    return sum(name == "delta" for name, _ in told) > 1
