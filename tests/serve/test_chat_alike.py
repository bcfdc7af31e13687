"""What clients expect of the chat endpoint, on an engine in process and behind a vLLM server alike."""

import json
from dataclasses import replace

import openai
import pytest
from dspy import lm15

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.chat import TemplateTraits
from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import CHAT, MODELS, ServeSettings
from tests.serve.fake_vllm import FakeVLLM, behind
from tests.serve.makers import KEY, ask, compiled, events, get, served

CONTEXT = 512
TOO_LONG = (
    "This model's maximum context length is 512 tokens. However, your prompt contains at least 513 input tokens, which "
    "exceeds this limit even without any output tokens. (parameter=input_tokens, value=513)"
)


def speak(messages, seed):
    if "too long" in messages[-1]["content"]:
        raise lm15.ContextLengthError("the prompt has 513 tokens and the model's context 512")
    return " | ".join(f"{message['role']}: {message.get('content')}" for message in messages)


class Served:
    """An app and what its engine was asked last."""

    def __init__(self, app, asked):
        self.app, self.asked = app, asked

    def ask(self, *messages, **more):
        messages = messages or ({"role": "user", "content": "hello"},)
        return ask(self.app, {"model": "policy", "messages": list(messages), **more}, CHAT)

    def said(self, *messages, **more):
        reply = self.ask(*messages, **more)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"]

    def refused(self, *messages, **more):
        reply = self.ask(*messages, **more)
        assert reply.status_code == 400, reply.text
        assert set(reply.json()["error"]) == {"message", "type", "param", "code", "faults"}
        assert reply.json()["error"]["type"] == "invalid_request_error"
        return reply.json()["error"]


@pytest.fixture(params=["in_process", "behind_vllm"])
def server(request):
    program, engine = compiled(speak)
    if request.param == "in_process":
        engine.context = CONTEXT
        yield Served(create_app(program, ServeSettings(api_key=KEY)), None)
        return
    fake = FakeVLLM(speak, context=CONTEXT)
    fake.refuse = lambda body: TOO_LONG if "too long" in body["messages"][-1]["content"] else None
    with behind(program, fake):
        yield Served(create_app(program, ServeSettings(api_key=KEY)), fake.asked)


USER = {"role": "user", "content": "hello"}
AGAIN = {"role": "user", "content": "again"}


# ---- what was given may be sent back --------------------------------------------------------------


def test_a_reply_may_be_sent_back_as_openai_s_client_holds_it(server):
    with served(server.app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        reply = client.chat.completions.create(model="policy", messages=[USER])
        message = reply.choices[0].message
        for sent in (message, message.model_dump(), message.model_dump(exclude_none=True)):
            told = client.chat.completions.create(model="policy", messages=[USER, sent, AGAIN])
            assert told.choices[0].message.content == "user: hello | assistant: user: hello | user: again"
        client.close()


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"refusal": None, "annotations": [], "audio": None, "function_call": None}, id="openai"),
        pytest.param({"tool_calls": None, "provider_specific_fields": {"refusal": None}}, id="litellm"),
        pytest.param({"tool_calls": [], "reasoning": None}, id="vllm"),
    ],
)
def test_empty_fields_of_a_returned_message_are_taken(server, extra):
    assert server.said(USER, {"role": "assistant", "content": "hi", **extra}, AGAIN).endswith("hi | user: again")


def test_a_refusal_that_is_sent_back_is_what_the_assistant_said(server):
    assert "assistant: no" in server.said(USER, {"role": "assistant", "content": None, "refusal": "no"}, AGAIN)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_developer_s_role_is_the_system_s_first_and_later(server, role):
    instruction = {"role": role, "content": "Be kind."}
    assert server.said(instruction, USER) == "system: Be kind. | user: hello"
    assert server.said(USER, instruction) == "user: hello | system: Be kind."


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be kind."}],
        [{"role": "developer", "content": "Be kind."}, {"role": "system", "content": "Be brief."}],
    ],
    ids=["system", "developer and system"],
)
def test_a_chat_without_a_turn_is_refused_in_plain_words(server, messages):
    error = server.refused(*messages)
    assert error["param"] == "messages"
    assert "a message from user, assistant or tool is needed" in error["message"]
    assert not server.asked


def test_a_name_on_a_message_is_taken_and_shown_to_no_template(server):
    named = [
        {"role": "system", "content": "Be kind.", "name": "house"},
        {**USER, "name": "ann"},
        {"role": "assistant", "content": "hi", "name": "bot"},
        {**AGAIN, "name": "bo"},
    ]
    assert server.said(*named) == "system: Be kind. | user: hello | assistant: hi | user: again"
    assert not server.asked or not any("name" in message for message in server.asked[-1]["messages"])


