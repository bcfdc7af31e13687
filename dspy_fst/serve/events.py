"""Server-sent events: from the threads that work to the caller who listens."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine

from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.types import Receive, Scope, Send

from dspy_fst.errors import EngineError


class ListenerGoneError(EngineError):
    """The caller has left the stream."""


PING_S = 15.0
"""Silence in seconds after which a comment is sent: proxies close idle connections."""


class Feed:
    """Events of one request. `send` may be called in any thread; create and read the feed in the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._closed = False

    def send(self, data: object, event: str | None = None) -> None:
        """Send an event to the listener.

        Raises:
            ListenerGoneError: the listener has left, so the work can stop.
        """
        text = data if isinstance(data, str) else json.dumps(data)
        self._put(format_sse_event(data_str=text, event=event))

    def _put(self, item: bytes | None) -> None:
        if self._closed or self._loop.is_closed():
            raise ListenerGoneError("the caller left in the middle of a stream")
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def listen(self, work: Coroutine[object, object, None]) -> AsyncGenerator[bytes, None]:
        """Yield the events that are sent while the work runs, then raise what the work raised.

        The work is cancelled when the reader stops.
        """
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._queue.put_nowait(None))
        try:
            while True:
                try:
                    item = await asyncio.wait_for(self._queue.get(), PING_S)
                except TimeoutError:
                    item = KEEPALIVE_COMMENT
                if item is None:
                    break
                yield item
            await task
        finally:
            self._closed = True
            task.cancel()


class EventStream(StreamingResponse):
    """A reply of events. Its source is closed when the reply ends, however it ends."""

    def __init__(self, source: AsyncGenerator[bytes, None]):
        super().__init__(source, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._source.aclose()
