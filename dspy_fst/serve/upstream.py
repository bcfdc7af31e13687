"""A client of the vLLM server behind a PolicyLM. It uses the OpenAI-compatible chat endpoint only."""

import json
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import httpx
from dspy import lm15

from dspy_fst.engine.vllm.reply_stream import sse_chunks
from dspy_fst.errors import EngineError

if TYPE_CHECKING:
    from dspy_fst.engine.vllm.address import Address

CONNECT_TIMEOUT_S = 10.0
_PROBE = ((0, 1),)
_TOO_LONG = ("maximum context length", "max_tokens must be at least 1, got 0")
"""Words of vLLM 0.32 for a prompt that is longer than the context (renderers/params.py), and for one that fills it and
leaves no token for a reply (sampling_params.py)."""


class Addressed(Protocol):
    """An engine with a server."""

    @property
    def address(self) -> "Address | None": ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...


@dataclass(frozen=True)
class _Served:
    """The model of a server."""

    name: str
    context: int | None
    """Tokens of prompt and reply together, e.g. 4096; None where the server does not say."""


class Upstream:
    """Blocking and thread-safe. The server's address and key are read before each request: a restart changes them.

    Args:
        engine: The engine that owns the server.
        timeout_s: Longest wait for the next piece of a reply, in seconds.
        adapter: The folder of the LoRA adapter that replies are sampled with; None: the server's model itself.
    """

    def __init__(self, engine: Addressed, timeout_s: float, adapter: Path | None = None):
        self._engine, self._adapter = engine, adapter
        self._timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        self._clients: dict[bool, httpx.Client] = {}
        self._models: dict[str, _Served] = {}
        self._lock = threading.Lock()

    @property
    def address(self) -> "Address | None":
        """Where the server listens now; None while it is being started."""
        return self._engine.address

    @property
    def context(self) -> int | None:
        """Tokens of the model's context; None where the server does not say, or does not answer now."""
        if (address := self.address) is None:
            return None
        try:
            return self._model(*self._reached(address)).context
        except (httpx.HTTPError, EngineError):
            return None  # the request that follows reports why

    def chat(self, body: Mapping[str, object]) -> dict[str, object]:
        """One chat completion.

        Raises:
            lm15.LM15Error: the server refuses the request, with its own words.
            EngineError: there is no server, or it failed.
        """
        reply = self._post(body)
        try:
            return dict(json.loads(reply.read()))
        except (httpx.HTTPError, ValueError, TypeError) as error:
            raise EngineError(f"vLLM broke off a reply: {error}") from error
        finally:
            reply.close()

    def stream(self, body: Mapping[str, object]) -> Generator[dict[str, object], None, None]:
        """The chunks of one chat completion as they arrive, with token ids and usage.

        Closing the iterator stops the reply on the server too.

        Raises:
            lm15.LM15Error, EngineError: see `chat`; before the first chunk or between two.
        """
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        reply = self._post(streamed)
        try:
            yield from sse_chunks(reply)
        finally:
            reply.close()

    def close(self) -> None:
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def _post(self, body: Mapping[str, object]) -> httpx.Response:
        try:
            reply = self._send(body)
        except httpx.TimeoutException as error:
            raise EngineError("vLLM did not answer in time") from error
        except httpx.TransportError:
            # The score call goes through the engine, which notices that its server is gone and restarts it.
            self._engine.score(_PROBE)
            try:
                reply = self._send(body)
            except httpx.TransportError as error:
                raise EngineError(f"vLLM cannot be reached: {error}") from error
        if reply.is_success:
            return reply
        try:
            raise _refusal(reply)
        finally:
            reply.close()

    def _send(self, body: Mapping[str, object]) -> httpx.Response:
        address = self.address
        if address is None:
            raise httpx.ConnectError("the server is being started")
        client, url, headers = self._reached(address)
        named = {**body, "model": self._model(client, url, headers).name}
        sent = client.build_request("POST", f"{url}/v1/chat/completions", json=named, headers=headers)
        return client.send(sent, stream=True)

    def _reached(self, address: "Address") -> tuple[httpx.Client, str, dict[str, str]]:
        """(client, URL, headers) for a request to the server."""
        headers = {"Authorization": f"Bearer {address.api_key}"} if address.api_key else {}
        return self._client(address.through_proxy), address.url, headers

    def _client(self, through_proxy: bool) -> httpx.Client:
        with self._lock:
            if through_proxy not in self._clients:
                limits = httpx.Limits(max_connections=None)
                self._clients[through_proxy] = httpx.Client(
                    timeout=self._timeout, limits=limits, trust_env=through_proxy
                )
            return self._clients[through_proxy]

    def _model(self, client: httpx.Client, url: str, headers: Mapping[str, str]) -> _Served:
        """The server's model; asked for once, but a LoRA adapter each time: every load gives it another name."""
        if self._adapter is not None or url not in self._models:
            reply = client.get(f"{url}/v1/models", headers=headers)
            if not reply.is_success:
                raise EngineError(f"vLLM answered {reply.status_code} when it was asked for its models")
            try:
                cards = reply.json()["data"]
                self._models[url] = _Served(self._name_in(cards), cards[0].get("max_model_len"))
            except (ValueError, LookupError, TypeError, AttributeError) as error:  # e.g. the page of a proxy
                raise EngineError(f"{url}/v1/models gave no list of models: {reply.text[:200]!r}") from error
        return self._models[url]

    def _name_in(self, cards: Sequence[Mapping[str, object]]) -> str:
        """The name of what is served: of the first card, or of the one whose root is the adapter's folder.

        Raises:
            EngineError: the server has not loaded the adapter. Its base's replies would pass for the adapter's.
        """
        if self._adapter is None:
            return str(cards[0]["id"])
        names = [str(card["id"]) for card in cards if card.get("root") == str(self._adapter.resolve())]
        if not names:
            raise EngineError(f"vLLM has not loaded the LoRA adapter {self._adapter}")
        return names[-1]


def _refusal(reply: httpx.Response) -> Exception:
    """The exception for an error of the server. Only errors of the request keep the server's words."""
    reply.read()
    if reply.status_code not in (400, 404, 422):
        return EngineError(f"vLLM answered {reply.status_code}: {reply.text[:500]}")
    try:
        message = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = "The model server refused the request."
    if any(words in message for words in _TOO_LONG):
        return lm15.ContextLengthError(message)
    return lm15.InvalidRequestError(message)
