"""Chat templates as they are found: without a system role, strict about turns, silent about what they drop."""

import dspy
import pytest
from dspy import lm15
from transformers import AutoTokenizer

from dspy_fst import PolicyLM
from dspy_fst.engine.chat import TemplateTraits, fitted
from dspy_fst.preflight.model_checks import model_faults
from dspy_fst.preflight.template_checks import template_kind, template_warnings
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.rendering import prompts_under
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Problem
from tests.cases.real_tokenizer import CHATML, DROPS_SYSTEM, NO_SYSTEM, STRIPS_THOUGHTS, save_model

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    + CHATML.removeprefix("{% for message in messages %}")
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A test gives it the template that it is about."""
    return AutoTokenizer.from_pretrained(save_model(tmp_path_factory.mktemp("plain") / "model"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, TemplateTraits()),
        (NO_SYSTEM, TemplateTraits(system="refused", alternating=True)),
        (DROPS_SYSTEM, TemplateTraits(system="dropped")),
        (STRIPS_THOUGHTS, TemplateTraits(keeps_replies=False)),
        (SMOLLM2, TemplateTraits(own_system="You are a helpful AI assistant named SmolLM")),
    ],
    ids=["chatml", "no system", "drops system", "strips thoughts", "own system"],
)
def test_what_a_template_does_is_found_from_the_tokenizer_alone(tokenizer, template, expected):
    tokenizer.chat_template = template
    # None of them shows a model's thoughts (reasoning_content); only the last is of a model that has any.
    assert TemplateTraits.of(tokenizer).without_thoughts() == expected.without_thoughts()


def turns(*said: str) -> list[dict[str, str]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[one[0]], "content": one} for one in said]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("s", "u"), [("user", "s\n\nu")]),
        (("s", "u", "a", "u2"), [("user", "s\n\nu"), ("assistant", "a"), ("user", "u2")]),
        (("s", "a", "u"), [("user", "s"), ("assistant", "a"), ("user", "u")]),
        (("s", "u", "u2", "a", "a2"), [("user", "s\n\nu\n\nu2"), ("assistant", "a\n\na2")]),
        (("u",), [("user", "u")]),
    ],
)
def test_a_request_is_fitted_to_a_template_without_a_system_role(before, after):
    rules = TemplateTraits(system="refused", alternating=True)
    messages = turns(*before)
    system = next((m["content"] for m in messages if m["role"] == "system"), None)
    rest = [
        lm15.Message.user(m["content"]) if m["role"] == "user" else lm15.Message.assistant(m["content"])
        for m in messages
        if m["role"] != "system"
    ]
    request = fitted(lm15.Request("m", tuple(rest), system=system), rules)
    assert request.system is None
    assert [(m.role, m.text) for m in request.messages] == after


def test_a_template_that_keeps_the_system_text_changes_nothing():
    request = lm15.Request("m", (lm15.Message.user("u"), lm15.Message.user("u2")), system="s")
    assert fitted(request, TemplateTraits()) == request


@pytest.mark.slow
@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["refused", "dropped"])
def test_a_program_runs_and_its_instruction_stands_in_the_first_user_turn(template, tmp_path):
    policy = PolicyLM(save_model(tmp_path / "model", template), engine="in_process", max_tokens=4)
    assert model_faults(policy) == []
    program = dspy.Predict(dspy.Signature("question -> answer", "Answer with a flower."))
    program.set_lm(policy)
    program.demos = [dspy.Example(question="q", answer="rose")]
    try:
        rollouter = Rollouter(program, Reward(lambda gold, pred, trace=None: 1.0), RolloutSettings(num_threads=2))
        example = dspy.Example(question="Which?").with_inputs("question")
        (rollout,) = rollouter.rollout([Task(Problem(0, example), read_texts(program))], "fit", anew=True)
    finally:
        policy.release()
    assert (rollout.mask, rollout.failure) == (None, "parse")
    (call,) = rollout.calls
    tokenizer = AutoTokenizer.from_pretrained(policy.checkpoint.path)
    text = tokenizer.decode(call.prompt_ids)
    first_turn = text.partition("<|im_end|>")[0]
    assert text.startswith("<|im_start|>user\n")
    assert "Answer with a flower." in first_turn
    assert first_turn.endswith("[[ ## question ## ]]\nq")
    assert text.count("Answer with a flower.") == 1
    # Who renders the prompt again, for the term that holds the policy to its start, finds the same call.
    other = read_texts(program)
    assert prompts_under(other, rollout, tokenizer) == (call.prompt_ids,)


def test_a_tokenizer_without_a_template_is_named_for_what_it_is(tmp_path):
    policy = PolicyLM(save_model(tmp_path / "model", None), engine="in_process", max_tokens=4)
    (fault,) = model_faults(policy)
    assert "no chat template" in fault
    assert "base model" in fault
    with pytest.raises(Exception, match="no chat template"):
        policy("hello")
    policy.release()


@pytest.mark.parametrize(
    ("template", "kind", "warning"),
    [
        (CHATML, "keeps earlier turns: a conversation goes on from the sampled ids", None),
        (NO_SYSTEM, "no system role: its text goes into the first user turn", "refuses a system message"),
        (DROPS_SYSTEM, "no system role: its text goes into the first user turn", "leaves the system message out"),
        (STRIPS_THOUGHTS, "rewrites earlier turns: each turn of a conversation is trained by itself", None),
        (SMOLLM2, "its own system prompt where there is none: 'You are a helpful AI assistant named SmolLM'", None),
    ],
    ids=["chatml", "no system", "drops system", "strips thoughts", "own system"],
)
def test_check_says_what_the_template_does_and_a_run_warns_of_what_it_moves(template, kind, warning, tmp_path):
    save_model(tmp_path, template)
    assert kind in template_kind(tmp_path)
    told = template_warnings(tmp_path)
    assert len(told) == (warning is not None)
    if warning is not None:
        assert warning in told[0]
        assert "DSPy's instruction goes into the first user turn, on every engine" in told[0]
    assert (template_kind(tmp_path / "none"), template_warnings(tmp_path / "none")) == (None, [])
