"""How long an engine lives: as long as somebody holds an LM that speaks through it."""

import gc
import threading

import pytest

from dspy_fst import PolicyLM
from dspy_fst.engine.base import PromptTokens
from dspy_fst.training.publisher import counted_prompts
from programs.lab import BASE

WAIT_S = 20


def engines_at_work():
    return {thread for thread in threading.enumerate() if thread.name == "in-process-engine"}


@pytest.mark.slow
def test_an_engine_ends_with_the_last_lm_that_held_it():
    before = engines_at_work()  # of other tests; they may end at any time
    policy = PolicyLM(BASE, engine="in_process", max_tokens=4)
    policy("hello")
    (worker,) = engines_at_work() - before
    copy = policy.copy(temperature=0.5)
    del policy
    gc.collect()
    copy("hello again")
    assert worker.is_alive()
    del copy
    gc.collect()
    worker.join(WAIT_S)
    assert not worker.is_alive()


def test_prompts_are_counted_from_when_that_was_asked_for():
    policy = PolicyLM(BASE, engine="in_process", max_tokens=2)
    policy("hello")
    count = counted_prompts(policy)
    assert count() == PromptTokens(0, 0)
    policy("hello")
    one = count()
    assert one.in_calls == one.read > 0
    policy("hello")
    assert count() == PromptTokens(2 * one.in_calls, 2 * one.read)
    policy.release()
