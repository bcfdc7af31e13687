"""Many replies in one request: each is its own prompt's and seed's, comes when it has ended, and fails alone."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from dspy.lm15 import Config, InvalidRequestError, Message, Request, UnsupportedFeatureError
from transformers import Qwen3ForCausalLM

from dspy_fst.engine.base import Checkpoint, Completion
from dspy_fst.engine.chat import TemplateTraits
from dspy_fst.engine.replies import HERMES, ReplyReader
from dspy_fst.engine.vllm import rows as vllm_rows
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.prompts import Prompts
from dspy_fst.engine.vllm.rows import PATH, AskedRow, RowSender, read_row, row_of
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.errors import EngineError, NoAnswerError
from tests.engine.test_vllm_server import TOLERANCE, ask, checkpoints, gap, models  # noqa: F401
from tests.engine.tiny_qwen import make_tokenizer

Line = dict[str, Any]


class Endpoint(ThreadingHTTPServer):
    """Answers rows with what ``answer`` yields for a request's body; None waits until ``go`` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[dict[str, Any]] = []
        self.answer: Callable[[dict[str, Any]], Iterator[Line | None]] = replies
        self.go = threading.Event()
        self.status = 200


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.send_response(self.server.status)
        self.send_header("Connection", "close")
        self.end_headers()
        for line in self.server.answer(body):
            if line is None:
                self.server.go.wait(30)
            else:
                self.wfile.write(f"{json.dumps(line)}\n".encode())
                self.wfile.flush()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def reply(number: int, seed: int) -> Line:
    return {"row": number, "ids": [seed], "logprobs": [-1.0], "text": f"s{seed}", "finish_reason": "stop"}


def replies(body: dict[str, Any]) -> Iterator[Line | None]:
    """Every row's reply, the last row's first."""
    for number, row in reversed(list(enumerate(body["rows"]))):
        yield reply(number, row["seed"])


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def rows(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Iterator[RowSender]:
    monkeypatch.setattr(vllm_rows, "GATHERED_S", 0.3)
    rows = RowSender(Address(f"http://127.0.0.1:{endpoint.server_port}", "key", through_proxy=False), timeout_s=60)
    yield rows
    rows.close()


def row(seed: int, prompt: tuple[int, ...] = (5, 6)) -> AskedRow:
    return AskedRow(prompt, "policy", seed, 1.0, 4, (2,))


def ids_of(rows: RowSender, asked: list[AskedRow]) -> list[Any]:
    """For each row its reply's ids, None where it is refused, or the class of its error."""

    def one(row: AskedRow) -> Any:
        try:
            told = rows.reply_to(row)
        except EngineError as error:
            return type(error)
        return told and told["ids"]

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(one, asked))


def test_calls_that_wait_together_are_one_request_and_each_gets_the_reply_to_its_own_seed(
    rows: RowSender, endpoint: Endpoint
) -> None:
    asked = [row(seed, (5, 6) if seed % 2 else (7,)) for seed in range(8)]
    assert ids_of(rows, asked) == [[seed] for seed in range(8)]
    (body,) = endpoint.asked
    assert sorted(body["prompts"]) == [[5, 6], [7]]
    sent = {each["seed"]: each for each in body["rows"]}
    assert [body["prompts"][sent[seed]["prompt"]] for seed in (3, 4)] == [[5, 6], [7]]
    assert {name: sent[3][name] for name in ("model", "temperature", "max_tokens", "stop_token_ids")} == {
        **{"model": "policy", "temperature": 1.0},
        **{"max_tokens": 4, "stop_token_ids": [2]},
    }


def test_a_reply_that_has_ended_does_not_wait_for_a_longer_one(rows: RowSender, endpoint: Endpoint) -> None:
    def one_is_long(body: dict[str, Any]) -> Iterator[Line | None]:
        long = next(number for number, each in enumerate(body["rows"]) if each["seed"] == 0)
        for number, each in enumerate(body["rows"]):
            if number != long:
                yield reply(number, each["seed"])
        yield None
        yield reply(long, 0)

    endpoint.answer = one_is_long
    with ThreadPoolExecutor(3) as pool:
        long, *short = [pool.submit(rows.reply_to, row(seed)) for seed in range(3)]
        assert [told and told["ids"] for told in (call.result(20) for call in short)] == [[1], [2]]
        assert not long.done()
        endpoint.go.set()
        told = long.result(20)
        assert told is not None
        assert told["ids"] == [0]


def test_a_row_fails_alone(rows: RowSender, endpoint: Endpoint) -> None:
    def some_fail(body: dict[str, Any]) -> Iterator[Line | None]:
        told: dict[int, Line] = {1: {"refused": "too long"}, 2: {"failed": "EngineDeadError"}}
        for number, each in enumerate(body["rows"]):
            yield {**told.get(each["seed"], reply(number, each["seed"])), "row": number}

    endpoint.answer = some_fail
    assert ids_of(rows, [row(seed) for seed in range(4)]) == [[0], None, NoAnswerError, [3]]


