"""Every LM call of a rollout, recorded with its exact tokens.

During a rollout a `Recording` is a setting of DSPy's context, so it follows the program into threads (dspy.Parallel)
and tasks (asyncio). The policy's LM looks it up at every call.

Each reply is requested once. DSPy 3.4 would request two kinds of replies again: ChatAdapter one that does not parse
(`no_second_call`), and dspy.Parallel one that is slow (`parallel_calls_once`).
"""

import functools
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Literal
from weakref import WeakSet

import dspy
from dspy import lm15
from dspy.clients.call_context import stream_emitted
from dspy.utils import parallelizer
from dspy.utils.parallelizer import ParallelExecutor

from dspy_fst.engine.base import Completion
from dspy_fst.errors import EngineError
from dspy_fst.rollout.worker_pool import QueueTime
from dspy_fst.types import PREDICTOR_TAG, Call

SETTING = "fst_recording"
"""Name of the setting of DSPy's context that holds the current Recording."""
Ids = tuple[int, ...]
Conversation = tuple[tuple[object, ...], ...]
"""Role and parts of every message, the system's first, e.g. ``(("user", "Sort 2 1"), ("assistant", "1 2"))``."""
OUTSIDE = ""
"""Predictor name of a call that no predictor made: the program called its LM directly."""


class Recording:
    """The calls of one rollout, in the order in which they ended, and the seed from which their seeds are derived."""

    def __init__(self, seed: int):
        self.seed = seed
        self.queue_time = QueueTime()
        """How long this rollout's calls have waited for their turn in the engine."""
        self._calls: list[Call] = []
        self._conversations: list[tuple[Conversation, Ids]] = []
        """Messages and ids of each call, the reply's ids included."""
        self._asked: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()
        self._closed = False
        self._why = ""

    def next_seed(self, predictor: str, request: lm15.Request) -> int:
        """A call's seed, from the rollout's seed, the predictor, the prompt, and how often that was asked before.

        The call's place in time does not count: it differs between runs when a program calls in parallel.

        Raises:
            EngineError: the recording is closed.
        """
        text = repr((request.system, request.messages))
        digest = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        with self._lock:
            if self._closed:
                raise EngineError(f"{self._why}; its late calls are refused")
            nth = self._asked[predictor, digest]
            self._asked[predictor, digest] += 1
        entropy = repr((self.seed, predictor, digest, nth)).encode()
        return int.from_bytes(hashlib.sha256(entropy).digest()[:4], "big") >> 1

    def add(self, call: Call, request: lm15.Request) -> None:
        with self._lock:
            if not self._closed:
                self._calls.append(call)
                self._conversations.append((_conversation(request), (*call.prompt_ids, *call.completion_ids)))

    def continued_by(self, request: lm15.Request) -> list[tuple[int, Ids]]:
        """The earlier calls that a request continues: the number of messages and the ids of each.

        A request continues a call if it repeats the call's messages, and a reply follows them. The longest conversation
        comes first. Calls of equal length have an order that does not depend on time.
        """
        now = _conversation(request)
        with self._lock:
            conversations = list(self._conversations)
        found = [
            (len(earlier), ids)
            for earlier, ids in conversations
            if earlier == now[: len(earlier)] and len(now) > len(earlier) and now[len(earlier)][0] == "assistant"
        ]
        return sorted(found, key=lambda call: (-call[0], call[1]))

    def close(self, why: str = "this rollout was given up (timeout)") -> tuple[Call, ...]:
        """End the recording and return its calls. Calls of threads that still run are refused, with the reason."""
        with self._lock:
            self._closed, self._why = True, why
            return tuple(self._calls)

    @property
    def closed(self) -> str | None:
        """Why calls are refused; None while they are recorded."""
        with self._lock:
            return self._why if self._closed else None

    def apart(self) -> "Apart":
        """For calls during the rollout that are not the program's, such as those of a metric that asks a judge."""
        return Apart(self)

    @property
    def last_predictor(self) -> str | None:
        """The predictor whose call ended last; None before the first call."""
        with self._lock:
            return self._calls[-1].predictor if self._calls else None


