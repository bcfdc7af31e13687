"""ASGI middleware that vLLM loads: every path except /health requires the key.

vLLM's own check covers /v1 only. The developer endpoints, which can run any method of the engine, would be open to
everyone on the machine. This folder is on the server's PYTHONPATH, so its file names must not shadow other modules.
"""

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class KeyGuard:
    """Answers 401 unless the request carries ``Authorization: Bearer $VLLM_API_KEY``."""

    def __init__(self, app: App):
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == "/health" or self._holds_key(scope):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error":"Unauthorized"}'})

    def _holds_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._expected)
