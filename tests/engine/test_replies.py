"""Thoughts and tool calls: divided alike in process and on a real vLLM server, with every token kept."""

import dspy
import pytest
from dspy import lm15

from dspy_fst import PolicyLM
from dspy_fst.engine.base import Completion
from dspy_fst.engine.chat import chat_messages, chat_options
from dspy_fst.engine.replies import ReplyReader
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.slow.credit import credit
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Group, Problem
from tests.engine.lessons import ADD, CALL, COUNT, COUNTED, GREET, ask
from tests.engine.taught import TEMPLATE, THINKS, make_tokenizer


@pytest.fixture(scope="module", params=["in_process", pytest.param("vllm", marks=pytest.mark.vllm)])
def policy(request, taught):
    options = {}
    if request.param == "vllm":
        address = request.getfixturevalue("server").address
        options = {"attach_url": address.url, "api_key": address.api_key}
    policy = PolicyLM(taught, engine=request.param, max_tokens=60, temperature=0.3, engine_options=options)
    yield policy
    policy.release()


def said(policy, request: lm15.Request) -> Completion:
    """The reply, once its tokens were found to be the template's and its log-probabilities the trainer's."""
    completion = policy.handle.ready().complete(request, seed=1)
    tokenizer = policy.handle.reader.tokenizer
    prompt = tokenizer.apply_chat_template(
        chat_messages(request), add_generation_prompt=True, return_dict=True, **chat_options(request)
    )
    assert completion.prompt_ids == tuple(prompt["input_ids"])
    return completion


@pytest.mark.slow
def test_thoughts_are_kept_from_the_content_and_their_tokens_are_counted(policy):
    completion = said(policy, GREET)
    thought, text = completion.response.message.parts
    assert (thought.type, thought.text) == ("thinking", "Be kind.")
    assert completion.response.text == text.text == "Hello there."
    tokens = policy.handle.reader.tokenizer.decode(completion.completion_ids[: completion.reasoning_tokens])
    assert tokens == "<think>\nBe kind."
    assert completion.response.usage.reasoning_tokens == completion.reasoning_tokens
    whole = policy.handle.reader.tokenizer.decode(completion.completion_ids)
    assert whole == "<think>\nBe kind.\n</think>\n\nHello there.<|end|>"


def test_a_tool_call_is_read_and_its_result_is_shown_to_the_model(policy):
    completion = said(policy, COUNT)
    (call,) = completion.response.tool_calls
    assert (call.name, call.input) == ("add", {"a": 1})
    assert (completion.finish_reason, completion.response.finish_reason) == ("tool_calls", "tool_call")
    assert completion.reasoning_tokens > 0
    assert said(policy, COUNT).response.tool_calls == [call]
    assert said(policy, COUNTED).response.text == "It is two."


def test_an_adapter_reads_the_answer_and_not_the_thoughts_and_a_reasoning_field_gets_them(policy):
    with dspy.context(lm=policy):
        assert dspy.Predict("question -> answer")(question="Who?").answer == "right"
        prediction = dspy.Predict("question -> why: dspy.Reasoning, answer")(question="Who?")
    assert (str(prediction.why), prediction.answer) == ("I know.", "me")


def test_a_reply_that_is_cut_off_in_its_thoughts_does_not_parse_and_is_counted(policy):
    program = dspy.Predict("question -> answer")
    program.set_lm(policy.copy(max_tokens=6))
    example = dspy.Example(question="Who?").with_inputs("question")
    rollouter = Rollouter(program, Reward(lambda gold, pred, trace=None: 1.0), RolloutSettings())
    (rollout,) = rollouter.rollout([Task(Problem(0, example), read_texts(program))], "cut")
    (call,) = rollout.calls
    assert (rollout.failure, call.finish_reason) == ("parse", "length")
    assert 0 < call.reasoning_tokens <= 6
    counts = credit([Group(0, (rollout,))]).counts
    assert (counts["reasoning_tokens"], counts["truncated_calls"]) == (call.reasoning_tokens, 1)
    assert counts["failed: parse"] == 1


def test_thoughts_and_calls_are_sampled_from_what_training_scores(policy, taught):
    completions = [said(policy, request) for request in (GREET, COUNT, COUNTED)]
    trainer = Trainer(taught, TrainingSettings(learning_rate=1e-4))
    for completion in completions:
        ids = (*completion.prompt_ids, *completion.completion_ids)
        at_one = policy.handle.engine.score([ids])[0]
        assert at_one == pytest.approx(trainer.score([ids])[0], abs=1e-4)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extensions": {"logit_bias": {"5": 1.0}}}, "logit_bias"),
        ({"extensions": {"structured_outputs": {"regex": "a"}}}, "structured_outputs"),
    ],
)
def test_a_setting_that_masks_tokens_is_refused(policy, setting, named):
    with pytest.raises(lm15.UnsupportedFeatureError, match=f"^{named}: the reply would be drawn with some tokens mask"):
        policy.handle.ready().complete(ask(lm15.Message.user("Greet me."), tools=(ADD,), **setting), seed=1)