METRIC = "(metric)"
"""Stands for the predictor in the seeds of calls that a metric makes of the policy."""


class Apart:
    """Gives a metric's calls of the policy seeds that descend from the rollout's, so a resumed run samples them again.

    These calls are not recorded: a judge's replies are not trained on.
    """

    def __init__(self, recording: Recording):
        self._recording = recording
        self.queue_time = recording.queue_time

    def next_seed(self, predictor: str, request: lm15.Request) -> int:
        return self._recording.next_seed(f"{METRIC}{predictor}", request)


def tag_predictors(program: dspy.Module) -> None:
    """Write each predictor's name on it. Copies that the program makes of a predictor (BestOfN) keep the name."""
    for name, predictor in program.named_predictors():
        setattr(predictor, PREDICTOR_TAG, name)


def calling_predictor() -> str:
    """Name of the innermost tagged predictor that is running in this context."""
    for module in reversed(dspy.settings.caller_modules or []):
        if (name := getattr(module, PREDICTOR_TAG, None)) is not None:
            return str(name)
    return OUTSIDE


RECORDED = "_fst_recorded"
"""Attribute of an LM whose calls are recorded."""


def is_recorded(lm: object) -> bool:
    """Whether an LM's calls are recorded, so that they can be trained on: whether it is a PolicyLM."""
    return bool(getattr(lm, RECORDED, False))


def complete_recorded(
    complete: Callable[..., Completion],
    request: lm15.Request,
    free_seed: Callable[[], int],
    continued: Callable[[lm15.Request, Sequence[Ids]], Ids | None] = lambda request, said: None,
) -> lm15.Response:
    """Sample one reply and, when a rollout is running in this context, record it.

    Args:
        complete: The engine's method. It is called with the request, the seed, and the prompt's ids where they are
            known.
        free_seed: Returns the seed of a call that belongs to no rollout.
        continued: Returns the prompt's ids of a request that continues one of some earlier calls, given their ids;
            else None.
    """
    recording: Recording | Apart | None = dspy.settings.get(SETTING)
    if recording is None:
        return complete(request, free_seed()).response
    seed, prompt_ids, record = _begun(recording, request, continued)
    with recording.queue_time.counting():
        completion = complete(request, seed) if prompt_ids is None else complete(request, seed, prompt_ids)
    record(completion)
    return completion.response


def stream_recorded(
    stream: Callable[[lm15.Request, int, Ids | None], Generator[str, None, Completion]],
    request: lm15.Request,
    free_seed: Callable[[], int],
    continued: Callable[[lm15.Request, Sequence[Ids]], Ids | None] = lambda request, said: None,
) -> Generator[str, None, Completion]:
    """`complete_recorded` for a streamed reply. A stream that is not read to its end is not recorded."""
    recording: Recording | Apart | None = dspy.settings.get(SETTING)
    if recording is None:
        return (yield from stream(request, free_seed(), None))
    seed, prompt_ids, record = _begun(recording, request, continued)
    completion = yield from stream(request, seed, prompt_ids)
    record(completion)
    return completion


def _begun(
    recording: Recording | Apart,
    request: lm15.Request,
    continued: Callable[[lm15.Request, Sequence[Ids]], Ids | None],
) -> tuple[int, Ids | None, Callable[[Completion], None]]:
    """For a call that begins: its seed, its prompt's ids where they are known, and the function that records it."""
    predictor = calling_predictor()
    seed = recording.next_seed(predictor, request)
    if isinstance(recording, Apart):
        return seed, None, lambda completion: None
    earlier = recording.continued_by(request)

    def record(completion: Completion) -> None:
        recording.add(call_of(predictor, request, completion, _turn(completion.prompt_ids, earlier)), request)

    return seed, continued(request, [ids for _, ids in earlier]) if earlier else None, record


