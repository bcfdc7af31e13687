"""`serve`: runs the app, and shuts down so that every admitted request gets a reply."""

import asyncio
import logging
import select
import socket
import sys
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dspy_fst.errors import ConfigurationError, EngineError
from dspy_fst.serve.service import Service
from dspy_fst.serve.serving_settings import DOCS, ServeSettings

logger = logging.getLogger(__name__)
LAST_CALL_S = 0.3
"""Wait before the socket is closed, for callers who were just answered and ask again; and after it, for the last
connections. Both get the reply that the server is shutting down."""
CLOSE_S = 5
"""Longest wait for the last bytes to be sent."""


def serve(app: FastAPI, settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the admitted requests and release the engine.

    Args:
        app: Made by `create_app` with the same settings.

    Raises:
        ConfigurationError: the address cannot be used.
        EngineError: the engine could not be started.
    """
    service: Service = app.state.service
    listener = _listener(settings)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {service.name} at http://{shown}:{port}{settings.path}, see {DOCS}", file=sys.stderr, flush=True)
    if settings.made_key:
        print(f"key: {settings.api_key}", file=sys.stderr, flush=True)
    server = _Server(app, service, settings.drain_s)
    server.run(sockets=[listener])
    if service.failure is not None and not service.queue.draining:  # else it was stopped while it started
        raise EngineError(f"the engine could not be started: {service.failure}") from service.failure
    if server.unanswered:
        logger.warning("%d requests were not answered within %g s (drain_s)", server.unanswered, settings.drain_s)


def _listener(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigurationError(
            [f"host={settings.host!r}, port={settings.port}: {error.strerror or error}; choose another, or port=0"]
        ) from error


class _Server(uvicorn.Server):
    """Uvicorn that accepts connections while it drains: callers get a 503 instead of a reset connection."""

    def __init__(self, app: FastAPI, service: Service, drain_s: float):
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSE_S,
                callback_notify=self._end_if_failed,
                timeout_notify=1,
            )
        )
        self.unanswered = 0
        """Requests that were still at work when ``drain_s`` was over."""
        self._service, self._drain_s = service, drain_s
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Uvicorn's signal handler: the first signal drains, the second ends at once."""
        queue, loop = self._service.queue, asyncio.get_running_loop()
        if queue.draining:
            loop.call_soon_threadsafe(queue.expire)
            super().handle_exit(sig, frame)
            return
        queue.draining = True
        loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        print(f"ending within {self._drain_s:g} s; a second signal ends at once", file=sys.stderr, flush=True)
        self.unanswered = await self._service.queue.emptied(self._drain_s)
        self._service.queue.expire()
        await asyncio.sleep(LAST_CALL_S)
        await self._accept_pending()
        # Stop listening before closing connections: uvicorn's own shutdown would reset those that it has not read yet.
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_CALL_S)
        self.should_exit = True

    async def _accept_pending(self) -> None:
        """Accept every pending connection, of which an event loop takes one a turn: closing would reset them."""
        pending = select.poll()
        for listening in (listening for server in self.servers for listening in server.sockets):
            pending.register(listening.fileno(), select.POLLIN)
        until = time.monotonic() + LAST_CALL_S
        while pending.poll(0) and time.monotonic() < until:
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # an accepted connection is attached one turn later

    async def _end_if_failed(self) -> None:
        if self._service.failure is not None:
            self.should_exit = True