def test_the_result_of_a_named_tool_is_taken(server):
    told = server.ask(USER, called('{"a": 1}'), {**RESULT, "name": "add"}, AGAIN)
    assert told.status_code == 200, told.text
    assert not server.asked or server.asked[-1]["messages"][2]["name"] == "add"


# ---- a prompt that is too long --------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_has_openai_s_code_and_the_words_that_litellm_knows(server, stream):
    error = server.refused({"role": "user", "content": "too long"}, stream=stream)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert error["message"].startswith("This model's maximum context length is 512 tokens.")


def test_more_tokens_than_the_context_has_are_refused_by_name_and_as_many_are_not(server):
    for name in ("max_tokens", "max_completion_tokens"):
        error = server.refused(**{name: CONTEXT + 1})
        assert (error["code"], error["param"]) == ("invalid_value", name)
        assert "513" in error["message"]
        assert "512" in error["message"]
    assert server.said(max_tokens=CONTEXT) == "user: hello"


def test_the_policy_s_own_limit_is_cut_to_the_context(server):
    policy = server.app.state.service.policy
    policy.kwargs["max_tokens"] = 10 * CONTEXT
    assert server.said() == "user: hello"
    if server.asked is not None:
        assert server.asked[-1]["max_tokens"] == CONTEXT


# ---- nesting, and what is refused ------------------------------------------------------------------


def called(arguments):
    function = {"name": "add", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


RESULT = {"role": "tool", "tool_call_id": "1", "content": "two"}


def nested(levels):
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize("levels", [100, 1_000, 100_000])
def test_arguments_that_nest_deep_are_refused_and_the_engine_is_not_asked(server, levels):
    error = server.refused(USER, called(nested(levels)), RESULT)
    assert error["param"] == "messages.1.tool_calls.0.function.arguments"
    assert "64 levels" in error["message"]
    assert not server.asked


@pytest.mark.parametrize("arguments", ["{", "[1]", "1", '{"a": NaN}', '{"a": "\\ud800"}'])
def test_arguments_that_are_no_object_of_json_are_refused(server, arguments):
    assert "JSON object" in server.refused(USER, called(arguments), RESULT)["message"]


def test_a_call_and_its_result_are_taken(server):
    told = server.ask(USER, called('{"a": 1}'), RESULT, AGAIN)
    assert told.status_code == 200, told.text


@pytest.mark.parametrize("levels", [100, 150, 1_000, 100_000])
def test_tools_that_nest_deep_are_refused_for_what_they_are(server, levels):
    tool = '{"type":"function","function":{"name":"f","parameters":' + nested(levels) + "}}"
    body = '{"model":"policy","messages":[{"role":"user","content":"x"}],"tools":[' + tool + "]}"
    reply = ask(server.app, None, CHAT, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == ("too_many_values" if levels > 20_000 else "too_deep")
    assert "Unicode" not in reply.json()["error"]["message"]
    assert not server.asked


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"tools": [{"type": "function"}]}, id="a tool without its function"),
        pytest.param({"tools": [{}]}, id="an empty tool"),
        pytest.param({"tools": [{"type": "function", "function": {"name": 5}}]}, id="a number for a name"),
        pytest.param({"tool_choice": "required"}, id="a tool is required and there is none"),
        pytest.param({"response_format": {"type": "json_schema"}}, id="a schema that is missing"),
        pytest.param({"temperature": 0.005}, id="a temperature that vLLM would raise"),
        pytest.param({"temperature": 1e-300}, id="a temperature next to nothing"),
        pytest.param({"store": True}, id="nothing is stored"),
        pytest.param({"logit_bias": {"5": 1}}, id="a bias"),
        pytest.param({"top_logprobs": 2}, id="log-probabilities without asking for them"),
        pytest.param({"n": 2}, id="two replies"),
        pytest.param({"modalities": ["audio"]}, id="sound"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_engine_is_not_asked(server, more):
    error = server.refused(**more)
    assert error["faults"] or error["code"] == "unsupported"
    assert not server.asked


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(more, id=json.dumps(more))
        for more in (
            {"stop": []},
            {"tools": []},
            {"tool_choice": "none"},
            {"tool_choice": "auto"},
            {"response_format": {"type": "text"}},
            {"top_logprobs": 0},
            {"logit_bias": None},
            {"logit_bias": {}},
            {"stream": None},
            {"store": False},
            {"store": None},
            {"metadata": {"run": "7"}},
            {"parallel_tool_calls": True},
            {"parallel_tool_calls": False},
            {"logprobs": False},
            {"n": 1},
            {"user": "me", "safety_identifier": "me", "prompt_cache_key": "k"},
            {"modalities": ["text"], "service_tier": "auto"},
            {"stream_options": None},
            {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0.0},
            {"temperature": 0},
            {"temperature": 0.01},
            dict.fromkeys(("reasoning_effort", "verbosity", "functions", "function_call", "audio", "prediction")),
            dict.fromkeys(("web_search_options", "moderation", "prompt_cache_retention", "prompt_cache_options")),
        )
    ],
)
def test_a_setting_that_changes_nothing_is_taken(server, more):
    assert server.said(**more) == "user: hello"
    for unknown in ("store", "metadata", "logit_bias", "stop", "tools", "tool_choice", "parallel_tool_calls"):
        assert not server.asked or unknown not in server.asked[-1]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(more, id=json.dumps(more))
        for more in (
            {"seed": False},
            {"seed": "5"},
            {"temperature": "1"},
            {"temperature": True},
            {"n": True},
            {"n": "1"},
            {"max_tokens": "5"},
            {"max_tokens": 5.5},
            {"stream": "true"},
            {"stream": 1},
            {"store": 0},
            {"top_p": "0.5"},
        )
    ],
)
def test_a_value_of_another_type_is_no_value_of_the_right_one(server, more):
    error = server.refused(**more)
    assert error["param"] == next(iter(more))
    assert not server.asked


