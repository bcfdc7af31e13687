"""How long an engine lives: as long as somebody holds an LM that speaks through it."""

import gc
import threading

from dspy_fst import PolicyLM
from programs.lab import BASE

WAIT_S = 20


def engines_at_work():
    return {thread for thread in threading.enumerate() if thread.name == "in-process-engine"}


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
