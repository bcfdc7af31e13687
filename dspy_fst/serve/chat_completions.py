"""The trained model at an OpenAI-compatible chat endpoint.

The program's engine answers. A vLLM server is asked at its own chat endpoint, with nothing but the settings of
`ChatRequest`. The engine in process knows fewer settings and replies when the reply is complete. Both have the same
limits, the same errors and the same sampling distribution.
"""

import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, closing
from functools import partial

from dspy import lm15
from pydantic import ValidationError

from dspy_fst.engine.base import Completion, Engine, Through
from dspy_fst.engine.chat import chat_messages, fitted
from dspy_fst.engine.vllm.wire import RESHAPING
from dspy_fst.errors import EngineError
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.serve.admission import Ticket
from dspy_fst.serve.chat_reply import chunk_of, completed, in_chunks, reply_of
from dspy_fst.serve.chat_request import ChatRequest, StreamOptions, as_template_reads
from dspy_fst.serve.error_replies import ApiError, context_exceeded, engine_failed
from dspy_fst.serve.events import EventStream, Feed
from dspy_fst.serve.prometheus import Metrics
from dspy_fst.serve.upstream import Upstream
from dspy_fst.serve.worker import in_thread


class Chat:
    """One model at the endpoint.

    Args:
        name: The model's name in requests.
        policy: The sampling of requests that say nothing of it.
        upstream: The engine's server; None for an engine in process.
        adapter: The LoRA adapter that the engine in process is asked through; None: its only weights.
    """

    def __init__(
        self,
        name: str,
        policy: PolicyLM,
        engine: Engine,
        upstream: Upstream | None,
        metrics: Metrics,
        adapter: str | None = None,
    ):
        self.name = name
        self._policy, self._engine, self._upstream, self._metrics = policy, engine, upstream, metrics
        self._through: Through = {} if adapter is None else {"adapter": adapter}

    async def answer(self, request: ChatRequest, ticket: Ticket) -> dict[str, object] | EventStream:
        """A whole completion, or the stream of one.

        Raises:
            ApiError: a setting that the engine does not know, an engine that fails.
        """
        if self._upstream is None and (unknown := request.unknown_in_process()):
            message = (
                f"The engine in process does not know {', '.join(unknown)}; leave them out, or serve with "
                "engine='vllm'."
            )
            raise ApiError(400, "unsupported", message, param=unknown[0])
        if request.stream:
            return await self._stream(request, ticket)
        return await in_thread(partial(self._whole, request), ticket)

    def _whole(self, request: ChatRequest) -> dict[str, object]:
        try:
            if self._upstream is None:
                reply = completed(self._sample(request), self.name)
            else:
                reply = reply_of(self._upstream.chat(self._body(request)), self.name)
        except (EngineError, ValidationError, lm15.LM15Error) as error:
            raise self._as_api_error(error) from error
        self._count(reply)
        return reply

    async def _stream(self, request: ChatRequest, ticket: Ticket) -> EventStream:
        feed = Feed()
        source = feed.listen(in_thread(partial(self._tell, request, feed), ticket))
        try:
            first = await anext(source)  # a refused request gets its status here; later the status has been sent
        except BaseException:
            await source.aclose()
            raise
        return EventStream(_joined(first, source))

    def _tell(self, request: ChatRequest, feed: Feed) -> None:
        options = request.stream_options or StreamOptions()
        if self._upstream is None:
            for chunk in in_chunks(self._whole(request), bool(options.include_usage)):
                feed.send(chunk)
        else:
            self._pass_on(self._upstream, request, bool(options.include_usage), feed)
        feed.send("[DONE]")

    def _pass_on(self, upstream: Upstream, request: ChatRequest, include_usage: bool, feed: Feed) -> None:
        try:
            with closing(upstream.stream(self._body(request))) as chunks:
                for chunk in chunks:
                    event = chunk_of(chunk, self.name)
                    self._count(event)
                    if event["choices"] or include_usage:
                        feed.send(event)
        except (EngineError, ValidationError, lm15.LM15Error) as error:
            raise self._as_api_error(error) from error

    def _sample(self, request: ChatRequest) -> Completion:
        """A reply of the engine in process.

        Raises:
            ApiError: the messages cannot be read.
            EngineError, lm15.LM15Error: see `Engine.complete`.
        """
        body = self._body(request)
        canonical = self._canonical({key: body[key] for key in ("messages", "temperature", "max_tokens")})
        seed = body["seed"]
        assert isinstance(seed, int)
        return self._engine.complete(canonical, seed, **self._through)

    def _body(self, request: ChatRequest) -> dict[str, object]:
        """The request for the engine. Settings that the caller leaves out are the policy's.

        So the sampling distribution is the policy's own, as in training, whatever defaults the server has.
        """
        return {
            "temperature": self._policy.sampling_temperature,
            "seed": secrets.randbits(31),
            "top_p": 1.0,
            **RESHAPING,
            **self._stops(),
            **request.for_server(),
            "messages": self._messages(request),
            "max_tokens": self._longest(request),
        }

    def _messages(self, request: ChatRequest) -> list[dict[str, object]]:
        """The messages. For a server they are fitted to the template; the engine in process does that itself."""
        messages = [as_template_reads(message) for message in request.messages]
        if self._upstream is None or any(message.get("tool_calls") for message in messages):
            return messages
        traits = self._policy.handle.reader.traits
        if traits.has_system and not traits.alternating:
            return messages
        return [{**message} for message in chat_messages(fitted(self._canonical({"messages": messages}), traits))]

    def _canonical(self, body: Mapping[str, object]) -> lm15.Request:
        """A body as DSPy's engines take it.

        Raises:
            ApiError, lm15.LM15Error: it cannot be read.
        """
        try:
            return lm15.request_from_openai_chat({"model": self._policy.model, **body})
        except (ValueError, TypeError) as error:
            raise ApiError(400, "invalid_request", str(error)[:2000]) from error

    def _stops(self) -> dict[str, object]:
        ids = self._policy.handle.reader.stop_ids if self._upstream is not None else ()
        return {"stop_token_ids": sorted(ids)} if ids else {}

    def _longest(self, request: ChatRequest) -> int | None:
        """The longest reply, in tokens; None when only the context limits it.

        Raises:
            ApiError: the caller asks for more tokens than the model's context has.
        """
        context = self._context()
        if request.most is None:
            limits = [limit for limit in (self._policy.reply_limit, context) if limit is not None]
            return min(limits, default=None)
        name, most = request.most
        if context is not None and most > context:
            message = f"{name} is {most}, and the model's context has {context} tokens, prompt and reply together."
            raise ApiError(400, "invalid_value", message, param=name)
        return most

    def _context(self) -> int | None:
        """Tokens of the model's context; None where it has no limit, or the limit is unknown."""
        if self._upstream is not None:
            return self._upstream.context
        context: int | None = getattr(self._engine, "context", None)
        return context

    def _count(self, reply: Mapping[str, object]) -> None:
        usage = reply.get("usage")
        if isinstance(usage, Mapping):
            self._metrics.tokens(usage["prompt_tokens"], usage["completion_tokens"])

    def _as_api_error(self, error: Exception) -> ApiError:
        if isinstance(error, lm15.ContextLengthError):
            return context_exceeded(self._context(), "messages")
        if isinstance(error, lm15.LM15Error):
            return ApiError(400, "invalid_request", str(error)[:2000])
        return engine_failed()


async def _joined(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item
