"""`serve`: listens, and ends so that nobody who was let in goes without an answer."""

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
from dspy_fst.serve.settings import DOCS, ServeSettings

logger = logging.getLogger(__name__)
LAST_CALL_S = 0.3
"""Before the door is closed, for those who were just answered and ask again; and after, for those who came in last.
Both are told that the server ends."""
CLOSE_S = 5
"""For the last bytes to go out."""


def serve(app: FastAPI, settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what was taken in and release the engine.

    Args:
        app: Made by `create_app` with the same settings.

    Raises:
        ConfigurationError: the address cannot be had.
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
    if service.failure is not None and not service.gate.draining:  # else it was ended while it started
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
    """Uvicorn that goes on accepting while it drains: a connection that is cut is no answer, a 503 is one."""

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
        """Requests that were still at work when the drain's time was over."""
        self._service, self._drain_s = service, drain_s
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Uvicorn's signal handler: the first signal drains, the second ends at once."""
        gate, loop = self._service.gate, asyncio.get_running_loop()
        if gate.draining:
            loop.call_soon_threadsafe(gate.expire)
            super().handle_exit(sig, frame)
            return
        gate.draining = True
        loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        print(f"ending within {self._drain_s:g} s; a second signal ends at once", file=sys.stderr, flush=True)
        self.unanswered = await self._service.gate.emptied(self._drain_s)
        self._service.gate.expire()
        await asyncio.sleep(LAST_CALL_S)
        await self._let_in()
        # Listening ends before the connections do: uvicorn's own shutdown would cut those that it has not read yet.
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_CALL_S)
        self.should_exit = True

    async def _let_in(self) -> None:
        """Accept whoever has connected, which an event loop does one a turn: closing would reset them."""
        doors = select.poll()
        for door in (door for server in self.servers for door in server.sockets):
            doors.register(door.fileno(), select.POLLIN)
        until = time.monotonic() + LAST_CALL_S
        while doors.poll(0) and time.monotonic() < until:
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # an accepted connection is attached one turn later

    async def _end_if_failed(self) -> None:
        if self._service.failure is not None:
            self.should_exit = True
