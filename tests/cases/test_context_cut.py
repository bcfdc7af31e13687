"""A prompt that leaves less of the context than max_tokens: the reply is cut by the context, and told as that."""

import dspy
import pytest
from transformers import AutoTokenizer

from dspy_fst import PolicyLM
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter
from dspy_fst.slow.credit import credit
from dspy_fst.types import Population, Problem
from programs.lab import BASE
from programs.lab.tokenizer import CONTEXT, messages, signature

LEFT = 3
"""Tokens of the context that the long prompt leaves; the base needs more for any reply that parses."""


@pytest.fixture(scope="module")
def program():
    policy = PolicyLM(BASE, engine="in_process", max_tokens=64)
    program = dspy.Predict(signature("Reverse the list."))
    program.set_lm(policy)
    yield program
    policy.release()


def numbers_that_leave(tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def left(numbers: str) -> int:
        prompt = messages("Reverse the list.", numbers)
        rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        return CONTEXT - len(rendered["input_ids"])

    one = left("1") - left("1 1")
    return " ".join(["1"] * (1 + (left("1") - tokens) // one))


def counts_of(program, numbers: str):
    rollouter = Rollouter(program, Reward(lambda gold, pred, trace=None: 1.0), RolloutSettings(num_threads=4))
    problem = Problem(0, dspy.Example(numbers=numbers).with_inputs("numbers"))
    groups = rollouter.groups([problem], Population.of_seed(read_texts(program), 2), 4, "cut")
    return [call for rollout in groups[0].rollouts for call in rollout.calls], credit(groups).counts


def test_replies_that_the_context_cut_are_counted_apart_from_those_that_max_tokens_cut(program):
    calls, counts = counts_of(program, numbers_that_leave(LEFT))
    cut = [call for call in calls if call.finish_reason == "length"]
    assert cut
    assert {len(call.prompt_ids) + len(call.completion_ids) for call in cut} == {CONTEXT}
    assert (counts["truncated_by_context"], counts["truncated_calls"]) == (len(cut), 0)


def test_replies_that_max_tokens_cut_are_not_the_context_s(program):
    program.config["max_tokens"] = 2
    calls, counts = counts_of(program, "1 2 3")
    assert (counts["truncated_by_context"], counts["truncated_calls"]) == (0, len(calls))
    assert counts["calls"] == 4