@pytest.mark.parametrize("choice", [lm15.ToolChoice("required"), lm15.ToolChoice("auto", allowed=("add",))])
def test_a_forced_tool_is_shown_and_the_model_is_left_free(policy, choice):
    free = said(policy, COUNT)
    forced = policy.handle.ready().complete(ask(*COUNT.messages, tools=(ADD,), tool_choice=choice), seed=1)
    assert (forced.prompt_ids, forced.completion_ids) == (free.prompt_ids, free.completion_ids)


# Reading, without a model


@pytest.fixture(scope="module")
def reader():
    return ReplyReader.of(make_tokenizer(["some words"], TEMPLATE))


def read(reader, reply, prompt="<|user|>hi<|assistant|>", request=COUNT, finish_reason="stop") -> Completion:
    ids = tuple(reader.tokenizer(reply)["input_ids"])
    text = reader.tokenizer.decode(ids, skip_special_tokens=True)
    response = lm15.Response(None, "m", lm15.Message.assistant(text), finish_reason, lm15.Usage())
    prompt_ids = tuple(reader.tokenizer(prompt)["input_ids"])
    return reader.read(Completion(response, prompt_ids, ids, (0.0,) * len(ids), finish_reason, "v0"), request)


def parts(completion) -> list:
    return [part.input if part.type == "tool_call" else part.text for part in completion.response.message.parts]


def test_thoughts_that_the_template_opened_are_thoughts(reader):
    completion = read(reader, "Hm.</think>Yes.", prompt="<|assistant|><think>\n")
    assert parts(completion) == ["Hm.", "Yes."]
    assert [part.type for part in read(reader, "Hm", "<|assistant|><think>\n").response.message.parts] == ["thinking"]


def test_a_reply_that_speaks_of_thoughts_later_on_is_content(reader):
    assert parts(read(reader, "Yes. <think>no</think>")) == ["Yes. <think>no</think>"]


def test_words_and_several_calls_are_told_apart(reader):
    completion = read(reader, f"I add.\n{CALL}\n{CALL}<|end|>")
    assert parts(completion) == ["I add.", {"a": 1}, {"a": 1}]
    assert len({call.id for call in completion.response.tool_calls}) == 2


@pytest.mark.parametrize("wrong", ["{bad", "[1]", '{"name": 3, "arguments": {}}', '{"name": "add", "arguments": "a"}'])
def test_a_call_that_is_no_call_stays_text(reader, wrong):
    completion = read(reader, f"<think>Hm.</think><tool_call>{wrong}</tool_call>")
    assert parts(completion) == ["Hm.", f"<tool_call>{wrong}</tool_call>"]
    assert completion.finish_reason == "stop"


def test_without_tools_a_call_is_text(reader):
    assert parts(read(reader, CALL, request=GREET)) == [CALL]
    unwanted = ask(*COUNT.messages, tools=(ADD,), tool_choice=lm15.ToolChoice("none"))
    assert parts(read(reader, CALL, request=unwanted)) == [CALL]


def test_a_call_that_was_cut_off_says_so(reader):
    completion = read(reader, f"{CALL}\n<tool", finish_reason="length")
    assert (len(completion.response.tool_calls), completion.finish_reason) == (1, "length")


def test_what_a_server_divided_stays_divided(reader):
    message = lm15.Message(role="assistant", parts=(lm15.ThinkingPart("Hm."), lm15.TextPart("Yes.")))
    response = lm15.Response(None, "m", message, "stop", lm15.Usage())
    ids = tuple(reader.tokenizer("<think>Hm.</think>Yes.")["input_ids"])
    completion = reader.read(Completion(response, (1,), ids, (0.0,) * len(ids), "stop", "v0"), GREET)
    assert parts(completion) == ["Hm.", "Yes."]
    assert reader.tokenizer.decode(ids[: completion.reasoning_tokens]) == "<think>Hm."


def test_a_model_s_own_response_template_is_followed():
    tokenizer = make_tokenizer(["some words"], TEMPLATE)
    field = {"open": "(", "close": ")", "content": "text"}
    tokenizer.response_template = {
        "start_anchor": "<|assistant|>",
        "fields": {"thinking": field, "content": {"content": "text"}},
    }
    assert parts(read(ReplyReader.of(tokenizer), "(Hm.)Yes.", "(no)<|assistant|>")) == ["Hm.", "Yes."]


def test_a_template_without_tools_keeps_them_in_the_prompt_and_refuses_them_as_tools():
    plain = ReplyReader.of(make_tokenizer(["x"], "{% for m in messages %}{{ m.content }}{% endfor %}"))
    assert (plain.thinks, plain.takes_tools) == (False, False)
    with pytest.raises(lm15.UnsupportedFeatureError, match="use_native_function_calling"):
        plain.check(COUNT)
    assert not ReplyReader.of(make_tokenizer(["x"], TEMPLATE.replace(THINKS, ""))).thinks


def test_dspy_writes_tools_into_the_prompt_where_the_template_has_none(tmp_path):
    make_tokenizer(["x"], "{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(tmp_path)
    policy = PolicyLM(tmp_path, engine="in_process")
    assert (policy.supports_function_calling, policy.supports_reasoning) == (False, False)
    assert policy.supported_params == set()  # so JSONAdapter asks for JSON in words
