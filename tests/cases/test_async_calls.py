"""Many calls of a PolicyLM from one event loop: `acall`, dspy.asyncify and dspy.streamify."""

import asyncio
import threading

import dspy
import pytest

from dspy_fst.engine.call_threads import Threads
from tests.fakes import fields, scripted_policy

CALLS = 40
"""More than the threads that an event loop has of its own, 32 at most."""
WAIT_S = 20


class AllAtOnce:
    """Replies when the event loop says so, which it does once every call waits here."""

    def __init__(self, calls: int):
        self.calls = calls
        self.inside = 0
        self.lock = threading.Lock()
        self.answer = threading.Event()

    def speak(self, messages, seed):
        with self.lock:
            self.inside += 1
        assert self.answer.wait(WAIT_S), f"only {self.inside} of {self.calls} calls reached the engine"
        return fields(answer=messages[-1]["content"].split("\n")[1])

    async def when_all_wait(self):
        while self.inside < self.calls:
            await asyncio.sleep(0.005)
        self.answer.set()


def program_that_waits(calls=CALLS):
    engine = AllAtOnce(calls)
    policy, _ = scripted_policy(engine.speak)
    program = dspy.Predict("question -> answer")
    program.set_lm(policy)
    return program, engine


async def answers(asked, engine):
    *predictions, _ = await asyncio.wait_for(asyncio.gather(*asked, engine.when_all_wait()), WAIT_S)
    return [prediction.answer for prediction in predictions]


async def last_of(stream):
    return [item async for item in stream][-1]


def test_every_awaited_call_is_in_flight_at_once_and_the_event_loop_runs_on():
    program, engine = program_that_waits()

    async def ask():
        return await answers([program.acall(question=f"question {i}") for i in range(CALLS)], engine)

    assert asyncio.run(ask()) == [f"question {i}" for i in range(CALLS)]


def test_asyncify_has_as_many_calls_in_flight_as_dspy_is_set_to():
    program, engine = program_that_waits()

    async def ask():
        asked = dspy.asyncify(program)
        return await answers([asked(question=f"question {i}") for i in range(CALLS)], engine)

    with dspy.context(async_max_workers=CALLS):
        assert asyncio.run(ask()) == [f"question {i}" for i in range(CALLS)]


def test_replies_are_streamed_side_by_side():
    program, engine = program_that_waits()

    async def ask():
        streamed = dspy.streamify(program, is_async_program=True)
        return await answers([last_of(streamed(question=f"question {i}")) for i in range(CALLS)], engine)

    assert asyncio.run(ask()) == [f"question {i}" for i in range(CALLS)]


def test_an_error_reaches_the_caller_and_the_next_call_is_answered():
    replies = iter(["not in the adapter's form", fields(answer="yes")])
    policy, _ = scripted_policy(lambda messages, seed: next(replies))
    program = dspy.Predict("question -> answer")
    program.set_lm(policy)

    async def ask():
        with pytest.raises(dspy.utils.exceptions.AdapterParseError):
            await program.acall(question="?")
        return (await program.acall(question="?")).answer

    assert asyncio.run(ask()) == "yes"


def test_a_caller_who_waits_no_longer_leaves_the_others_their_replies():
    program, engine = program_that_waits(2)

    async def ask():
        left = asyncio.create_task(program.acall(question="left"))
        kept = asyncio.create_task(program.acall(question="kept"))
        while engine.inside < 2:
            await asyncio.sleep(0.005)
        left.cancel()
        engine.answer.set()
        return (await asyncio.wait_for(kept, WAIT_S)).answer, left

    answer, left = asyncio.run(ask())
    assert answer == "kept"
    assert left.cancelled()


def test_a_call_that_raises_stop_iteration_does_not_leave_its_caller_waiting():
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(asyncio.wait_for(Threads("test").run(lambda: next(iter(()))), timeout=20))


def test_threads_are_reused_and_no_more_run_than_were_allowed():
    pool, running, most, names = Threads("few", 3), [], [], set()
    lock = threading.Lock()

    def work():
        with lock:
            running.append(1)
            most.append(len(running))
            names.add(threading.get_ident())
        threading.Event().wait(0.005)
        with lock:
            running.pop()

    async def ask():
        await asyncio.gather(*(pool.run(work) for _ in range(12)))
        await pool.run(work)

    asyncio.run(ask())
    assert max(most) == 3
    assert len(names) == 3