def test_an_answer_that_breaks_off_fails_the_rows_that_have_no_reply_yet(rows: RowSender, endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: iter([reply(0, body["rows"][0]["seed"])])
    found = ids_of(rows, [row(seed) for seed in range(3)])
    assert sorted(map(str, found)).count(str(NoAnswerError)) == 2
    assert sum(isinstance(each, list) for each in found) == 1


@pytest.mark.parametrize(("status", "kind"), [(500, NoAnswerError), (401, EngineError)])
def test_a_server_that_refuses_or_fails_the_whole_request_says_so_to_each(
    rows: RowSender, endpoint: Endpoint, status: int, kind: type[EngineError]
) -> None:
    endpoint.status, endpoint.answer = status, lambda body: iter([{"error": {"message": "an outage"}}])
    assert ids_of(rows, [row(seed) for seed in range(3)]) == [kind] * 3


def test_a_reply_that_does_not_come_in_time_and_a_closed_connection_are_told(endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: iter([None])
    rows = RowSender(Address(f"http://127.0.0.1:{endpoint.server_port}", None, through_proxy=False), timeout_s=0.3)
    with pytest.raises(NoAnswerError, match="gave no reply to a request"):
        rows.reply_to(row(0))
    rows.close()
    rows.close()
    with pytest.raises(NoAnswerError, match="was closed"):
        rows.reply_to(row(0))


def test_a_call_that_waits_fails_when_another_thread_closes_the_connection(rows: RowSender, endpoint: Endpoint) -> None:
    endpoint.answer = lambda body: iter([None])
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(rows.reply_to, row(0))
        while not endpoint.asked:
            time.sleep(0.01)
        rows.close()
        with pytest.raises(NoAnswerError):
            call.result(20)


# What may be a row


def request(**config: Any) -> Request:
    return Request("policy", (Message.user("hi"),), system="be brief", config=Config(max_tokens=4, **config))


def test_a_request_that_asks_for_more_than_a_row_can_say_is_none() -> None:
    asked = row_of(request(temperature=0.5, extensions={"stop_token_ids": [2, 3]}), 7, (5, 6), "shared@v1")
    assert asked == AskedRow((5, 6), "shared@v1", 7, 0.5, 4, (2, 3))
    for config in ({"logprobs": 2}, {"stop": ("x",)}, {"extensions": {"priority": 1}}):
        assert row_of(request(**config), 7, (5, 6), "policy") is None
    with pytest.raises(UnsupportedFeatureError, match="not what training scores"):
        row_of(request(top_p=0.5), 7, (5, 6), "policy")


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"finish_reason": "abort"}, NoAnswerError),
        ({"finish_reason": None}, NoAnswerError),
        ({"logprobs": []}, EngineError),
    ],
)
def test_a_reply_that_is_not_exact_is_refused(changes: Line, kind: type[EngineError]) -> None:
    whole = read_row(row(7), reply(0, 7), "v1")  # type: ignore[arg-type]
    assert (whole.prompt_ids, whole.completion_ids, whole.logprobs, whole.weights) == ((5, 6), (7,), (-1.0,), "v1")
    with pytest.raises(EngineError) as caught:
        read_row(row(7), {**reply(0, 7), **changes}, "v1")  # type: ignore[typeddict-item]
    assert isinstance(caught.value, NoAnswerError) == (kind is NoAnswerError)


# Where a prompt is rendered


def a_completion(prompt_ids: tuple[int, ...]) -> Completion:
    return read_row(AskedRow(prompt_ids, "policy", 0, 1.0, 4), reply(0, 7), "v1")  # type: ignore[arg-type]


def test_a_prompt_is_rendered_here_only_in_forms_that_the_server_rendered_alike() -> None:
    tokenizer = make_tokenizer()
    reader = ReplyReader(tokenizer, HERMES, False, False, TemplateTraits.of(tokenizer))
    ours = Prompts(reader)._renderer.ids(request())  # type: ignore[union-attr]
    given: list[tuple[int, ...] | None] = []

    def server(prompt_ids: tuple[int, ...]) -> Callable[[tuple[int, ...] | None], Completion]:
        return lambda ids: given.append(ids) or a_completion(prompt_ids)  # type: ignore[func-returns-value]

    alike, other = Prompts(reader), Prompts(reader)
    for _ in range(2):
        alike.asked(request(), server(ours))
        other.asked(request(), server((1, *ours)))
    assert given == [None, None, ours, None]
    given.clear()
    alike.asked(Request("policy", (Message.user("hi"),)), server(ours))  # another form: no system text
    alike.asked(request(stop=("x",)), server(ours))
    assert given == [None, None]


# The real server


@pytest.mark.vllm
def test_a_row_among_others_gives_what_its_request_gives_alone(
    server: VLLMServer,
    checkpoints: list[Checkpoint],  # noqa: F811
    models: list[Qwen3ForCausalLM],  # noqa: F811
) -> None:
    server.load(checkpoints[0])
    client = server._client
    assert client is not None
    assert client.rows is not None
    asked = [(ask(f"Tell me {number % 3}.", temperature=0.8), seed) for seed, number in enumerate(range(12))]
    server.complete(asked[0][0], 0)  # the form is known from now on
    sent: list[int] = []
    body_of = vllm_rows._body
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_rows, "_body", lambda rows: sent.append(len(rows)) or body_of(rows))
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(lambda call: server.complete(*call), asked))
    assert sum(sent) == 12
    assert len(sent) < 12
    rows, client.rows = client.rows, None
    try:
        alone = [client.sample(request, seed, "v") for request, seed in asked]
    finally:
        client.rows = rows
    for row, single in zip(together, alone, strict=True):
        assert (row.prompt_ids, row.completion_ids) == (single.prompt_ids, single.completion_ids)
        assert (row.finish_reason, row.response.text) == (single.finish_reason, single.response.text)
        assert row.logprobs == pytest.approx(single.logprobs, abs=TOLERANCE)
        assert gap(models[0], row, 0.8) < TOLERANCE
    assert len({row.completion_ids for row in together}) > 3
    with pytest.raises(InvalidRequestError, match="maximum context length"):
        server.complete(ask("x" * 1200), seed=0)


@pytest.mark.vllm
def test_the_endpoint_of_rows_asks_for_the_key(server: VLLMServer) -> None:
    import httpx

    assert server.address is not None
    with httpx.Client(base_url=server.address.url, timeout=60, trust_env=False) as stranger:
        assert stranger.get(PATH).status_code == stranger.post(PATH, json={}).status_code == 401
