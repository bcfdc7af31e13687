"""The policy's calls from workers, answered by the engine of the process that began the run.

So exact tokens, versions of the weights, the verified publish and the wait in the engine's queue are what they are
without a cluster. In a worker: `RelayedHandle` stands for the engine's handle. In the run's process: `PolicyCalls`.
"""

import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Unpack, cast

import ray
from dspy import lm15
from ray import ObjectRef, cloudpickle
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dspy_fst.cluster.relay import QUEUED, WORKING, CallHeard, InFlight, Relay, Word
from dspy_fst.cluster.shipping import HandleNumber, packed_error, unpacked, unpacked_error
from dspy_fst.engine.base import QUEUEING, Completion, Through
from dspy_fst.engine.call_threads import Threads
from dspy_fst.engine.chat import Ids
from dspy_fst.engine.replies import ReplyReader
from dspy_fst.errors import EngineError, briefly
from dspy_fst.policy_lm import EngineHandle

logger = logging.getLogger(__name__)
TAKE_S = 1.0
"""Seconds after which the relay is asked again where nobody called (ours)."""
END_S = 30.0
"""Seconds in which the thread that waits for the relay notices its end (ours)."""
MOST_WAITING = 100_000
"""Calls that may wait in the relay at once (ours). Each waits inside the actor; beyond this no answer gets in."""


# ---- in a worker ---------------------------------------------------------------------------------


class Line:
    """A worker's way to the run's process. One chunk is played at a time."""

    def __init__(self, relay: ActorProxy[Relay]):
        self._relay, self.chunk = relay, ""
        self._handles: dict[int, RelayedHandle] = {}

    def say(self, in_flight: int) -> None:
        """So many of the chunk's rollouts are in flight."""
        self._relay.say.remote(self.chunk, in_flight)

    def ask(self, number: int, name: str, *arguments: object, **options: object) -> object:
        """Call a method of a handle in the run's process, or read its attribute. The engine's time limits apply there.

        Raises:
            EngineError: the process cannot be reached.
            Exception: what the method raised, of its own class.
        """
        call = cloudpickle.dumps((number, name, arguments, options))
        words = cast(Iterator[ObjectRef[Word]], self._relay.ask.remote(self.chunk, call))
        try:
            answer = _answer(ray.get(word) for word in words)
        except RayError as error:
            raise EngineError(f"the process that began the run cannot be reached: {briefly(error)}") from error
        good, told = pickle.loads(answer)
        if not good:
            raise unpacked_error(told)
        value: object = pickle.loads(told)
        return value

    def handle(self, sent: HandleNumber) -> "RelayedHandle":
        """What stands for a handle here; the same one each time."""
        if sent.number not in self._handles:
            self._handles[sent.number] = RelayedHandle(self, sent)
        return self._handles[sent.number]


def _answer(words: Iterator[Word]) -> bytes:
    """The last word; the time from each QUEUED to the next word counts as the wait for the engine's queue."""
    word: Word = QUEUED
    while isinstance(word, str):
        with QUEUEING.get()() if word == QUEUED else nullcontext():
            word = next(words)
    return word


class RelayedEngine:
    """Samples in the run's process."""

    weights = "those of the run's process"

    def __init__(self, line: Line, number: int):
        self._line, self._number = line, number

    def complete(
        self, request: lm15.Request, seed: int, prompt_ids: Ids | None = None, **through: Unpack[Through]
    ) -> Completion:
        known = () if prompt_ids is None else (prompt_ids,)
        completion = self._line.ask(self._number, "sample", request, seed, *known, **through)
        assert isinstance(completion, Completion)
        return completion


class RelayedHandle(EngineHandle):
    """An engine's handle in a worker. It starts nothing."""

    def __init__(self, line: Line, sent: HandleNumber):
        super().__init__(sent.folder, "in_process", {}, sent.version)
        self.sent, self._line = sent, line
        self._engine = RelayedEngine(line, sent.number)  # type: ignore[assignment]  # it is only asked

    @property
    def reader(self) -> ReplyReader:
        """The reader of the run's process, as the model's folder need not exist here; fetched once."""
        with self._lock:
            if self._reader is None:
                reader = self._line.ask(self.sent.number, "reader")
                assert isinstance(reader, ReplyReader)
                self._reader = reader
            return self._reader


def sent_before(handle: EngineHandle) -> HandleNumber | None:
    """The number under which a handle came to this worker; None for one that a program made here."""
    return handle.sent if isinstance(handle, RelayedHandle) else None


# ---- in the run's process ------------------------------------------------------------------------


