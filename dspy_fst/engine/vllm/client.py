"""HTTP client of a vLLM server: sampling with exact token ids, scoring, and swapping the weights in place.

It relies on vLLM's developer endpoints (0.32).
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx
from dspy.lm15 import (
    AuthError,
    ContextLengthError,
    InvalidRequestError,
    LMRouter,
    ProviderError,
    RateLimitError,
    Request,
    RouterConfig,
    ServerError,
    TransportError,
    UnsupportedModelError,
)
from dspy.lm15 import TimeoutError as RequestTimeoutError

from dspy_fst.engine.base import Completion, Holding
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.reply_stream import read_stream, sse_chunks
from dspy_fst.engine.vllm.rows import PATH, RowSender, read_row, row_of
from dspy_fst.engine.vllm.transport import ServerTransport
from dspy_fst.engine.vllm.wire import (
    ABSENT,
    PROCESS,
    TRANSFER,
    WorkerAnswer,
    asked_after,
    pinned,
    read_after,
    read_completion,
    read_holding,
    read_scores,
    require_asked_process,
    require_success,
    said,
)
from dspy_fst.errors import EngineError, NoAnswerError
from dspy_fst.types import WeightsVersion

MAX_CONNECTIONS = 512
"""How many threads can wait for a reply at once; further threads wait for a connection."""
CONNECT_TIMEOUT_S = 10.0
QUICK_TIMEOUT_S = 30.0
"""Time limit of endpoints that answer without touching the weights."""

_ENGINE_FAULTS = (TransportError, RequestTimeoutError, RateLimitError, ServerError, AuthError, UnsupportedModelError)
COMPARE = "dspy_fst_compare"
"""Method of the worker extension in `engine/vllm/served/dspy_fst_weight_check.py`."""
_CONTROL = {"/collective_rpc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", *TRANSFER}
"""Endpoints that also answer 500 to a wrong request, e.g. files that do not fit, or an adapter of too high a rank."""
_TOKEN_COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


class ServedBy(NamedTuple):
    """A process of a server, as our middleware tells it."""

    name: str
    """Another start of the server has another one."""
    dtype: str | None
    """Precision of the model, e.g. ``"bfloat16"``; None: an older middleware, which does not tell."""
    sizes: Mapping[str, int | None]
    """Of the model, by their names in its ``config.json``."""


class VLLMClient:
    """One server's HTTP interface, with pooled connections; thread-safe.

    Args:
        address: The server.
        request_timeout_s: Longest wait for a sampled or scored reply.
        load_timeout_s: Longest wait for new weights to be read.
    """

    def __init__(self, address: Address, *, request_timeout_s: float, load_timeout_s: float):
        self.address = address
        self.request_timeout_s = request_timeout_s
        self.load_timeout_s = load_timeout_s
        self._model: str | None = None
        self._cannot_compare = False
        self.rows: RowSender | None = None
        """Where the server takes many rows in one request; see `find_rows`."""
        self._http = httpx.Client(
            base_url=address.url,
            headers={"Authorization": f"Bearer {address.api_key}"} if address.api_key else {},
            timeout=httpx.Timeout(request_timeout_s, connect=CONNECT_TIMEOUT_S),
            trust_env=address.through_proxy,
        )
        self._transport = ServerTransport(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=request_timeout_s,
            write_timeout=request_timeout_s,
            pool_timeout=request_timeout_s,
            max_connections=MAX_CONNECTIONS,
            trust_env=address.through_proxy,
        )
        self._router = LMRouter(
            RouterConfig(
                env={},
                base_urls={"vllm": f"{address.url}/v1"},
                api_keys={"vllm": address.api_key} if address.api_key else None,
                transport=self._transport,
            )
        )

    def ping(self) -> None:
        """Raises EngineError unless the server answers that it is healthy."""
        self.call("GET", "/health", timeout_s=QUICK_TIMEOUT_S)

    def engine_died(self) -> bool:
        """Whether the server itself reports that its engine died, or takes no connection any more, as one that ends."""
        return self._health() in (503, None)

    def find_model(self) -> str:
        """Name under which the server serves its (first) model; requested once.

        Raises:
            EngineError: the server does not answer, or refuses the key.
        """
        if self._model is None:
            self._model = str(self.model_card()["id"])
        return self._model

    def model_card(self) -> Mapping[str, object]:
        """What the server says of its (first) model: ``id``, ``root`` and ``max_model_len``.

        Raises:
            EngineError: the server does not answer, refuses the key, or is none of vLLM's kind.
        """
        reply = self.call("GET", "/v1/models", timeout_s=QUICK_TIMEOUT_S)
        try:
            card = reply.json()["data"][0]
            return {"id": card["id"], **card}
        except (ValueError, LookupError, TypeError) as error:
            raise EngineError(
                f"{self.address.url}/v1/models answers, but lists no model as vLLM does; name the address of a vLLM "
                "server"
            ) from error

    def find_rows(self) -> ServedBy | None:
        """If the server has our middleware: send requests together from now on, and to the process that answers now.

        If another one answers later, it refuses: every method then raises `ServerReplacedError`.

        Returns:
            As `process` has it.

        Raises:
            EngineError: as `process` has it.
        """
        if (found := self.process()) is not None:
            meant = {PROCESS: found.name}
            self._http.headers.update(meant)
            self._transport.headers = meant
            self.rows = RowSender(self.address, timeout_s=self.request_timeout_s, headers=meant)
        return found

    def process(self) -> ServedBy | None:
        """Which process answers; None where the server lacks our middleware.

        Raises:
            EngineError: no answer came, or another than these two. Nobody knows then what it has.
        """
        reply = self.send("GET", PATH, timeout_s=QUICK_TIMEOUT_S)
        if reply.status_code in ABSENT:
            return None
        require_success(reply, f"GET {self.address.url}{PATH}")
        name = reply.headers.get(PROCESS)
        told = said(reply)
        return None if name is None else ServedBy(name, told.get("dtype"), told.get("sizes") or {})

    def sample(
        self,
        request: Request,
        seed: int,
        weights: WeightsVersion,
        prompt_ids: Sequence[int] | None = None,
        model: str | None = None,
    ) -> Completion:
        """One reply to the request, whatever model it names, marked with the given version.

        Args:
            request: The request.
            seed: Seed of the sample.
            weights: The version that is served.
            prompt_ids: The rendered prompt; None: the server renders it. If the server refuses the ids, the request is
                sent as messages, so that its error is the same in both cases.

        Raises:
            EngineError: no usable answer came.
            dspy.lm15.LM15Error: the server refuses the request itself.
        """
        name = model or self.find_model()
        if self.rows is not None and prompt_ids is not None and (row := row_of(request, seed, prompt_ids, name)):
            reply = self.rows.reply_to(row)
            if reply is not None:
                return read_row(row, reply, weights)
        routed = pinned(request, model=f"vllm:{name}", seed=seed)
        keep = request.config.logprobs is not None
        if prompt_ids is not None:
            completion = self._sample_after(prompt_ids, replace(routed, model=name), weights, keep)
            if completion is not None:
                return completion
        with self._as_engine_errors():
            response = self._router.complete(routed)
        return read_completion(response, weights, keep_logprobs=keep)

    def stream(
        self, request: Request, seed: int, weights: WeightsVersion, model: str | None = None
    ) -> Generator[str, None, Completion]:
        """`sample`, with the text yielded piece by piece. Closing the generator ends the reply on the server, too."""
        name = model or self.find_model()
        routed = pinned(request, model=f"vllm:{name}", seed=seed)
        with self._as_engine_errors():
            lm = self._router.lm(routed.model)
            wire = lm.build_request(replace(routed, model=name), stream=True)
        try:
            with self._http.stream(wire.method, wire.url, headers=wire.headers, content=wire.body) as reply:
                if not reply.is_success:
                    body = reply.read().decode("utf-8", "replace")
                    require_asked_process(reply.headers.get(PROCESS), wire.url)
                    with self._as_engine_errors():
                        raise lm.normalize_error(reply.status_code, body)
                return (yield from read_stream(sse_chunks(reply), request, weights))
        except (httpx.HTTPError, RuntimeError) as error:  # the latter when another thread closed the client
            raise self._no_reply(error) from error

    @contextmanager
    def _as_engine_errors(self) -> Iterator[None]:
        """Raise lm15's errors about the server as EngineErrors; refusals of the request itself are not changed."""
        try:
            yield
        except _ENGINE_FAULTS as error:
            raise self._no_reply(error) from error
        except InvalidRequestError as error:
            # vLLM reports a prompt that is too long only in words; modules such as ReAct expect this class.
            if "maximum context length" in str(error) and not isinstance(error, ContextLengthError):
                raise ContextLengthError(str(error)) from error
            raise
        except ProviderError as error:  # of no kind: the answer was no JSON
            raise self._no_reply(error) from error

    def _no_reply(self, error: Exception) -> NoAnswerError:
        return NoAnswerError(f"vLLM at {self.address.url} gave no reply to a request: {error}")

    def _sample_after(
        self, prompt_ids: Sequence[int], request: Request, weights: WeightsVersion, keep_logprobs: bool
    ) -> Completion | None:
        """One reply to exactly these prompt ids; None if the server refuses them.

        The chat endpoint takes messages, but no ids. /v1/completions takes ids, samples from the same distribution and
        returns the same fields.
        """
        body = asked_after(prompt_ids, request)
        reply = self.send("POST", "/v1/completions", json=body, timeout_s=self.request_timeout_s)
        if reply.is_client_error:
            return None
        require_success(reply, f"POST {self.address.url}/v1/completions")
        return read_after(prompt_ids, said(reply)["choices"][0], request, weights, keep_logprobs=keep_logprobs)

    def tokens_processed(self, timeout_s: float) -> str:
        """vLLM's counters of prompt and sampled tokens, which change at every step; empty if it keeps none."""
        figures = self.call("GET", "/metrics", timeout_s=timeout_s).text.splitlines()
        return "\n".join(line for line in figures if line.startswith(_TOKEN_COUNTERS))

    def score(self, sequences: Sequence[Sequence[int]], model: str | None = None) -> list[list[float]]:
        """Log-probability of every token but the first, at temperature 1, in one request; ``model`` as in `sample`."""
        body = {
            "model": model or self.find_model(),
            "prompt": [list(sequence) for sequence in sequences],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        reply = said(self.call("POST", "/v1/completions", json=body, timeout_s=self.request_timeout_s))
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        return [read_scores(choice, sequence) for choice, sequence in zip(choices, sequences, strict=True)]

    def swap_weights(self, load: Callable[[], object]) -> None:
        """Have new weights loaded into the running model after the requests in flight, and empty the prefix cache.

        Raises:
            EngineError: a step failed. The server is resumed nevertheless, with unknown weights.
        """
        try:
            self.call("POST", "/pause?mode=wait", timeout_s=self.request_timeout_s)
            load()
            # Otherwise the new weights would continue from cached keys and values of the old ones.
            reset = self.call("POST", "/reset_prefix_cache", timeout_s=QUICK_TIMEOUT_S)
            if not said(reset)["success"]:
                raise EngineError(f"vLLM at {self.address.url} could not empty its prefix cache: still in use")
        except BaseException:
            self._resume_quietly()
            raise
        self.call("POST", "/resume", timeout_s=QUICK_TIMEOUT_S)

    def held(self, folder: Path, *, optional: bool) -> Holding | None:
        """Let every worker compare the weights that it uses with a folder's.

        Args:
            folder: The folder, by its path on the server.
            optional: Return None instead of raising an error if the server's workers lack our extension.

        Raises:
            EngineError: the check itself failed on a healthy server; it would fail again.
            NoAnswerError: no answer came.
        """
        if self._cannot_compare:
            return None
        workers = self.run(COMPARE, optional=optional, folder=str(folder))
        self._cannot_compare = workers is None
        return None if workers is None else read_holding(workers)

    def run(self, method: str, *, optional: bool = False, **arguments: object) -> list[WorkerAnswer] | None:
        """The workers' answers to a method of our extension.

        Args:
            method: Its name.
            optional: Return None instead of raising an error if the workers lack it.
            **arguments: Of the method.

        Raises:
            EngineError: the method failed on a healthy server, or is missing.
            NoAnswerError: no answer came.
        """
        rpc = {"method": method, "kwargs": arguments}
        try:
            reply = self.call("POST", "/collective_rpc", json=rpc, timeout_s=self.load_timeout_s)
        except EngineError as error:
            # The errors of vLLM 0.32 for a method that its workers lack: the first from `v1/serial_utils.run_method`,
            # the second from Python, when a worker in another process looks the method up.
            missing = (f"Method {method!r} is not implemented.", f"object has no attribute {method!r}")
            if not optional or not any(words in str(error) for words in missing):
                raise
            return None
        answers: list[WorkerAnswer] = said(reply)["results"]
        return answers

    def close(self) -> None:
        """Close every connection. May be called twice."""
        if self.rows is not None:
            self.rows.close()
        self._http.close()
        self._router.close()

    def _resume_quietly(self) -> None:
        with suppress(EngineError):  # the caller raises the error that led here
            self.call("POST", "/resume", timeout_s=QUICK_TIMEOUT_S)

    def call(self, method: str, path: str, *, timeout_s: float, json: object = None) -> httpx.Response:
        """A successful answer.

        Raises:
            NoAnswerError: no answer came, or the server failed; asking again may help.
            EngineError: it refused the request.
        """
        reply = self.send(method, path, timeout_s=timeout_s, json=json)
        # To a server that is well a status of 500 is a refusal of the request. Gateways say 502 to 504.
        refused = reply.status_code == 500 and path.partition("?")[0] in _CONTROL and self._health() == 200
        require_success(reply, f"{method} {self.address.url}{path}", refused=refused)
        return reply

    def _health(self) -> int | None:
        """Status of the server's health check; 0 if it does not answer, None if it takes no connection."""
        status: int | None = 0
        for _ in range(2):  # it closes the connection after some answers, so the next request may fail once
            try:
                return self.send("GET", "/health", timeout_s=QUICK_TIMEOUT_S).status_code
            except NoAnswerError as error:
                status = None if isinstance(error.__cause__, httpx.ConnectError) else 0
        return status

    def send(self, method: str, path: str, *, timeout_s: float, json: object = None) -> httpx.Response:
        """Any answer.

        Raises:
            NoAnswerError: none came.
        """
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
        try:
            return self._http.request(method, path, json=json, timeout=timeout)
        except httpx.TimeoutException as error:
            raise NoAnswerError(
                f"waited {timeout_s:g} s in vain for vLLM to answer {method} {self.address.url}{path}"
            ) from error
        except (httpx.HTTPError, RuntimeError) as error:  # the latter when another thread closed the client
            raise NoAnswerError(f"{method} {self.address.url}{path} failed: {error}") from error