# ---- the rest of the contract ---------------------------------------------------------------------


def test_one_model_can_be_asked_for_by_its_name(server):
    assert get(server.app, f"{MODELS}/policy").json() == get(server.app, MODELS).json()["data"][0]
    missing = get(server.app, f"{MODELS}/org/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    long = server.ask(model="x" * 100_000)
    assert (long.status_code, long.json()["error"]["code"]) == (404, "model_not_found")
    assert len(long.text) < 1_000


def test_whole_replies_and_chunks_hold_what_openai_s_do_and_nothing_else(server):
    whole = server.ask().json()
    assert set(whole) == {"id", "object", "created", "model", "choices", "usage"}
    assert set(whole["choices"][0]) == {"index", "message", "logprobs", "finish_reason"}
    assert set(whole["choices"][0]["message"]) == {"role", "content", "refusal"}
    told = events(server.ask(stream=True, stream_options={"include_usage": True}).text)
    assert told.pop() == ("message", "[DONE]")
    chunks = [data for _, data in told]
    assert chunks[-1]["usage"]["completion_tokens"] == len("user: hello")
    for chunk in chunks:
        assert set(chunk) - {"usage"} == {"id", "object", "created", "model", "choices"}
        for choice in chunk["choices"]:
            assert set(choice) == {"index", "delta", "logprobs", "finish_reason"}
            assert set(choice["delta"]) <= {"role", "content"}


def test_a_fault_s_place_is_in_the_caller_s_own_names(server):
    error = server.refused({"role": "user", "content": [{"type": "text", "text": 5}]}, stop=[3])
    places = {fault["where"] for fault in error["faults"]}
    assert places == {"messages.0.content", "messages.0.content.0.text", "stop", "stop.0"}
    (fault,) = server.refused({"role": "robot", "content": "x"})["faults"]
    assert fault["where"] == "messages.0"
    assert "'developer'" in fault["message"]
    assert "robot" not in fault["message"]
    (fault,) = server.refused({"role": "tool", "content": "x"})["faults"]
    assert fault["where"] == "messages.0.tool_call_id"


def test_a_model_of_the_checkpoint_s_context_is_told_by_the_engine_in_process():
    from dspy_fst.engine.in_process import InProcessEngine
    from programs.lab import BASE

    engine = InProcessEngine()
    assert engine.context is None
    engine.load(Checkpoint("base", BASE))
    try:
        assert engine.context == json.loads((BASE / "config.json").read_text())["max_position_embeddings"]
    finally:
        engine.close()


def test_the_server_behind_is_asked_for_the_policy_s_own_distribution():
    program, _ = compiled(speak)
    fake = FakeVLLM(speak)
    with behind(program, fake):
        app = create_app(program, ServeSettings(api_key=KEY))
        assert Served(app, None).said() == "user: hello"
    (asked,) = fake.asked
    assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["min_p"]) == (1.0, 1.0, 0, 0.0)
    assert asked["repetition_penalty"] == 1.0


@pytest.mark.parametrize("stream", [False, True])
def test_a_template_without_a_system_role_is_met_behind_a_server_too(stream):
    program, _ = compiled(speak)
    fake = FakeVLLM(speak)
    with behind(program, fake):
        app = create_app(program, ServeSettings(api_key=KEY))
        handle = app.state.service.policy.handle
        handle._reader = replace(handle.reader, traits=TemplateTraits(system="refused", alternating=True))
        reply = Served(app, None).ask({"role": "system", "content": "Be kind."}, USER, USER, stream=stream)
    assert reply.status_code == 200
    assert fake.asked[0]["messages"] == [{"role": "user", "content": "Be kind.\n\nhello\n\nhello"}]
