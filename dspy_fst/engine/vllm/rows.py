"""Many replies in one HTTP request: calls that wait at the same time go to the server together.

The server has our middleware for this (`served/dspy_fst_rows.py`), which samples each row with its own seed and answers
it as soon as it has ended. So a reply depends on its own prompt and seed alone, and does not wait for a longer one.

One thread does the input and output for all callers; they wait for it.
"""

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypedDict

import httpx
from dspy.lm15 import Request

from dspy_fst.engine.base import Completion, refuse_reshaped_sampling
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.wire import exact, require_success
from dspy_fst.errors import EngineError, NoAnswerError
from dspy_fst.types import WeightsVersion

PATH = "/dspy_fst/rows"
GATHERED_S = 0.004
"""How long the first of the waiting calls waits for others (ours): less than one step of any model."""
CONNECT_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 10.0
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class AskedRow:
    """One reply to sample: of this model or LoRA adapter, after exactly these ids."""

    prompt: tuple[int, ...]
    model: str
    seed: int
    temperature: float
    max_tokens: int | None
    stop_token_ids: tuple[int, ...] = ()


class RowReply(TypedDict, total=False):
    """A line of the server's answer; see `served/dspy_fst_rows.py`."""

    row: int
    ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str | None
    refused: str
    failed: str


def row_of(request: Request, seed: int, prompt_ids: Sequence[int], model: str) -> AskedRow | None:
    """The request as a row; None if it asks for more than a row can say.

    Raises:
        dspy.lm15.UnsupportedFeatureError: it asks for another distribution, which training would not score.
    """
    refuse_reshaped_sampling(request)
    config, extensions = request.config, dict(request.config.extensions or {})
    stops = extensions.pop("stop_token_ids", ())
    if extensions or config.stop or config.logprobs is not None or not isinstance(stops, list | tuple):
        return None
    temperature = 1.0 if config.temperature is None else config.temperature
    ends = tuple(number for number in stops if isinstance(number, int))
    return AskedRow(tuple(prompt_ids), model, seed, temperature, config.max_tokens, ends)


def read_row(row: AskedRow, reply: RowReply, weights: WeightsVersion) -> Completion:
    """The reply to a row, with its exact tokens; see `wire.exact`."""
    told = (reply["ids"], reply["logprobs"], reply["text"], reply["finish_reason"])
    return exact(row.model, row.prompt, *told, weights)


class RowSender:
    """One server's endpoint for rows. Thread-safe.

    Args:
        address: The server.
        timeout_s: Longest wait for a reply.
        headers: Of each request, beside the key.
    """

    def __init__(self, address: Address, *, timeout_s: float, headers: Mapping[str, str] = NO_HEADERS):
        self._address, self._timeout_s, self._headers = address, timeout_s, headers
        self._lock = threading.Lock()
        self._waiting: list[tuple[AskedRow, Future[RowReply]]] = []
        self._closed = False
        self._thread: threading.Thread | None = None
        self._loop = asyncio.new_event_loop()

    def reply_to(self, row: AskedRow) -> RowReply | None:
        """Sample one reply; None if the server refuses the row.

        Raises:
            NoAnswerError: no answer came in time, the server failed, or another thread closed this.
            EngineError: the server refused the whole request, e.g. its key.
        """
        mine: Future[RowReply] = Future()
        with self._lock:
            if self._closed:
                raise NoAnswerError(f"the connection to vLLM at {self._address.url} was closed")
            self._start()
            self._waiting.append((row, mine))
            if len(self._waiting) == 1:
                self._loop.call_soon_threadsafe(self._loop.call_later, GATHERED_S, self._send)
        try:
            reply = mine.result(timeout=self._timeout_s)
        except TimeoutError as error:
            raise self._no_reply(f"none came within {self._timeout_s:g} s") from error
        if "failed" in reply:
            raise self._no_reply(reply["failed"])
        return None if "refused" in reply else reply

    def close(self) -> None:
        """End the thread and its connections; calls that wait fail. May be called twice."""
        with self._lock:
            was_closed, self._closed = self._closed, True
            waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            future.set_exception(self._no_reply("the connection was closed"))
        if was_closed:
            return
        if self._thread is None:
            self._loop.close()
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)

    def _no_reply(self, why: object) -> NoAnswerError:
        return NoAnswerError(f"vLLM at {self._address.url} gave no reply to a request: {why}")

    # ---- in the thread ---------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="vllm-rows", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        loop, key = self._loop, self._address.api_key
        asyncio.set_event_loop(loop)
        self._http = httpx.AsyncClient(
            base_url=self._address.url,
            headers={**self._headers, **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=httpx.Timeout(self._timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=self._address.through_proxy,
        )
        try:
            loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(self._http.aclose())
            loop.close()

    def _send(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if waiting:
            task = self._loop.create_task(self._ask(waiting))
            task.add_done_callback(lambda ended: _fail_the_rest(waiting, self._no_reply("it was broken off")))

    async def _ask(self, waiting: Sequence[tuple[AskedRow, Future[RowReply]]]) -> None:
        """Send rows together, and hand each caller its reply as it comes."""
        try:
            async with self._http.stream("POST", PATH, json=_body([row for row, _ in waiting])) as reply:
                if not reply.is_success:
                    await reply.aread()
                    require_success(reply, f"POST {self._address.url}{PATH}")
                async for line in reply.aiter_lines():
                    told: RowReply = json.loads(line)
                    waiting[told["row"]][1].set_result(told)
        except EngineError as error:
            _fail_the_rest(waiting, error)
        except (httpx.HTTPError, ValueError, TypeError, LookupError) as error:  # broken off, or no line of ours
            _fail_the_rest(waiting, self._no_reply(error))


def _body(rows: Sequence[AskedRow]) -> dict[str, object]:
    """The request's body. Equal prompts, as a group's rollouts have, are in it once."""
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    place = {prompt: index for index, prompt in enumerate(prompts)}
    return {"prompts": prompts, "rows": [{**vars(row), "prompt": place[row.prompt]} for row in rows]}


def _fail_the_rest(waiting: Sequence[tuple[AskedRow, Future[RowReply]]], error: EngineError) -> None:
    """Raise the error in each caller that has no reply yet; one of its own, as threads extend an error's traceback."""
    for _, future in waiting:
        if not future.done():
            future.set_exception(type(error)(*error.args))