@dataclass
class Progress:
    """What is known of a chunk that was handed to the cluster."""

    in_flight: int = 0
    """Of its rollouts. 0 before a worker takes it: an engine that waited for them would wait for a free CPU."""
    began: bool = False
    """Whether a worker has taken it."""
    open_calls: int = 0
    """Its calls that are not answered yet."""
    heard_at: float = field(default_factory=time.monotonic)


class PolicyCalls:
    """Takes the calls of all workers from the relay, and answers them in threads.

    Args:
        cluster: Ends this before the connection to the cluster ends.
        in_flight: Called with the number of rollouts in flight on all workers (an engine's ``expect``).
    """

    def __init__(self, cluster: ExitStack, in_flight: Callable[[int], None]):
        self.chunks: dict[str, Progress] = {}
        self.lost: Exception | None = None
        """What ended the relay."""
        self._in_flight = in_flight
        self._handles: list[EngineHandle] = []
        self._lock, self._telling, self._counting = threading.Lock(), threading.Lock(), threading.Lock()
        self._threads = Threads("ray-call")
        self._over = threading.Event()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(Relay).options(num_cpus=0, max_concurrency=MOST_WAITING, scheduling_strategy=here)
        self.relay = actor.remote()
        self._taking = threading.Thread(target=self._take, name="ray-calls", daemon=True)
        self._taking.start()
        cluster.callback(self.close)

    def close(self) -> None:
        """End the relay, and wait for the thread that asks it, so that nothing asks Ray while it disconnects."""
        with self._telling:
            self._over.set()
        if ray.is_initialized():  # else Ray would begin a cluster, to end an actor in it
            ray.kill(cast(ActorHandle[Relay], self.relay))  # its type names the actor's methods, too
        self._taking.join(END_S)

    def numbered(self, handle: EngineHandle) -> HandleNumber:
        """A handle's number, under which it is asked from now on."""
        with self._lock:
            if not any(handle is known for known in self._handles):
                self._handles.append(handle)
            number = next(i for i, known in enumerate(self._handles) if known is handle)
        return HandleNumber(number, str(handle.checkpoint.folder), handle.checkpoint.version)

    def handle(self, sent: HandleNumber) -> EngineHandle:
        return self._handles[sent.number]

    def begin(self, chunk: str) -> None:
        """A chunk was handed to the cluster."""
        with self._lock:
            self.chunks[chunk] = Progress()

    def end(self, chunk: str) -> None:
        """Forget a chunk; what is still heard of it does not count."""
        with self._lock:
            self.chunks.pop(chunk, None)
        self._tell_in_flight()

    def _tell_in_flight(self) -> None:
        with self._counting:  # one step, so that a count that is older is not told last
            with self._lock:
                count = sum(progress.in_flight for progress in self.chunks.values())
            self._in_flight(count)

    def _take(self) -> None:
        try:
            while not self._over.is_set():
                for message in ray.get(self.relay.take.remote(TAKE_S)):
                    self._hear(message)
        except Exception as error:  # else a run would wait for calls that nobody takes
            self.lost = error

    def _hear(self, heard: CallHeard | InFlight) -> None:
        with self._lock:
            progress = self.chunks.get(heard.chunk)
            if progress is not None:
                progress.began, progress.heard_at = True, time.monotonic()
                if isinstance(heard, CallHeard):
                    progress.open_calls += 1
                else:
                    progress.in_flight = heard.in_flight
        if isinstance(heard, CallHeard):
            self._threads.start(partial(self._answer, heard.chunk, heard.number, heard.call))
        else:
            self._tell_in_flight()

    def _answer(self, chunk: str, number: int, call: bytes) -> None:
        self._tell(number, WORKING)
        QUEUEING.set(partial(self._queued, number))
        try:
            answer = True, cloudpickle.dumps(self._called(call))
        except BaseException as error:  # a worker that is told nothing waits for ever
            answer = False, packed_error(error)
        self._tell(number, pickle.dumps(answer))
        with self._lock:
            if (progress := self.chunks.get(chunk)) is not None:
                progress.open_calls, progress.heard_at = progress.open_calls - 1, time.monotonic()

    def _called(self, call: bytes) -> object:
        asked = cast(tuple[int, str, tuple[object, ...], dict[str, object]], unpacked(call, self.handle))
        number, name, arguments, options = asked
        what: object = getattr(self._handles[number], name)
        return what(*arguments, **options) if callable(what) else what

    @contextmanager
    def _queued(self, number: int) -> Iterator[None]:
        self._tell(number, QUEUED)
        try:
            yield
        finally:
            self._tell(number, WORKING)

    def _tell(self, number: int, word: Word) -> None:
        """A call that ends after the run is told nothing: Ray would begin a cluster, to tell it there."""
        with self._telling, suppress(RayError):
            if not self._over.is_set() and ray.is_initialized():
                self.relay.tell.remote(number, word)
