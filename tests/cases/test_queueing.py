"""More callers than a batch holds: limits measure work, and the wait for other callers' batches is nobody's work."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest

from dspy_fst import PolicyLM
from dspy_fst.errors import EngineError
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.reward import Reward
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.rollouter import Rollouter, Task
from dspy_fst.types import Problem, Rollout
from programs.lab import BASE
from programs.lab.tokenizer import signature
from tests.engine.test_contract import request_of

CALLERS = 8
FORWARD_S = 0.4
"""Each pass through the model is made this slow: a batch takes one or two of them."""
TIMEOUT_S = 2.5
"""More than any batch takes, less than all batches one after another."""


@pytest.fixture
def slow_policy() -> Iterator[Callable[..., PolicyLM]]:
    """Makes a PolicyLM whose engine runs one call at a time, slowly."""
    made: list[PolicyLM] = []

    def make(before_forward: Callable[[], None] = lambda: time.sleep(FORWARD_S), **options: Any) -> PolicyLM:
        settings = {"max_batch_tokens": 1, "linger_s": 0.3, **options}
        policy = PolicyLM(BASE, engine="in_process", max_tokens=2, engine_options=settings)
        made.append(policy)
        policy.handle.ready()._model.register_forward_pre_hook(lambda *_: before_forward())
        return policy

    yield make
    for policy in made:
        policy.release()


def test_every_queued_call_gets_its_reply_within_a_limit_that_holds_for_each_batch(slow_policy):
    engine = slow_policy(timeout_s=TIMEOUT_S).handle.engine
    engine.expect(CALLERS)
    began = time.monotonic()
    with ThreadPoolExecutor(CALLERS) as pool:
        replies = list(pool.map(lambda n: engine.complete(request_of(f"{n} 2", max_tokens=2), n), range(CALLERS)))
    assert time.monotonic() - began > TIMEOUT_S
    assert [len(reply.completion_ids) in (1, 2) for reply in replies] == [True] * CALLERS


def rollouts_of(policy: PolicyLM, timeout_s: float) -> list[Rollout]:
    program = dspy.Predict(signature("Reverse the list."))
    program.set_lm(policy)
    settings = RolloutSettings(num_threads=CALLERS, rollout_timeout_s=timeout_s)
    rollouter = Rollouter(program, Reward(lambda gold, pred, trace=None: 1.0), settings, policy.handle.engine.expect)
    examples = [dspy.Example(numbers=f"{n} 2 3").with_inputs("numbers") for n in range(CALLERS)]
    return rollouter.rollout([Task(Problem(n, e), read_texts(program)) for n, e in enumerate(examples)], "queue")


def test_no_rollout_is_masked_for_the_time_in_which_its_call_was_queued(slow_policy):
    rollouts = rollouts_of(slow_policy(timeout_s=60.0), TIMEOUT_S)
    assert [rollout.mask for rollout in rollouts] == [None] * CALLERS
    assert [len(rollout.calls) for rollout in rollouts] == [1] * CALLERS


def test_a_batch_beyond_its_limit_fails_its_caller_and_those_behind_it_get_their_replies(slow_policy):
    hangs = threading.Event()
    hangs.set()

    def before_forward() -> None:
        if hangs.is_set():
            hangs.clear()
            time.sleep(3.0)

    engine = slow_policy(before_forward, timeout_s=1.5).handle.engine
    engine.expect(3)

    def ask(n: int) -> str:
        began = time.monotonic()
        try:
            return str(engine.complete(request_of(f"{n} 2", max_tokens=2), n).finish_reason)
        except EngineError as error:
            return f"{error} {'early' if time.monotonic() - began < 3.0 else 'late'}"

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(ask, range(3))
    # Calls are sorted, so the first call's batch comes first.
    assert first == "no reply from the in-process engine within 1.5 s (timeout_s) early"
    assert set(others) <= {"stop", "length"}


def test_a_model_that_never_returns_fails_those_behind_it_too(slow_policy):
    release = threading.Event()
    engine = slow_policy(lambda: release.wait(30) and None, timeout_s=0.5).handle.engine
    engine.expect(2)

    def ask(n: int) -> str:
        with pytest.raises(EngineError) as failed:
            engine.complete(request_of(f"{n} 2", max_tokens=2), n)
        return str(failed.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, range(2))
    release.set()
    assert "within 0.5 s" in first
    assert "has not moved" in second


def test_seconds_in_which_two_calls_of_a_rollout_queue_count_once():
    from dspy_fst.engine.base import QUEUEING
    from dspy_fst.rollout.worker_pool import QueueTime

    now = [0.0]
    queue_time = QueueTime(lambda: now[0])
    with queue_time.counting(), QUEUEING.get()():
        now[0] = 2.0
        with QUEUEING.get()():
            now[0] = 5.0
            assert queue_time.seconds == 5.0
        now[0] = 6.0
    now[0] = 100.0
    with QUEUEING.get()():
        now[0] = 200.0
    assert queue_time.seconds == 6.0
