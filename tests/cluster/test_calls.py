"""What passes between a worker and the run's process, without a cluster."""

import asyncio
import pickle
import threading
import time

import dspy
import pytest
from dspy import lm15

from dspy_fst.cluster.policy_calls import _answer
from dspy_fst.cluster.relay import QUEUED, WORKING, Relay
from dspy_fst.cluster.shipping import packed_error, shipping_faults, unpacked_error
from dspy_fst.errors import ConfigurationError, EngineError, SyncError
from dspy_fst.rollout.worker_pool import QueueTime
from tests.cluster.play import LAB, Placed, policy


@pytest.mark.parametrize(
    "error",
    [
        lm15.ContextLengthError("the prompt has 9 tokens", provider="vllm", status=400),
        lm15.UnsupportedFeatureError("top_p=0.9"),
        lm15.TransportError("reset", retry_after=2),
        EngineError("gone"),
        SyncError("other weights"),
        ConfigurationError(["one", "two"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_class_its_words_and_its_fields(error):
    again = unpacked_error(packed_error(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == {name: vars(again).get(name) for name in vars(error)}
    assert getattr(again, "status", None) == getattr(error, "status", None)
    assert getattr(again, "faults", None) == getattr(error, "faults", None)


def test_an_error_that_cannot_be_sent_is_an_engine_s_with_its_words():
    error = OSError("no route")
    error.held = threading.Lock()
    again = unpacked_error(packed_error(error))
    assert type(again) is EngineError
    assert str(again) == "OSError: no route"


def test_only_the_time_in_the_engine_s_queue_counts_as_queueing():
    queue_time = QueueTime()

    def words():
        for word in (WORKING, QUEUED, WORKING, b"answer"):
            time.sleep(0.1)
            yield word

    with queue_time.counting():
        assert _answer(words()) == b"answer"
    assert 0.2 <= queue_time.seconds < 0.35  # before the first word, and from QUEUED to the next


def test_the_relay_passes_each_answer_to_whoever_asked():
    async def play() -> list[list[str | bytes]]:
        relay = Relay()
        asked = [asyncio.create_task(collect(relay.ask("chunk", bytes([n])))) for n in range(2)]
        await asyncio.sleep(0)
        await relay.say("chunk", 7)
        heard = await relay.take(1.0)
        assert [message.call for message in heard] == [b"\0", b"\1", None]
        assert heard[2].number == 7
        for message in reversed(heard[:2]):
            await relay.tell(message.number, WORKING)
            await relay.tell(message.number, message.call)
        await relay.tell(99, b"nobody asked")
        assert await relay.take(0.01) == []
        return [await task for task in asked]

    async def collect(words) -> list[str | bytes]:
        return [word async for word in words]

    assert asyncio.run(play()) == [[WORKING, b"\0"], [WORKING, b"\1"]]


# ---- what cannot go ----------------------------------------------------------------------------------


class Connected:
    def __init__(self):
        self.lines = {"first": [threading.Lock()]}


def test_what_can_be_sent_is_no_fault():
    with dspy.context(lm=policy(), adapter=dspy.JSONAdapter()):
        assert [*shipping_faults(Placed(policy()), LAB.metric)] == []


def test_each_thing_that_cannot_be_sent_is_named_with_its_place():
    program = Placed(policy())
    program.store = Connected()
    lock = threading.Lock()

    def metric(gold, pred, trace=None):
        with lock:
            return 1.0

    with dspy.context(callbacks=[Connected()]):
        found = [*shipping_faults(program, metric)]
    assert [fault.partition(":")[0] for fault in found] == [
        "student.store.lines['first'][0]",
        "metric's lock",
        "dspy.settings.callbacks[0].lines['first'][0]",
    ]
    assert all("lock cannot be pickled" in fault for fault in found)
    with pytest.raises(TypeError):
        pickle.dumps(lock)
