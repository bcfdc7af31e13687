"""Events while a program runs: each module's outputs when it has finished, and the text of the last one before that.

Text comes token by token only from a vLLM server, not from the engine in process: a complete text is never cut into
pieces afterwards.
"""

import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import dspy
from dspy import lm15
from dspy.clients.engines.base import StreamEvent
from dspy.streaming import StreamListener
from dspy.streaming.messages import StreamResponse
from dspy.utils.callback import BaseCallback
from pydantic_core import to_jsonable_python

from dspy_fst.engine.base import Completion, Through
from dspy_fst.engine.chat import chat_messages, fitted
from dspy_fst.engine.replies import with_stop_tokens
from dspy_fst.engine.vllm.reply_stream import read_stream
from dspy_fst.engine.vllm.wire import RESHAPING
from dspy_fst.errors import EngineError
from dspy_fst.policy_lm import EngineHandle, PolicyLM
from dspy_fst.rollout.call_recorder import calling_predictor, complete_recorded, no_second_call
from dspy_fst.rollout.chat_adapters import adapter_in_force
from dspy_fst.serve.upstream import Upstream
from dspy_fst.types import PREDICTOR_TAG

if TYPE_CHECKING:
    from litellm import ModelResponseStream

Send = Callable[[object, str], None]
"""Sends (data, name of the event); may raise EngineError when nobody listens."""
SETTING = "fst_deltas"
"""Name of the DSPy setting that holds the `Deltas` of the current request."""
_READABLE = ("ChatAdapter", "JSONAdapter", "XMLAdapter")
"""Adapters whose partial replies DSPy's StreamListener can read."""


class ModuleEvents(BaseCallback):
    """Sends ``{"module", "outputs"}`` for every predictor that has finished."""

    def __init__(self, send: Send):
        self._send_event = send
        self._running: dict[str, str] = {}

    def on_module_start(self, call_id: str, instance: object, inputs: dict[str, object]) -> None:
        if (name := getattr(instance, PREDICTOR_TAG, None)) is not None:
            self._running[call_id] = name

    def on_module_end(
        self, call_id: str, outputs: dspy.Prediction | None, exception: BaseException | None = None
    ) -> None:
        name = self._running.pop(call_id, None)
        if name is not None and exception is None and outputs is not None:
            values = to_jsonable_python(dict(outputs.items()), fallback=str)
            with suppress(EngineError):  # nobody listens; the next call of the model is refused
                self._send_event({"module": name, "outputs": values}, "module")


class Deltas:
    """Sends the text of one predictor's output fields while it is sampled: ``{"module", "field", "text"}``.

    The text is what the model writes: of a number or a list, its raw form.
    """

    def __init__(self, predictor: str, fields: list[str], send: Send):
        self.predictor = predictor
        self._fields, self._send_event = fields, send
        self._listeners: list[StreamListener] = []

    def begin(self) -> None:
        """A new reply of the predictor begins."""
        adapter = type(adapter_in_force()).__name__
        fields = self._fields if adapter in _READABLE else []
        self._listeners = [StreamListener(name, predict_name=self.predictor) for name in fields]

    def add(self, text: str) -> None:
        """A piece of the reply."""
        chunk = SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=text))])
        piece = cast("ModelResponseStream", chunk)  # as much of one as a listener reads
        self._send_pieces([listener.receive(piece) for listener in self._listeners])

    def end(self) -> None:
        """The reply is complete."""
        self._send_pieces([listener.finalize() for listener in self._listeners])

    def _send_pieces(self, pieces: list[StreamResponse | None]) -> None:
        for piece in pieces:
            if piece is not None and piece.chunk:
                text = {"module": self.predictor, "field": piece.signature_field_name, "text": piece.chunk}
                self._send_event(text, "delta")


class StreamingHandle:
    """A PolicyLM's engine that sends text to listening requests while it is sampled.

    Args:
        upstream: Asks the engine's server through the same LoRA adapter.
        lora_adapter: See `PolicyLM`.
    """

    def __init__(self, handle: EngineHandle, upstream: Upstream, lora_adapter: str | None):
        self._handle, self._upstream = handle, upstream
        self._through: Through = {} if lora_adapter is None else {"adapter": lora_adapter}

    def complete(self, request: lm15.Request) -> lm15.Response:
        return complete_recorded(self._sample, request, lambda: secrets.randbits(31))

    def stream(self, request: lm15.Request) -> Iterator[StreamEvent]:
        """See `EngineHandle`."""
        return self._handle.stream(request, **self._through)

    @property
    def supports_function_calling(self) -> bool:
        """See `EngineHandle`."""
        return self._handle.supports_function_calling

    @property
    def supports_reasoning(self) -> bool:
        """See `EngineHandle`."""
        return self._handle.supports_reasoning

    def close(self) -> None:
        """Nothing is closed: `Service` releases the engine."""

    def __deepcopy__(self, memo: dict[int, object]) -> "StreamingHandle":
        return self

    def _sample(self, request: lm15.Request, seed: int) -> Completion:
        engine = self._handle.ready()
        deltas: Deltas | None = dspy.settings.get(SETTING)
        if deltas is None or deltas.predictor != calling_predictor() or request.config.extensions:
            return engine.complete(request, seed, **self._through)
        if request.tools or self._handle.reader.thinks:  # its pieces would contain tool calls and thoughts
            return engine.complete(request, seed, **self._through)
        try:
            reader = self._handle.reader
            with_stops = with_stop_tokens(fitted(request, reader.traits), reader.stop_ids)
            chunks = self._upstream.stream(_body(with_stops, seed))
            first = next(chunks)
        except (lm15.LM15Error, EngineError):
            # The engine reports the error as DSPy expects it, or restarts its server.
            return engine.complete(request, seed, **self._through)
        with closing(chunks):
            completion = _read(request, str(engine.weights), chain([first], chunks), deltas)
        no_second_call()  # the listener has this reply; a second one would be appended to it
        return completion


def streaming_lm(lm: PolicyLM, upstream: Upstream) -> PolicyLM:
    """A copy of the LM whose replies can be streamed."""
    return lm.on(cast(EngineHandle, StreamingHandle(lm.handle, upstream, lm.lora_adapter)))


def _body(request: lm15.Request, seed: int) -> dict[str, object]:
    config = request.config
    return {
        "messages": chat_messages(request),
        "temperature": 1.0 if config.temperature is None else config.temperature,
        "max_tokens": config.max_tokens,
        "seed": seed,
        "return_token_ids": True,
        **(config.extensions or {}),
        # The policy's own distribution, as in training, whatever defaults the server has.
        "top_p": 1.0,
        **RESHAPING,
    }


def _read(request: lm15.Request, weights: str, chunks: Iterable[dict[str, object]], deltas: Deltas) -> Completion:
    """The complete reply; its pieces are sent on the way."""
    pieces = read_stream(chunks, request, weights, scored=False)
    deltas.begin()
    while True:
        try:
            deltas.add(next(pieces))
        except StopIteration as end:
            deltas.end()
            return cast(Completion, end.value)
