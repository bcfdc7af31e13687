"""What every request passes before the app sees it: key, size, line, time limit. Nothing of the app is known here.

In this order, so that a stranger costs no memory, and a request that will be refused is not read: key, end of
service, readiness, a place in line, body, turn.
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

from dspy_fst.engine.addresses import is_loopback
from dspy_fst.serve.admission import Gate, LineFullError, Ticket
from dspy_fst.serve.error_replies import ApiError, internal_error
from dspy_fst.serve.prometheus import Metrics
from dspy_fst.serve.settings import (
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
"""Paths that need no key: they tell what the server is, not what it was asked."""
CLIENT_GONE = 499
"""Counted as the status of a request whose caller left before there was a reply."""


class _GoneError(Exception):
    """The caller left."""


class Limits:
    """ASGI middleware.

    Args:
        work: Paths whose POST requests take a place at work.
        not_ready: Why no work can be done now, or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeSettings,
        gate: Gate,
        metrics: Metrics,
        work: Iterable[str],
        not_ready: Callable[[], str | None],
    ):
        self.app, self.settings, self.gate, self.metrics = app, settings, gate, metrics
        self._work, self._not_ready = frozenset(work), not_ready
        self._endpoints = {*self._work, *RESERVED}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        reply = _Reply(send, self.gate, bodiless=scope["method"] == "HEAD")
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # load balancers ask so, and FastAPI's routes would refuse it
        try:
            await self._guarded(scope, receive, reply)
        except ApiError as error:
            self.metrics.error(error.code)
            await reply.fail(error, scope, receive)
        except _GoneError:
            logger.info("the caller of %s left before there was an answer", scope["path"])
        except Exception:
            logger.exception("a request to %s failed", scope["path"])
            self.metrics.error("internal")
            await reply.fail(internal_error(), scope, receive)
        finally:
            # Paths that nobody serves are counted as one: each would else stay in memory for good.
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
            async with self.gate.admitted(self.settings.timeout_s) as ticket:
                body = await self._body(headers, receive)
                await self._answer(ticket, body, scope, receive, reply)
        except LineFullError:
            message = f"{self.gate.places} requests are at work and {self.gate.line} wait; ask again later."
            raise ApiError(429, "queue_full", message, headers=self._retry_after()) from None
        except TimeoutError:
            raise self._too_late() from None

    async def _answer(self, ticket: Ticket, body: bytes, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        """Wait for a place at work and let the app reply, unless the caller leaves before.

        Callers who have gone would else keep the living out, in line and at work.

        Raises:
            _GoneError: the caller left; what was begun for it is cancelled.
        """
        scope.setdefault("state", {})["ticket"] = ticket
        left = asyncio.ensure_future(_leaving(receive))

        async def work() -> None:
            await ticket.turn()
            await self.app(scope, _replayed(body, left), reply)

        working = asyncio.ensure_future(work())
        try:
            await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
            # A server calls a caller gone also when the reply is out and the app is about to end.
            if not working.done() and not reply.is_whole:
                raise _GoneError
            await working
        finally:
            left.cancel()
            working.cancel()
            await asyncio.wait({working})

    def _check_caller(self, headers: Headers) -> None:
        if self.settings.api_key is None:
            # A page in a browser can give its own name the address 127.0.0.1, and then speak with this server.
            if not is_loopback(_host(headers.get("host", ""))):
                raise ApiError(403, "foreign_host", "A server without a key answers to localhost only.")
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.settings.api_key.encode()):
            message = "Send the server's key as 'Authorization: Bearer KEY'."
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})

    def _check_open(self) -> None:
        if self.gate.draining:
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
        if self.gate.draining:
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
    """The message that the caller has left; read after the body."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


def _replayed(body: bytes, left: asyncio.Future[Message]) -> Receive:
    """The body that was read, then that the caller has left; the app may wait for that, and give it up."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await asyncio.shield(left)

    return replay


class _Reply:
    """The way out: remembers what was sent, so that an error is told once and in the right form."""

    def __init__(self, send: Send, gate: Gate, bodiless: bool):
        self.status: int | None = None
        self.is_whole = False
        self._bodiless = bodiless
        self._send, self._gate = send, gate
        self._is_stream = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            if self._gate.draining:
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
