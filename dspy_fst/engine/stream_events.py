"""A policy's reply as DSPy's stream events, for ``dspy.streamify`` and its listeners.

The contract is that of DSPy 3.4, clients/engines/base.py: one start event, deltas, one end event.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import replace

from dspy import lm15
from dspy.clients.engines.base import StreamEvent

from dspy_fst.engine.base import Completion, Engine, StreamingEngine
from dspy_fst.engine.prompt_rendering import Ids
from dspy_fst.engine.replies import ReplyReader

_PIECE = re.compile(
    r"""
    \s* " (?: \s* , \s* " \w+ " )? \s* : \s* "?  # JSON: a field's end with the next name, as far as the next value
    | \s* \w+
    | \s* [^\w\s"]+
    | \s* " [^\w\s":]*
    | \s+
    """,
    re.VERBOSE,
)
"""Words, runs of signs, and joints of JSON; together every character of a text."""


def pieces(
    engine: Engine, reader: ReplyReader, request: lm15.Request, seed: int, prompt_ids: Ids | None
) -> Generator[str, None, Completion]:
    """The reply's text as it comes; nothing before its end where the engine answers whole, where the pieces would hold
    thoughts and tool calls, which are divided from the text when it is known, or where a conversation goes on from
    sampled ids, which the server's chat endpoint does not take."""
    if prompt_ids is not None:
        return engine.complete(request, seed, prompt_ids)
    divided = reader.thinks or request.tools or request.config.logprobs is not None
    if divided or not isinstance(engine, StreamingEngine):
        return engine.complete(request, seed)
    return (yield from engine.stream(request, seed))


def events(told: Generator[str, None, Completion], request: lm15.Request) -> Iterator[StreamEvent]:
    """The pieces and their end as events; a reply of which no piece was told is told in words when it is whole."""
    with closing(told):
        started = False
        while True:
            try:
                text = next(told)
            except StopIteration as end:
                response: lm15.Response = end.value.response
                break
            if not started:
                yield lm15.StreamStartEvent(model=request.model)
            started = True
            yield lm15.StreamDeltaEvent(delta=lm15.TextDelta(text=text))
    if started:
        yield lm15.StreamEndEvent(finish_reason=response.finish_reason, usage=response.usage)
    else:
        for event in lm15.response_to_events(response):
            yield from _in_words(event)


def _in_words(event: StreamEvent) -> Iterator[StreamEvent]:
    """A text's delta as one delta a word, any other event as it is.

    DSPy's listener finds no field in a piece that holds the field's beginning and its end (StreamListener.receive).
    The log-probabilities stay with the first word; whoever puts the reply together again joins them in order.
    """
    if not isinstance(event, lm15.StreamDeltaEvent) or not isinstance(event.delta, lm15.TextDelta):
        yield event
        return
    first, *rest = _PIECE.findall(event.delta.text) or [""]
    yield lm15.StreamDeltaEvent(delta=replace(event.delta, text=first))
    for piece in rest:
        yield lm15.StreamDeltaEvent(delta=lm15.TextDelta(text=piece, part_index=event.delta.part_index))


async def events_in_thread(source: Iterator[StreamEvent]) -> AsyncIterator[StreamEvent]:
    """The same events for ``acall``: each is waited for in a worker thread."""
    try:
        while (event := await asyncio.to_thread(next, source, None)) is not None:
            yield event
    finally:
        if isinstance(source, Generator):
            with suppress(ValueError):  # a thread still waits for the next one; then the collector closes it
                source.close()
