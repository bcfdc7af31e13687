"""Talks to a vLLM server: sampling with exact token ids, scoring, and swapping the weights in place.

Libraries' internals show here in two places: lm15's transport (dspy 3.4.1; not exported, needed to keep
loopback traffic off a proxy) and vLLM's developer endpoints (0.32).
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
from dspy._vendor.lm15.transports import StdlibTransport
from dspy.lm15 import (
    AuthError,
    ContextLengthError,
    InvalidRequestError,
    LMRouter,
    Request,
    RouterConfig,
    ServerError,
    TransportError,
    UnsupportedModelError,
)
from dspy.lm15 import TimeoutError as RequestTimeoutError

from dspy_fst.engine.base import Completion, Holding
from dspy_fst.engine.chat import text_response
from dspy_fst.engine.logprobs import with_logprobs
from dspy_fst.engine.vllm.reply_stream import read_stream, sse_chunks
from dspy_fst.engine.vllm.wire import FINISHED, RESHAPING, pinned, read_completion, read_scores
from dspy_fst.errors import EngineError, NoAnswerError
from dspy_fst.types import WeightsVersion

MAX_CONNECTIONS = 512
"""Threads that can wait for a reply at once; more of them queue for a connection."""
CONNECT_TIMEOUT_S = 10.0
QUICK_TIMEOUT_S = 30.0
"""For endpoints that answer without touching the weights."""

_ENGINE_FAULTS = (TransportError, RequestTimeoutError, ServerError, AuthError, UnsupportedModelError)
COMPARE = "dspy_fst_compare"
"""The method of `engine/vllm/served/dspy_fst_weight_check.py`."""
_CONTROL = {"/collective_rpc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
"""Endpoints that answer 500 also to what the caller did wrong: files that do not fit, an adapter of too high a rank."""
_TOKEN_COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


@dataclass(frozen=True)
class Address:
    """Where a server listens and what it wants to hear."""

    url: str
    """Without ``/v1``, e.g. ``"http://127.0.0.1:8000"``."""
    api_key: str | None = field(repr=False)
    through_proxy: bool
    """Whether the environment's HTTP proxy applies; never for a server on this machine."""


