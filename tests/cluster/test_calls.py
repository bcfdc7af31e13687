"""What passes between a worker and the run's process, without a cluster."""

import asyncio
import queue
import threading
from dataclasses import replace

import dspy
import pytest
from dspy import lm15

from dspy_fst.cluster.policy_calls import _answer
from dspy_fst.cluster.ray_rollouter import Chunk, _Playing, _sent, arrived
from dspy_fst.cluster.relay import QUEUED, WORKING, CallHeard, InFlight, Relay
from dspy_fst.cluster.shipping import packed, packed_error, shipping_faults, unpacked, unpacked_error
from dspy_fst.errors import ConfigurationError, EngineError, SyncError
from dspy_fst.preflight.cluster_checks import cluster_faults
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.rollout.worker_pool import QueueTime
from dspy_fst.types import Call, Candidate, Rollout
from tests.cluster.play import LAB, Placed, policy


@pytest.mark.parametrize(
    "error",
    [
        lm15.ContextLengthError("the prompt has 9 tokens", provider="vllm", status=400),
        lm15.UnsupportedFeatureError("top_p=0.9"),
        lm15.TransportError("reset", retry_after=2),
        FileNotFoundError(2, "No such file", "/index"),
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
    error.held = (line for line in ())
    again = unpacked_error(packed_error(error))
    assert type(again) is EngineError
    assert str(again) == "OSError: no route"
    assert str(unpacked_error(packed_error(asyncio.CancelledError()))) == "CancelledError: CancelledError"


def test_only_the_time_in_the_engine_s_queue_counts_as_queueing():
    def words():
        for word, seconds in ((WORKING, 1), (QUEUED, 10), (WORKING, 100), (b"answer", 1000)):
            now[0] += seconds
            yield word

    now = [0.0]
    queue_time = QueueTime(lambda: now[0])
    with queue_time.counting():
        assert _answer(words()) == b"answer"
    assert queue_time.seconds == 101  # before the first word, and from QUEUED to the next


def test_the_relay_passes_each_answer_to_whoever_asked():
    async def play() -> list[list[str | bytes]]:
        relay = Relay()
        asked = [asyncio.create_task(collect(relay.ask("chunk", bytes([n])))) for n in range(2)]
        await asyncio.sleep(0)
        await relay.say("chunk", 7)
        heard = await relay.take(1.0)
        assert heard == [CallHeard("chunk", 0, b"\0"), CallHeard("chunk", 1, b"\1"), InFlight("chunk", 7)]
        for message in reversed(heard[:2]):
            await relay.tell(message.number, WORKING)
            await relay.tell(message.number, message.call)
        await relay.tell(99, b"nobody asked")
        assert await relay.take(0.01) == []
        return [await task for task in asked]

    async def collect(words) -> list[str | bytes]:
        return [word async for word in words]

    assert asyncio.run(play()) == [[WORKING, b"\0"], [WORKING, b"\1"]]


# ---- what goes ---------------------------------------------------------------------------------------


def sent(value):
    """The value as it arrives."""
    return unpacked(packed(value, lambda handle: None), lambda number: pytest.fail("no handle was sent"))


def test_a_lock_is_a_new_one_that_nobody_holds():
    held = threading.Lock()
    held.acquire()
    first, same, condition, waiting = sent([held, held, threading.Condition(), queue.Queue()])
    assert first is same
    assert first is not held
    assert not first.locked()
    with condition:
        condition.notify()
    waiting.put("an item")
    assert waiting.get(timeout=1) == "an item"


def test_a_retriever_and_a_parallel_call_of_dspy_are_sent():
    numpy = pytest.importorskip("numpy")
    found = sent(dspy.Embeddings(["only"], lambda texts: numpy.ones((len(texts), 2)), k=1))
    assert found("which?").passages == ["only"]
    assert type(sent(dspy.Parallel())) is dspy.Parallel


def test_the_history_of_an_lm_stays():
    lm = dspy.LM("openai/judge")
    lm.history.append({"response": (line for line in ())})
    assert sent({"lm": lm})["lm"].history == []
    assert len(lm.history) == 1


def test_a_class_of_a_notebook_that_is_here_stays_as_it_is():
    class Counted:
        count = 0

    data = packed(Counted(), lambda handle: None)
    Counted.count = 7
    again = unpacked(data, lambda number: pytest.fail("no handle was sent"))
    assert type(again) is Counted
    assert Counted.count == 7
    unpacked(data, lambda number: pytest.fail("no handle was sent"), classes_too=True)
    assert Counted.count == 0


# ---- how many at once --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "cpus", "sizes"), [(8, 3, [3, 3, 2]), (8, 20, [1] * 8), (2, 0, [2]), (30, 4, [3, 3, 3, 3])]
)
def test_num_threads_rollouts_are_in_flight_whatever_the_number_of_cpus(threads, cpus, sizes):
    tasks = range(12)  # only counted and cut
    playing = _Playing(None, None, Chunk(tasks, "draw", False, b""), cpus, RolloutSettings(num_threads=threads))
    given = []
    while places := playing._next():
        playing._given[object()] = places, ""
        given.append(places)
    assert [len(places) for places in given] == sizes
    played = set()
    while playing._given:  # the oldest ends
        played |= {*playing._given.pop(next(iter(playing._given)))[0]}
        while places := playing._next():
            playing._given[object()] = places, ""
        left = 12 - len(played)
        assert sum(len(places) for places, _ in playing._given.values()) == min(threads, left)
    assert played == {*tasks}


# ---- what cannot go ----------------------------------------------------------------------------------


class Connected:
    def __init__(self):
        self.lines = {"first": [(line for line in ())]}


def test_what_can_be_sent_is_no_fault():
    with dspy.context(lm=policy(), adapter=dspy.JSONAdapter()):
        assert [*shipping_faults(student=Placed(policy()), metric=LAB.metric)] == []


def test_each_thing_that_cannot_be_sent_is_named_with_its_place():
    program = Placed(policy())
    program.store = Connected()
    lines = (line for line in ())

    def metric(gold, pred, trace=None):
        return float(next(lines))

    example = LAB.trainset[0].copy(rows=Connected())
    with dspy.context(callbacks=[Connected()]):
        found = [*cluster_faults("local", program, metric, [LAB.trainset[0], example], [])]
    assert [fault.partition(":")[0] for fault in found] == [
        "student.store.lines['first'][0]",
        "metric's lines",
        "trainset[1]._store['rows'].lines['first'][0]",
        "dspy.settings.callbacks[0].lines['first'][0]",
    ]
    assert all("a generator cannot be pickled" in fault for fault in found)


class Twice(Exception):
    """Is pickled with its one word, and cannot be made of it again."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def test_a_rollout_whose_prediction_cannot_be_sent_or_read_is_masked_with_what_it_held():
    def there(rollout):
        return arrived(_sent(rollout), lambda number: pytest.fail("no handle was sent"))

    call = Call("answer", (1,), (2,), (-0.5,), "stop", "base")
    good = Rollout(0, Candidate({"answer": "Sort."}), (call,), 1.0, trace=("first",), asked=("asked",))
    assert there(good) == good
    assert there(replace(good, prediction=dspy.Prediction(answer="1"))).prediction.answer == "1"
    odd = {
        "prediction cannot be pickled": ((row for row in ()), "a generator cannot be pickled"),
        "prediction or trace cannot be read again": (Twice("no", "route"), "TypeError: Twice.__init__"),
    }
    for reason, (value, detail) in odd.items():
        masked = there(replace(good, prediction=dspy.Prediction(why=value)))
        assert (masked.problem, masked.candidate, masked.reward, masked.prediction) == (0, good.candidate, None, None)
        assert masked.calls == (call,)
        assert masked.outcome.label == f"masked: ray: {reason}"
        assert detail in masked.outcome.detail
