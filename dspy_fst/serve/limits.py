"""The middleware that every request passes before the app: key, size, queue and time limit. It knows no endpoint.

The checks are in this order: key, shutdown, readiness, a place in the queue, body, slot. So a stranger costs no memory,
and the body of a request that will be refused is not read.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from fastapi.sse import format_sse_event
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspy_fst.engine.machine import is_loopback
from dspy_fst.serve.admission import AdmissionQueue, QueueFullError, Ticket
from dspy_fst.serve.error_replies import ApiError, internal_error
from dspy_fst.serve.prometheus import Metrics
from dspy_fst.serve.serving_settings import (
    DOCS,
    DOCS_FILES,
    HEALTH,
    MODELS,
    READY,
    RESERVED,
    SCHEMA,
    ServeSettings,
)

logger = logging.getLogger(__name__)

OPEN = (HEALTH, READY, DOCS, SCHEMA)
"""Paths that need no key: they describe the server and reveal no requests."""
CLIENT_GONE = 499
"""The status counted for a request whose caller left before the reply."""


class _GoneError(Exception):
    """The caller left."""


class Limits:
    """ASGI middleware.

    Args:
        work: Paths whose POST requests take a slot.
        not_ready: Returns why no request can be answered now, or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeSettings,
        queue: AdmissionQueue,
        metrics: Metrics,
        work: Iterable[str],
        not_ready: Callable[[], str | None],
    ):
        self.app, self.settings, self.queue, self.metrics = app, settings, queue, metrics
        self._work, self._not_ready = frozenset(work), not_ready
        self._endpoints = {*self._work, *RESERVED}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        reply = _Reply(send, self.queue, bodiless=scope["method"] == "HEAD")
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # load balancers use HEAD, which FastAPI's routes would refuse
        try:
            await self._guarded(scope, receive, reply)
        except ApiError as error:
            self.metrics.error(error.code)
            await reply.fail(error, scope, receive)
        except _GoneError:
            logger.info("the caller of %s left before the reply", scope["path"])
        except Exception:
            logger.exception("a request to %s failed", scope["path"])
            self.metrics.error("internal")
            await reply.fail(internal_error(), scope, receive)
        finally:
            # Unknown paths are counted together: each would otherwise stay in memory for good.
            self.metrics.request(
                self._endpoint(scope["path"]), reply.status or CLIENT_GONE, time.perf_counter() - began
            )

    def _endpoint(self, path: str) -> str:
        if path.startswith(f"{MODELS}/"):
            return MODELS
        return path if path in self._endpoints else "other"

    async def _guarded(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN and not scope["path"].startswith(f"{DOCS_FILES}/"):
            self._check_caller(headers)
        if scope["method"] != "POST" or scope["path"] not in self._work:
            await self.app(scope, receive, reply)
            return
        self._check_open()
        try:
            async with self.queue.admitted(self.settings.timeout_s) as ticket:
                body = await self._body(headers, receive)
                await self._answer(ticket, body, scope, receive, reply)
        except QueueFullError:
            message = (
                f"{self.queue.slots} requests are running and {self.queue.max_waiting} are waiting; try again later."
            )
            raise ApiError(429, "queue_full", message, headers=self._retry_after()) from None
        except TimeoutError:
            raise self._too_late() from None

    async def _answer(self, ticket: Ticket, body: bytes, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        """Wait for a slot and let the app reply, unless the caller leaves before.

        Otherwise callers who have left would keep slots and places in the queue from others.

        Raises:
            _GoneError: the caller left; the work for it is cancelled.
        """
        scope.setdefault("state", {})["ticket"] = ticket
        left = asyncio.ensure_future(_leaving(receive))

        async def work() -> None:
            await ticket.turn()
            await self.app(scope, _replayed(body, left), reply)

        working = asyncio.ensure_future(work())
        try:
            await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
            # The server also reports a disconnect when the reply is complete and the app is about to return.
            if not working.done() and not reply.is_whole:
                raise _GoneError
            await working
        finally:
            left.cancel()
            working.cancel()
            await asyncio.wait({working})

    def _check_caller(self, headers: Headers) -> None:
        if self.settings.api_key is None:
            # A web page can let its own host name resolve to 127.0.0.1 and then call this server (DNS rebinding).
            if not is_loopback(_host(headers.get("host", ""))):
                raise ApiError(403, "foreign_host", "A server without a key answers to localhost only.")
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.settings.api_key.encode()):
            message = "Send the server's key as 'Authorization: Bearer KEY'."
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})

    def _check_open(self) -> None:
        if self.queue.draining:
            raise ApiError(503, "draining", "The server is ending; ask another.", headers=self._retry_after())
        if (reason := self._not_ready()) is not None:
            raise ApiError(503, "not_ready", reason, headers=self._retry_after())

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self.settings.max_body_bytes
        declared = headers.get("content-length", "")
        too_large = ApiError(413, "too_large", f"The body has more than {limit} bytes.")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)

    def _too_late(self) -> ApiError:
        if self.queue.draining:
            return ApiError(503, "draining", "The server ended before there was an answer; ask another.")
        message = f"There was no answer within {self.settings.timeout_s:g} s, the wait in line included."
        return ApiError(504, "timeout", message)

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(self.settings.retry_after_s)}


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


async def _leaving(receive: Receive) -> Message:
    """Wait for the message that the caller has left. Only after the body was read."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


def _replayed(body: bytes, left: asyncio.Future[Message]) -> Receive:
    """A channel that gives the app the body, then the message that the caller has left, when it comes."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await asyncio.shield(left)

    return replay


class _Reply:
    """The channel to the caller. It remembers what was sent, so that an error is sent once and in the right form."""

    def __init__(self, send: Send, queue: AdmissionQueue, bodiless: bool):
        self.status: int | None = None
        self.is_whole = False
        self._bodiless = bodiless
        self._send, self._queue = send, queue
        self._is_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            if self._queue.draining:
                headers["Connection"] = "close"
            self.status = message["status"]
            self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body":
            self.is_whole = not message.get("more_body", False)
            if self._bodiless:
                message = {**message, "body": b""}
        await self._send(message)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Send the error as the reply, or as the last event of a stream that has begun."""
        if self.status is None:
            await error.response()(scope, receive, self)
        elif self._is_stream and not self.is_whole:
            event = format_sse_event(event="error", data_str=error.reply.model_dump_json())
            await self({"type": "http.response.body", "body": event, "more_body": False})