class VLLMClient:
    """One server's HTTP interface, with pooled connections; thread-safe.

    Args:
        address: The server.
        request_timeout_s: Longest wait for a sampled or scored reply.
        load_timeout_s: Longest wait for new weights to be read.
    """

    def __init__(self, address: Address, *, request_timeout_s: float, load_timeout_s: float):
        self.address = address
        self._request_timeout_s = request_timeout_s
        self._load_timeout_s = load_timeout_s
        self._model: str | None = None
        self._cannot_compare = False
        self._http = httpx.Client(
            base_url=address.url,
            headers={"Authorization": f"Bearer {address.api_key}"} if address.api_key else {},
            timeout=httpx.Timeout(request_timeout_s, connect=CONNECT_TIMEOUT_S),
            trust_env=address.through_proxy,
        )
        self._router = LMRouter(
            RouterConfig(
                env={},
                base_urls={"vllm": f"{address.url}/v1"},
                api_keys={"vllm": address.api_key} if address.api_key else None,
                transport=StdlibTransport(
                    connect_timeout=CONNECT_TIMEOUT_S,
                    read_timeout=request_timeout_s,
                    write_timeout=request_timeout_s,
                    pool_timeout=request_timeout_s,
                    max_connections=MAX_CONNECTIONS,
                    trust_env=address.through_proxy,
                ),
            )
        )

    def ping(self) -> None:
        """Raises EngineError unless the server answers that it is well."""
        self._call("GET", "/health", timeout_s=QUICK_TIMEOUT_S)

    def engine_died(self) -> bool:
        """Whether the server says so itself; one that does not answer says nothing."""
        try:
            return self._send("GET", "/health", timeout_s=QUICK_TIMEOUT_S).status_code == 503
        except NoAnswerError:
            return False

    def find_model(self) -> str:
        """Name under which the server serves its (first) model, asked once.

        Raises:
            EngineError: nobody answers, or not to this key.
        """
        if self._model is None:
            models = self._call("GET", "/v1/models", timeout_s=QUICK_TIMEOUT_S).json()["data"]
            self._model = str(models[0]["id"])
        return self._model

    def sample(
        self, request: Request, seed: int, weights: WeightsVersion, prompt_ids: Sequence[int] | None = None
    ) -> Completion:
        """One reply to the request, whatever model it names, stamped with the given version.

        Args:
            prompt_ids: The rendered prompt; None: the server renders it. What the server refuses as ids is put to it as
                messages, so that the error is the same.

        Raises:
            EngineError: no usable answer came.
            dspy.lm15.LM15Error: the server refuses the request itself.
        """
        routed = pinned(request, model=f"vllm:{self.find_model()}", seed=seed)
        told = request.config.logprobs is not None
        if prompt_ids is not None and (completion := self._sample_after(prompt_ids, routed, weights, told)) is not None:
            return completion
        with self._as_engine_errors():
            response = self._router.complete(routed)
        return read_completion(response, weights, keep_logprobs=told)

    def stream(self, request: Request, seed: int, weights: WeightsVersion) -> Generator[str, None, Completion]:
        """`sample`, its text told in pieces as it comes; closing the generator ends the reply on the server too."""
        name = self.find_model()
        routed = pinned(request, model=f"vllm:{name}", seed=seed)
        with self._as_engine_errors():
            lm = self._router.lm(routed.model)
            wire = lm.build_request(replace(routed, model=name), stream=True)
        try:
            with self._http.stream(wire.method, wire.url, headers=wire.headers, content=wire.body) as reply:
                if not reply.is_success:
                    with self._as_engine_errors():
                        raise lm.normalize_error(reply.status_code, reply.read().decode("utf-8", "replace"))
                return (yield from read_stream(sse_chunks(reply), request, weights))
        except (httpx.HTTPError, RuntimeError) as error:  # the latter when another thread closed the client
            raise NoAnswerError(f"vLLM at {self.address.url} gave no reply to a request: {error}") from error

    @contextmanager
    def _as_engine_errors(self) -> Iterator[None]:
        """What lm15 tells of this server, in the words of an engine; refusals of the request itself stay."""
        try:
            yield
        except _ENGINE_FAULTS as error:
            raise NoAnswerError(f"vLLM at {self.address.url} gave no reply to a request: {error}") from error
        except InvalidRequestError as error:
            # vLLM says only in words that a prompt is too long; modules such as ReAct wait for the class.
            if "maximum context length" in str(error) and not isinstance(error, ContextLengthError):
                raise ContextLengthError(str(error)) from error
            raise

    def _sample_after(
        self, prompt_ids: Sequence[int], request: Request, weights: WeightsVersion, keep_logprobs: bool
    ) -> Completion | None:
        """One reply after exactly these ids; None where the server refuses them.

        The chat endpoint renders messages and takes no ids. This one samples from the same distribution and returns the
        same fields.
        """
        config = request.config
        body = {
            **(config.extensions or {}),
            "model": self.find_model(),
            "prompt": list(prompt_ids),
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": config.seed,
            "logprobs": config.logprobs,
        }
        reply = self._send("POST", "/v1/completions", json=body, timeout_s=self._request_timeout_s)
        if reply.is_client_error:
            return None
        _require_success(reply, f"POST {self.address.url}/v1/completions")
        choice = reply.json()["choices"][0]
        scored = choice.get("logprobs") or {}
        ids, logprobs = choice.get("token_ids") or (), scored.get("token_logprobs") or ()
        if choice.get("finish_reason") not in FINISHED:
            raise NoAnswerError(
                f"vLLM broke off a reply ({choice.get('finish_reason')!r}); its tokens are not a sample"
            )
        if len(ids) != len(logprobs) or choice.get("prompt_token_ids") != list(prompt_ids):
            raise EngineError(
                "vLLM sampled after other ids than it was given, or returned ids without log-probabilities"
            )
        reason = choice["finish_reason"]
        response = text_response(request.model, choice["text"], reason, len(prompt_ids), len(ids))
        completion = Completion(response, tuple(prompt_ids), tuple(ids), tuple(logprobs), reason, weights)
        if not keep_logprobs:
            return completion
        return with_logprobs(completion, scored["tokens"], scored["top_logprobs"] if config.logprobs else ())

    def tokens_processed(self, timeout_s: float) -> str:
        """vLLM's counters of prompt and sampled tokens, which move at every step; empty when it keeps none."""
        figures = self._call("GET", "/metrics", timeout_s=timeout_s).text.splitlines()
        return "\n".join(line for line in figures if line.startswith(_TOKEN_COUNTERS))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token but the first, at temperature 1, in one request."""
        body = {
            "model": self.find_model(),
            "prompt": [list(sequence) for sequence in sequences],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        reply = self._call("POST", "/v1/completions", json=body, timeout_s=self._request_timeout_s).json()
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        return [read_scores(choice, sequence) for choice, sequence in zip(choices, sequences, strict=True)]

    def require_developer_endpoints(self, how_to_launch: str) -> None:
        """Check that weights can be swapped.

        Raises:
            EngineError: with ``how_to_launch`` in the message.
        """
        reply = self._send("GET", "/is_paused", timeout_s=QUICK_TIMEOUT_S)
        if reply.status_code in (404, 405):
            raise EngineError(
                f"vLLM at {self.address.url} was launched without its developer endpoints, which swapping weights "
                f"needs. {how_to_launch}"
            )
        _require_success(reply, f"GET {self.address.url}/is_paused")

    def require_processed_logprobs(self, how_to_launch: str) -> None:
        """Check that log-probabilities are those of the distribution sampled from, temperature included.

        Measured, because /server_info fails where pip is missing: half the temperature doubles every difference.

        Raises:
            EngineError: with ``how_to_launch`` in the message.
        """
        if self._lead_of_the_likeliest(0.5) < 1.5 * self._lead_of_the_likeliest(1.0):
            raise EngineError(
                f"vLLM at {self.address.url} gives log-probabilities that ignore the temperature. {how_to_launch}"
            )

    def _lead_of_the_likeliest(self, temperature: float) -> float:
        """Nats between the two likeliest first tokens of some text, as reported at this temperature."""
        body = {
            "model": self.find_model(),
            "prompt": "a",
            "max_tokens": 1,
            "temperature": temperature,
            "logprobs": 5,
            "return_tokens_as_token_ids": True,  # by their texts, tokens that read alike would stand once
            **RESHAPING,
        }
        reply = self._call("POST", "/v1/completions", json=body, timeout_s=self._request_timeout_s).json()
        ranked = sorted(reply["choices"][0]["logprobs"]["top_logprobs"][0].values(), reverse=True)
        return float(ranked[0] - ranked[1])

    def swap_weights(self, folder: Path) -> None:
        """Read new weights into the running model, after the requests in flight; the prefix cache is emptied.

        Raises:
            EngineError: a step failed; the server is resumed all the same, with weights that are unknown.
        """
        try:
            self._call("POST", "/pause?mode=wait", timeout_s=self._request_timeout_s)
            rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._call("POST", "/collective_rpc", json=rpc, timeout_s=self._load_timeout_s)
            # Keys and values of prompts seen before would otherwise be continued with the new weights.
            reset = self._call("POST", "/reset_prefix_cache", timeout_s=QUICK_TIMEOUT_S)
            if not reset.json()["success"]:
                raise EngineError(f"vLLM at {self.address.url} could not empty its prefix cache: still in use")
        except BaseException:
            self._resume_quietly()
            raise
        self._call("POST", "/resume", timeout_s=QUICK_TIMEOUT_S)

    def held(self, folder: Path, *, optional: bool) -> Holding | None:
        """Have every worker compare the weights it uses with a folder's.

        Args:
            folder: As the server sees it.
            optional: Give None instead of an error where the server's workers lack our extension.

        Raises:
            EngineError: the check itself failed, on a server that is well; it would fail again.
            NoAnswerError: no answer came.
        """
        if self._cannot_compare:
            return None
        rpc = {"method": COMPARE, "kwargs": {"folder": str(folder)}}
        try:
            reply = self._call("POST", "/collective_rpc", json=rpc, timeout_s=self._load_timeout_s)
        except EngineError as error:
            # The words of vLLM 0.32 for a method that its workers lack: of `v1/serial_utils.run_method`, and of Python
            # where a worker in a process of its own looks it up.
            lacking = (f"Method {COMPARE!r} is not implemented.", f"object has no attribute {COMPARE!r}")
            if not optional or not any(words in str(error) for words in lacking):
                raise
            self._cannot_compare = True
            return None
        workers = reply.json()["results"]
        wrong = {name: how for worker in workers for name, how in worker["wrong"].items()}
        return Holding(workers[0]["digests"], wrong, workers[0]["dtype"])

    def close(self) -> None:
        """Close every connection. May be called twice."""
        self._http.close()
        self._router.close()

    def _resume_quietly(self) -> None:
        with suppress(EngineError):  # the failure that led here is the one to report
            self._call("POST", "/resume", timeout_s=QUICK_TIMEOUT_S)

    def _call(self, method: str, path: str, *, timeout_s: float, json: object = None) -> httpx.Response:
        reply = self._send(method, path, timeout_s=timeout_s, json=json)
        refused = reply.is_server_error and path.partition("?")[0] in _CONTROL and self._is_well()
        _require_success(reply, f"{method} {self.address.url}{path}", refused=refused)
        return reply

    def _is_well(self) -> bool:
        """Whether the server lives, so that its 500 is its answer to a request that it cannot do."""
        for _ in range(2):  # it closes the connection behind some answers, which the next request may meet
            with suppress(NoAnswerError):
                return self._send("GET", "/health", timeout_s=QUICK_TIMEOUT_S).is_success
        return False

    def _send(self, method: str, path: str, *, timeout_s: float, json: object = None) -> httpx.Response:
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
        try:
            return self._http.request(method, path, json=json, timeout=timeout)
        except httpx.TimeoutException as error:
            raise NoAnswerError(
                f"waited {timeout_s:g} s in vain for vLLM to answer {method} {self.address.url}{path}"
            ) from error
        except (httpx.HTTPError, RuntimeError) as error:  # the latter when another thread closed the client
            raise NoAnswerError(f"{method} {self.address.url}{path} failed: {error}") from error


def _require_success(reply: httpx.Response, what: str, *, refused: bool = False) -> None:
    """
    Args:
        refused: A server error is known to be a refusal: the server lives on, and asking again changes nothing.
    """
    if reply.is_success:
        return
    hint = " Is the API key right?" if reply.status_code == 401 else ""
    if refused:
        raise EngineError(
            f"{what} answered {reply.status_code}, and the server is well, so it refused: {_reason(reply)}"
        )
    kind = NoAnswerError if reply.is_server_error else EngineError
    raise kind(f"{what} answered {reply.status_code}: {_reason(reply)}{hint}")


def _reason(reply: httpx.Response) -> str:
    """What a server says of an error: vLLM's own sentence where it gives one."""
    try:
        error = reply.json()["error"]
        return str(error["message"] if isinstance(error, Mapping) else error)[:500]
    except (ValueError, KeyError, TypeError):
        return reply.text[:500]