def call_of(
    predictor: str, request: lm15.Request, completion: Completion, turn: Literal["first", "continued", "rerendered"]
) -> Call:
    """The record of one reply."""
    config = request.config
    return Call(
        predictor=predictor,
        prompt_ids=completion.prompt_ids,
        completion_ids=completion.completion_ids,
        logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        weights=completion.weights,
        temperature=1.0 if config.temperature is None else config.temperature,
        reasoning_tokens=completion.reasoning_tokens,
        cut_by_context=_cut_by_context(completion, config.max_tokens),
        turn=turn,
        max_tokens=config.max_tokens,
    )


def _turn(prompt_ids: Ids, earlier: Sequence[tuple[int, Ids]]) -> Literal["first", "continued", "rerendered"]:
    """How the prompt relates to the earlier calls that it continues (see `Call.turn`).

    A prompt that begins with the ids of an older call, and not with those of the last one, is "rerendered".
    """
    if not earlier:
        return "first"
    last = [ids for messages, ids in earlier if messages == earlier[0][0]]
    return "continued" if any(prompt_ids[: len(ids)] == ids for ids in last) else "rerendered"


def _conversation(request: lm15.Request) -> Conversation:
    """What a chat template can show of a request's messages. Ids of tool calls, new in each request, are left out."""
    system = (("system", repr(request.system)),) if request.system else ()
    return (*system, *((message.role, *map(_shown, message.parts)) for message in request.messages))


def _shown(part: object) -> object:
    if isinstance(part, lm15.ToolCallPart):
        return ("call", part.name, repr(part.input))
    if isinstance(part, lm15.ToolResultPart):
        return ("result", part.name, repr(part.content))
    return part.text if isinstance(part, lm15.TextPart) else repr(part)


def _cut_by_context(completion: Completion, max_tokens: int | None) -> bool:
    """Whether a reply was cut before it had ``max_tokens`` tokens, because the model's context was full."""
    return completion.finish_reason == "length" and (max_tokens is None or len(completion.completion_ids) < max_tokens)


# ---- each reply is requested once ----------------------------------------------------------------

_MARK = "_fst_once"


def parallel_calls_once() -> None:
    """Make DSPy's ParallelExecutor submit each call once inside a rollout. A second call of this function does nothing.

    dspy.Parallel submits a call again if it takes longer than a limit (120 s). It uses the first of the two answers and
    leaves the other call running. Both would be recorded, and a call that the program never used would be trained on
    with the program's reward. A rollout has a time limit of its own (``rollout_timeout_s``). Outside of rollouts
    nothing changes, but that several may begin at the same time (`_Bars`).
    """
    execute = ParallelExecutor.execute
    if not hasattr(execute, _MARK):
        bars = parallelizer.tqdm.tqdm
        bars._instances = _Bars(bars._instances)
        setattr(ParallelExecutor, "execute", _once(execute))  # noqa: B010 (mypy refuses a plain assignment)


class _Bars(WeakSet[object]):
    """tqdm's progress bars, which an executor empties as it begins (DSPy 3.4): also of those that another one is just
    making. tqdm then raised a KeyError, also where no bar is shown."""

    def remove(self, bar: object) -> None:
        self.discard(bar)

    def clear(self) -> None:
        with parallelizer.tqdm.tqdm.get_lock():  # under which tqdm reads them
            super().clear()


def _once(execute: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(execute)
    def once(self: ParallelExecutor, function: Callable[..., object], data: Sequence[object]) -> object:
        if isinstance(dspy.settings.get(SETTING), Recording):
            self.timeout = 0  # to DSPy this means: never submit again
        return execute(self, function, data)

    setattr(once, _MARK, True)
    return once


def no_second_call() -> None:
    """Make a failed parse of the reply just received an error. Call it in the context of the adapter that asked.

    ChatAdapter and its subclasses ask again in JSON when a reply does not parse, except if the reply was already
    streamed to a user (dspy/adapters/chat_adapter.py, dspy/clients/call_context.py). This function declares the reply
    streamed. So the rule holds for every adapter, also for one that a program makes inside ``forward``, and no adapter
    of another LM is changed.
    """
    stream_emitted()
