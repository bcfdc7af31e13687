"""DSPy's contract of asynchronous engines over one of ours."""

from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Protocol

from dspy import lm15
from dspy.clients.engines.base import StreamEvent

from dspy_fst.engine.call_threads import CALLS
from dspy_fst.engine.stream_events import events_in_thread


class AskedHandle(Protocol):
    """The part of a handle that is asked."""

    def complete(self, request: lm15.Request) -> lm15.Response: ...

    def stream(self, request: lm15.Request) -> Iterator[StreamEvent]: ...


class AsyncHandle:
    """The same engine for ``acall``: each call waits in a thread of ours, so the loop and its own threads stay free."""

    def __init__(self, handle: AskedHandle):
        self._handle = handle

    async def complete(self, request: lm15.Request) -> lm15.Response:
        return await CALLS.run(partial(self._handle.complete, request))

    def stream(self, request: lm15.Request) -> AsyncIterator[StreamEvent]:
        """The reply's events as it is sampled."""
        return events_in_thread(self._handle.stream(request))

    async def aclose(self) -> None:
        """DSPy closes LMs it does not own the engine of; only `PolicyLM.release` stops ours."""

    def __deepcopy__(self, memo: dict[int, object]) -> "AsyncHandle":
        return self
