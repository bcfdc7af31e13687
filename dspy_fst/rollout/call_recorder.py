"""Every LM call of a rollout, kept with its exact tokens.

A `Recording` lives in DSPy's context for the time of one rollout, so it follows the program into threads
(dspy.Parallel) and tasks (asyncio). The policy's engine asks for it on every call.

Every reply is asked for once. Two habits of DSPy 3.4 would ask again: ChatAdapter after a reply that does not parse
(`no_second_call`), and dspy.Parallel after a slow one (`parallel_calls_once`).
"""

import functools
import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal

import dspy
from dspy import lm15
from dspy.clients.call_context import stream_emitted
from dspy.utils.parallelizer import ParallelExecutor

from dspy_fst.engine.base import Completion
from dspy_fst.engine.queueing import QueueTime, counted_in
from dspy_fst.errors import EngineError
from dspy_fst.types import PREDICTOR_TAG, Call

SETTING = "fst_recording"
"""Name of the DSPy context setting that holds the current Recording."""
Ids = tuple[int, ...]
Conversation = tuple[tuple[Any, ...], ...]
"""Role and parts of every message, the system's first."""
OUTSIDE = ""
"""Predictor name of a call that no predictor of the program made (the program called its LM directly)."""


class Recording:
    """The calls of one rollout in the order in which they ended, and the seed that its draws descend from."""

    def __init__(self, seed: int):
        self.seed = seed
        self.queue_time = QueueTime()
        """How long calls of this rollout have waited for their turn in the engine."""
        self._calls: list[Call] = []
        self._said: list[tuple[Conversation, Ids]] = []
        self._asked: Counter[tuple[str, int]] = Counter()
        self._lock = threading.Lock()
        self._closed = False
        self._why = ""

    def next_seed(self, predictor: str, request: lm15.Request) -> int:
        """Seed of a call: of the rollout, the predictor, the prompt and how often it was asked before.

        Not of the call's place in time, which differs between runs when a program calls in parallel.
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
                self._said.append((_conversation(request), (*call.prompt_ids, *call.completion_ids)))

    def said_before(self, request: lm15.Request) -> list[tuple[int, Ids]]:
        """The calls whose messages this request repeats and goes on from, with a reply: messages and ids of each.

        The longest conversation comes first; calls of equal length in an order that does not depend on time.
        """
        now = _conversation(request)
        with self._lock:
            said = list(self._said)
        found = [
            (len(earlier), ids)
            for earlier, ids in said
            if earlier == now[: len(earlier)] and len(now) > len(earlier) and now[len(earlier)][0] == "assistant"
        ]
        return sorted(found, key=lambda one: (-one[0], one[1]))

    def close(self, why: str = "this rollout was given up (timeout)") -> tuple[Call, ...]:
        """Take the calls; whatever the program's left-over threads still ask is refused from now on, saying why."""
        with self._lock:
            self._closed, self._why = True, why
            return tuple(self._calls)

    @property
    def closed(self) -> str | None:
        """Why late calls are refused; None while calls are taken."""
        with self._lock:
            return self._why if self._closed else None

    def apart(self) -> "Apart":
        """For calls that are made during the rollout and are not the program's: a metric that asks a judge."""
        return Apart(self)

    @property
    def last_predictor(self) -> str | None:
        with self._lock:
            return self._calls[-1].predictor if self._calls else None


METRIC = "(metric)"
"""Stands for the predictor in the seeds of calls that a metric makes of the policy."""


class Apart:
    """Gives a metric's calls of the policy seeds of the rollout, so that a run that goes on draws them again. They are
    kept nowhere: nobody trains on what a judge says."""

    def __init__(self, recording: Recording):
        self._recording = recording
        self.queue_time = recording.queue_time

    def next_seed(self, predictor: str, request: lm15.Request) -> int:
        return self._recording.next_seed(f"{METRIC}{predictor}", request)


def tag_predictors(program: dspy.Module) -> None:
    """Write each predictor's name on it, so that copies made inside the program (BestOfN) keep it."""
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


def is_recorded(lm: Any) -> bool:
    """Whether an LM's calls are recorded, and so can be trained."""
    return bool(getattr(lm, RECORDED, False))


