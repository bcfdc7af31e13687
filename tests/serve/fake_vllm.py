"""A server on loopback that speaks as vLLM does, and an engine that is reached there."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dspy_fst.engine.vllm.address import Address
from tests.fakes import ScriptedEngine, Speak

UPSTREAM_KEY = "the-key-of-the-server-behind"


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the default of 5 refuses callers who come at the same time


class FakeVLLM:
    """Says what it is told, a few characters a chunk; keeps what it was asked."""

    def __init__(self, speak: Speak, piece: int = 3, context: int | None = None):
        self.speak, self.piece, self.context = speak, piece, context
        self.refuse: Callable[[dict[str, Any]], str | None] = lambda body: None
        """Words with which a request is refused as the caller's fault, or None."""
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.answer: tuple[int, Any] | None = None
        """(status, body) to give instead of completions."""
        self.models: Any = None
        """What to say instead of the list of models."""
        self.break_after: int | None = None
        """Chunks after which the connection is cut."""
        self.wait: Callable[[int], None] = lambda sent: None
        """Called before each chunk with the number of those sent."""
        self.cut = threading.Event()
        """Set when the listener left before the end."""
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> Address:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Headers and body go in one packet: a body of its own waits 40 ms for the headers' acknowledgement.
            wbufsize = -1

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                fake.paths.append(self.path)
                card = {"id": "weights-of-the-server", "max_model_len": fake.context}
                self._json(200, {"data": [card]} if fake.models is None else fake.models)

            def do_POST(self) -> None:
                fake.paths.append(self.path)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append(body)
                if self.headers["Authorization"] != f"Bearer {UPSTREAM_KEY}":
                    self._json(401, {"error": {"message": "wrong key"}})
                elif fake.answer is not None:
                    self._json(*fake.answer)
                elif (words := fake.refuse(body)) is not None:
                    self._json(400, {"error": {"message": words, "type": "BadRequestError", "code": 400}})
                elif body.get("stream"):
                    self._stream(body)
                else:
                    self._json(200, fake.whole(body))

            def _json(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Connection", "close")  # so that nobody is answered after the end
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, body: dict[str, Any]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.flush()
                try:
                    for sent, chunk in enumerate(fake.chunks(body)):
                        if sent == fake.break_after:
                            self.close_connection = True
                            return
                        fake.wait(sent)
                        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                        self.wfile.flush()
                    self.wfile.write(b"data: [DONE]\n\n")
                    self.wfile.flush()
                except OSError:
                    fake.cut.set()
                self.close_connection = True

        self._server = _Listener(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return Address(f"http://127.0.0.1:{self._server.server_port}", UPSTREAM_KEY, through_proxy=False)

    @property
    def runs(self) -> bool:
        return self._server is not None

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def whole(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self.speak(body["messages"], body["seed"])
        message = {"role": "assistant", "content": text, "refusal": None, "annotations": None, "reasoning": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "weights-of-the-server",
            "choices": [{**choice, "stop_reason": None, "token_ids": None, "routed_experts": None}],
            "usage": {"prompt_tokens": 7, "completion_tokens": len(text), "total_tokens": 7 + len(text)},
            "kv_transfer_params": {"host": "inside"},
            "prompt_logprobs": None,
            "prompt_token_ids": None,
        }

    def chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        text = self.speak(body["messages"], body["seed"])
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "weights-of-the-server"}
        pieces = [text[at : at + self.piece] for at in range(0, len(text), self.piece)]
        ids = bool(body.get("return_token_ids"))
        yield {
            **head,
            "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}],
            **({"prompt_token_ids": [1, 2, 3]} if ids else {}),
        }
        for number, piece in enumerate(pieces):
            choice = {
                "index": 0,
                "delta": {"content": piece},
                "finish_reason": "stop" if number == len(pieces) - 1 else None,
                "token_ids": [ord(c) for c in piece] if ids else None,
            }
            yield {**head, "choices": [choice]}
        usage = {"prompt_tokens": 3, "completion_tokens": len(text), "total_tokens": 3 + len(text)}
        yield {**head, "choices": [], "usage": usage}


class ServerEngine(ScriptedEngine):
    """An engine behind a FakeVLLM; its server is started when it is loaded, and again when scoring finds it gone."""

    def __init__(self, fake: FakeVLLM):
        super().__init__(fake.speak)
        self.fake = fake
        self.address: Address | None = fake.start()
        self.whole_replies = 0
        self.through: list[str] = []
        """The LoRA adapters that whole replies were asked through."""
        self._lock = threading.Lock()

    def complete(self, request: Any, seed: int, *rest: Any, adapter: str | None = None) -> Any:
        self.whole_replies += 1
        self.through += [adapter] if adapter else []
        return super().complete(request, seed)

    def score(self, sequences: Any) -> list[list[float]]:
        with self._lock:
            if not self.fake.runs:
                self.address = self.fake.start()
        return super().score(sequences)


@contextmanager
def behind(program: Any, fake: FakeVLLM) -> Iterator[ServerEngine]:
    """Give the program's PolicyLM an engine that is a server."""
    handle = next(predictor.lm for _, predictor in program.named_predictors()).handle
    engine = ServerEngine(fake)
    engine.version = handle.engine.weights
    handle._engine = engine
    try:
        yield engine
    finally:
        fake.stop()
