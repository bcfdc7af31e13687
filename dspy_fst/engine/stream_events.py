"""Turns a policy's reply into DSPy's stream events, for ``dspy.streamify`` and its listeners.

The order of events is that of DSPy 3.4 (clients/engines/base.py): one start event, deltas, one end event.
"""

import re
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import Unpack

from dspy import lm15
from dspy.clients.engines.base import StreamEvent

from dspy_fst.engine.base import Completion, Engine, StreamingEngine, Through
from dspy_fst.engine.call_threads import CALLS
from dspy_fst.engine.chat import Ids
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
"""Words, runs of punctuation, and the ends of JSON fields. The matches together are the whole text."""


def pieces(
    engine: Engine,
    reader: ReplyReader,
    request: lm15.Request,
    seed: int,
    prompt_ids: Ids | None,
    **through: Unpack[Through],
) -> Generator[str, None, Completion]:
    """The reply's text, piece by piece as it is sampled; the generator returns the completion.

    There are no pieces in three cases: the engine does not stream; the text may hold thoughts or tool calls, which can
    be divided only once it is complete; or the conversation continues from sampled ids, which the server's chat
    endpoint does not take.
    """
    if prompt_ids is not None:
        return engine.complete(request, seed, prompt_ids, **through)
    divided = reader.thinks or request.tools or request.config.logprobs is not None
    if divided or not isinstance(engine, StreamingEngine):
        return engine.complete(request, seed, **through)
    return (yield from engine.stream(request, seed, **through))


def events(reply: Generator[str, None, Completion], request: lm15.Request) -> Iterator[StreamEvent]:
    """The events of a reply that `pieces` yields. A reply without pieces is split into words once it is whole."""
    with closing(reply):
        started = False
        while True:
            try:
                text = next(reply)
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
    """Split a text delta into one delta per word; any other event is unchanged.

    DSPy's listener misses a field whose beginning and end are in one piece (StreamListener.receive). The
    log-probabilities stay with the first word; a consumer that joins the deltas gets them in order.
    """
    if not isinstance(event, lm15.StreamDeltaEvent) or not isinstance(event.delta, lm15.TextDelta):
        yield event
        return
    first, *rest = _PIECE.findall(event.delta.text) or [""]
    yield lm15.StreamDeltaEvent(delta=replace(event.delta, text=first))
    for piece in rest:
        yield lm15.StreamDeltaEvent(delta=lm15.TextDelta(text=piece, part_index=event.delta.part_index))


async def events_in_thread(source: Iterator[StreamEvent]) -> AsyncIterator[StreamEvent]:
    """The same events for ``acall``; a worker thread waits for each."""
    try:
        while (event := await CALLS.run(partial(next, source, None))) is not None:
            yield event
    finally:
        if isinstance(source, Generator):
            with suppress(ValueError):  # a thread still waits for the next event; the garbage collector closes it
                source.close()