def complete_recorded(
    complete: Callable[..., Completion],
    request: lm15.Request,
    free_seed: Callable[[], int],
    continued: Callable[[lm15.Request, Sequence[Ids]], Ids | None] = lambda request, said: None,
) -> lm15.Response:
    """Sample one reply and, when a rollout is running in this context, record it.

    Args:
        complete: The engine's method, called with the request, the seed, and the prompt's ids where they are known.
        free_seed: Gives the seed of a call that belongs to no rollout.
        continued: Gives the prompt of a request that goes on from one of some earlier calls' ids, or None.
    """
    recording: Recording | Apart | None = dspy.settings.get(SETTING)
    if recording is None:
        return complete(request, free_seed()).response
    seed, prompt_ids, record = _begun(recording, request, continued)
    with counted_in(recording.queue_time):
        completion = complete(request, seed) if prompt_ids is None else complete(request, seed, prompt_ids)
    record(completion)
    return completion.response


def stream_recorded(
    stream: Callable[[lm15.Request, int, Ids | None], Generator[str, None, Completion]],
    request: lm15.Request,
    free_seed: Callable[[], int],
    continued: Callable[[lm15.Request, Sequence[Ids]], Ids | None] = lambda request, said: None,
) -> Generator[str, None, Completion]:
    """`complete_recorded` for a reply that is told in pieces; one that is not heard to its end is not recorded."""
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
    """Of a call that begins now: its seed, its prompt's ids where they are known, and what records its end."""
    predictor = calling_predictor()
    seed = recording.next_seed(predictor, request)
    if isinstance(recording, Apart):
        return seed, None, lambda completion: None
    said, temperature = recording.said_before(request), request.config.temperature

    def record(completion: Completion) -> None:
        recording.add(
            Call(
                predictor=predictor,
                prompt_ids=completion.prompt_ids,
                completion_ids=completion.completion_ids,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                weights=completion.weights,
                temperature=1.0 if temperature is None else temperature,
                reasoning_tokens=completion.reasoning_tokens,
                cut_by_context=_cut_by_context(completion, request.config.max_tokens),
                turn=_turn(completion.prompt_ids, said),
            ),
            request,
        )

    return seed, continued(request, [ids for _, ids in said]) if said else None, record


def _turn(prompt_ids: Ids, said: Sequence[tuple[int, Ids]]) -> Literal["first", "continued", "rerendered"]:
    """What became of the last turn; one that goes on from an older turn only has the last one's reply written anew."""
    if not said:
        return "first"
    last = [ids for messages, ids in said if messages == said[0][0]]
    return "continued" if any(prompt_ids[: len(ids)] == ids for ids in last) else "rerendered"


def _conversation(request: lm15.Request) -> Conversation:
    """What a chat template can show of a request's messages; ids of tool calls are made anew for each request."""
    system = (("system", repr(request.system)),) if request.system else ()
    return (*system, *((message.role, *map(_shown, message.parts)) for message in request.messages))


def _shown(part: Any) -> Any:
    if isinstance(part, lm15.ToolCallPart):
        return ("call", part.name, repr(part.input))
    if isinstance(part, lm15.ToolResultPart):
        return ("result", part.name, repr(part.content))
    return part.text if isinstance(part, lm15.TextPart) else repr(part)


def _cut_by_context(completion: Completion, max_tokens: int | None) -> bool:
    """Whether a reply was cut before it had the tokens that were asked for: the model's context was full."""
    return completion.finish_reason == "length" and (max_tokens is None or len(completion.completion_ids) < max_tokens)


# ---- DSPy asks for each reply once ----------------------------------------------------------------

_MARK = "_fst_once"


def parallel_calls_once() -> None:
    """Have DSPy's ParallelExecutor submit each call once inside a rollout; to say it twice changes nothing more.

    dspy.Parallel submits a call again that is slower than its limit (120 s), uses the first of the two answers and
    leaves the other running. The calls of both would be recorded, and a call that the program never used would be
    trained on with the program's reward. A rollout has a time limit of its own (``rollout_timeout_s``). Outside of a
    rollout nothing changes.
    """
    execute = ParallelExecutor.execute
    if not hasattr(execute, _MARK):
        setattr(ParallelExecutor, "execute", _once(execute))  # noqa: B010 (a plain assignment is refused by mypy)


def _once(execute: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(execute)
    def once(self: ParallelExecutor, function: Callable[..., Any], data: Any) -> Any:
        if isinstance(dspy.settings.get(SETTING), Recording):
            self.timeout = 0  # DSPy's word for: never submit again
        return execute(self, function, data)

    setattr(once, _MARK, True)
    return once


def no_second_call() -> None:
    """Call it behind a reply, in the context of the adapter that asked for it: a failed parse is then an error.

    ChatAdapter, and the adapters made of it, ask no LM again in JSON once a reply was shown to whoever streams
    (dspy/adapters/chat_adapter.py, dspy/clients/call_context.py). Replies count as shown here, so the rule holds for
    every adapter, also for one that a program makes inside ``forward``, and changes no adapter that other LMs are asked
    through.
    """
    stream_emitted()
