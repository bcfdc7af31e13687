"""How long an engine lives: as long as somebody holds an LM that speaks through it."""

import gc
import threading
import time

from dspy_fst import PolicyLM
from programs.lab import BASE

WAIT_S = 20


def engines_at_work():
    return [thread.name for thread in threading.enumerate() if thread.name == "in-process-engine"]


def test_an_engine_ends_with_the_last_lm_that_held_it():
    before = len(engines_at_work())
    policy = PolicyLM(BASE, engine="in_process", max_tokens=4)
    policy("hello")
    copy = policy.copy(temperature=0.5)
    del policy
    gc.collect()
    assert len(engines_at_work()) == before + 1
    copy("hello again")
    del copy
    gc.collect()
    deadline = time.monotonic() + WAIT_S
    while len(engines_at_work()) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(engines_at_work()) == before
