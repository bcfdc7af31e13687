"""The trained model itself, at an OpenAI-compatible chat endpoint.

Behind it is the engine that the program uses: the vLLM server's own chat endpoint, from which only what stands in
`ChatRequest` is asked; or the engine in process, which answers whole and knows fewer settings.
"""

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, closing
from functools import partial
from typing import Any, Literal

from dspy import lm15
from pydantic import Field

from dspy_fst.engine.base import Engine
from dspy_fst.errors import EngineError
from dspy_fst.policy import PolicyLM
from dspy_fst.serve.errors import ApiError
from dspy_fst.serve.events import EventStream, Feed
from dspy_fst.serve.gate import Ticket
from dspy_fst.serve.metrics import Metrics
from dspy_fst.serve.schema import Sent
from dspy_fst.serve.upstream import Upstream
from dspy_fst.serve.worker import in_thread


class TextPart(Sent):
    type: Literal["text"]
    text: str


class Message(Sent):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(Sent):
    include_usage: bool = False


class ChatRequest(Sent):
    """Of OpenAI's chat completions, what is offered here. Text only: nothing that a caller names is fetched."""

    model: str
    messages: list[Message] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2, description="The trained policy's own when it is not given.")
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**31)
    n: Literal[1] | None = None
    user: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None


_OURS = {"model", "n", "user", "stream", "stream_options", "max_completion_tokens"}
"""Settings that are dealt with here and not passed on."""
_EVERYWHERE = {*_OURS, "messages", "temperature", "max_tokens", "seed"}
"""Settings that every engine knows."""
_NEUTRAL: Mapping[str, Any] = {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False}
"""Values that change nothing, which some clients always send."""
_SHOWN = ("id", "object", "created", "choices", "usage")
"""What of the server's replies goes on to the caller."""


class Chat:
    """The endpoint.

    Args:
        name: Under which the model is asked for.
        upstream: The engine's server; None for an engine in process.
    """

    def __init__(self, name: str, policy: PolicyLM, engine: Engine, upstream: Upstream | None, metrics: Metrics):
        self.name = name
        self._policy, self._engine, self._upstream, self._metrics = policy, engine, upstream, metrics

    async def answer(self, request: ChatRequest, ticket: Ticket) -> dict[str, Any] | EventStream:
        """A whole completion, or the stream of one.

        Raises:
            ApiError: another model's name, a setting that the engine does not know, an engine that fails.
        """
        if request.model != self.name:
            raise ApiError(404, "model_not_found", f"There is no model {request.model!r} here, only {self.name!r}.")
        body = self._body(request)
        if self._upstream is None:
            _check_in_process(request)
            return await in_thread(partial(self._in_process, body), ticket)
        if request.stream:
            return await self._stream(self._upstream, body, request.stream_options or StreamOptions(), ticket)
        return await in_thread(partial(self._whole, self._upstream, body), ticket)

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        """The request as it is passed on, with the policy's own settings where the caller says nothing."""
        body = request.model_dump(exclude_none=True, exclude=_OURS)
        own = {"temperature": self._policy.sampling_temperature, "seed": secrets.randbits(31)}
        most = request.max_completion_tokens or request.max_tokens or self._policy.reply_limit
        return {**own, **body, "max_tokens": most}

    def _whole(self, upstream: Upstream, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            reply = upstream.chat(body)
        except EngineError as error:
            raise engine_failed() from error
        return self._shown(reply)

    def _shown(self, reply: Mapping[str, Any]) -> dict[str, Any]:
        if usage := reply.get("usage"):
            self._metrics.tokens(usage["prompt_tokens"], usage["completion_tokens"])
        return {"model": self.name, **{key: reply[key] for key in _SHOWN if reply.get(key) is not None}}

    # ---- a stream, from a server only ----------------------------------------------------------

    async def _stream(
        self, upstream: Upstream, body: Mapping[str, Any], options: StreamOptions, ticket: Ticket
    ) -> EventStream:
        feed = Feed()
        source = feed.listen(in_thread(partial(self._pass_on, upstream, body, options, feed), ticket))
        try:
            first = await anext(source)  # a request that is refused gets its status; later there is none
        except BaseException:
            await source.aclose()
            raise
        return EventStream(_joined(first, source))

    def _pass_on(self, upstream: Upstream, body: Mapping[str, Any], options: StreamOptions, feed: Feed) -> None:
        try:
            with closing(upstream.stream(body)) as chunks:
                for chunk in chunks:
                    shown = self._shown(chunk)
                    if chunk["choices"] or options.include_usage:
                        feed.send(shown)
        except EngineError as error:
            raise engine_failed() from error
        feed.send("[DONE]")

    # ---- in process ----------------------------------------------------------------------------

    def _in_process(self, body: Mapping[str, Any]) -> dict[str, Any]:
        asked = {"model": self._policy.model, **{key: body[key] for key in ("messages", "temperature", "max_tokens")}}
        try:
            completion = self._engine.complete(lm15.request_from_openai_chat(asked), body["seed"])
        except lm15.ContextLengthError as error:
            raise ApiError(400, "context_length_exceeded", str(error)) from error
        except (lm15.UnsupportedFeatureError, ValueError, TypeError) as error:
            raise ApiError(400, "invalid_request", str(error)) from error
        except EngineError as error:
            raise engine_failed() from error
        read, sampled = len(completion.prompt_ids), len(completion.completion_ids)
        message = {"role": "assistant", "content": completion.response.text}
        reply = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": completion.finish_reason}],
            "usage": {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled},
        }
        return self._shown(reply)


def engine_failed() -> ApiError:
    return ApiError(503, "engine", "The engine that runs the model failed; ask again later.")


def _check_in_process(request: ChatRequest) -> None:
    """Refuse what this engine would silently not do."""
    if request.stream:
        message = "The engine in process answers whole; leave stream out, or serve with engine='vllm'."
        raise ApiError(400, "streaming_unavailable", message)
    given = request.model_dump(exclude_none=True)
    unknown = [key for key in given if key not in _EVERYWHERE and given[key] != _NEUTRAL.get(key)]
    if unknown:
        message = (
            f"The engine in process does not know {', '.join(unknown)}; leave them out, or serve with engine='vllm'."
        )
        raise ApiError(400, "unsupported", message)


async def _joined(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item
