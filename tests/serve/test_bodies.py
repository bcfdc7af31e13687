"""One caller with a lawful body keeps nobody waiting, and is told in few words what is wrong with it."""

import asyncio
import gzip
import json
import logging
import threading
import time

import dspy
import httpx
import pytest

from dspy_fst.serve.app import create_app
from dspy_fst.serve.body import SHOWN_FAULTS
from dspy_fst.serve.serving_settings import CHAT, ServeSettings
from tests.fakes import fields
from tests.serve.fake_vllm import FakeVLLM, behind
from tests.serve.makers import (
    AUTH,
    KEY,
    PATH,
    app_of,
    ask,
    client_of,
    compiled,
    figures,
    get,
    question,
    served,
    wait_until,
)

HEALTH_S = 0.5
MOST = ServeSettings().max_body_bytes
JSON = {"Content-Type": "application/json"}
USER = {"role": "user", "content": ""}


def messages_of(one: str, count: int) -> bytes:
    return f'{{"model":"policy","messages":[{",".join([one] * count)}]}}'.encode()


def keys(count: int, padding: str = "") -> bytes:
    names = ",".join(f'"k{number}{padding}":1' for number in range(count))
    return f'{{"model":"policy","messages":[],{names}}}'.encode()


LARGEST = {
    "numbers": messages_of("1", 490_000),
    "empty messages": messages_of("{}", 330_000),
    "unknown keys": keys(80_000),
    "valid messages": messages_of('{"role":"user","content":""}', 33_000),
    "arrays in arrays": b'{"model":"policy","messages":' + b"[" * 30 + b"[]," * 320_000 + b"[]" + b"]" * 30 + b"}",
    "as many as are taken": messages_of('{"role":"user","content":"' + "x " * 220 + '"}', 2_040),
    "as many wrong ones as are checked": keys(19_000, "x" * 38),
    "one long text": messages_of('{"role":"user","content":"' + "x " * 499_000 + '"}', 1),
    "a long name": b'{"model":"policy","' + b"k" * 990_000 + b'":1}',
    "a long role": messages_of('{"role":"' + "k" * 990_000 + '"}', 1),
}
TAKEN = {"as many as are taken", "one long text"}


@pytest.fixture(params=["in_process", "behind_vllm"])
def app(request):
    program, _ = compiled(lambda messages, seed: "yes")
    if request.param == "in_process":
        yield create_app(program, ServeSettings(api_key=KEY))
        return
    with behind(program, FakeVLLM(lambda messages, seed: "yes")):
        yield create_app(program, ServeSettings(api_key=KEY))


class Pulse:
    """Asks /health without a pause on a connection of its own, and keeps the longest wait of each spell."""

    def __init__(self, url: str):
        self.waits: list[float] = []
        self._client, self._over = httpx.Client(base_url=url, timeout=60), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Pulse":
        self._client.get("/health")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)
        self._client.close()

    def longest_while(self, work) -> float:
        begun = len(self.waits)
        work()
        done = len(self.waits)
        wait_until(lambda: len(self.waits) > done, "/health answers")
        return max(self.waits[begun:])

    def _beat(self) -> None:
        while not self._over.is_set():
            began = time.perf_counter()
            assert self._client.get("/health").status_code == 200
            self.waits.append(time.perf_counter() - began)
            time.sleep(0.002)


def replies_and_wait(app, path: str, body: bytes) -> tuple[list[httpx.Response], float]:
    """Three replies to a body, and the longest wait for /health at the best of them: a busy machine delays some, a body
    that stalls the server all."""
    replies: list[httpx.Response] = []
    headers = {**AUTH, **JSON}
    with served(app) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as client, Pulse(url) as pulse:
        waits = [pulse.longest_while(lambda: replies.append(client.post(path, content=body))) for _ in range(3)]
    return replies, min(waits)


@pytest.mark.parametrize("shape", LARGEST)
def test_health_answers_while_one_caller_sends_the_largest_body_that_is_allowed(app, shape):
    body = LARGEST[shape]
    assert 0.8 * MOST < len(body) <= MOST
    replies, wait = replies_and_wait(app, CHAT, body)
    assert {reply.status_code for reply in replies} == {200 if shape in TAKEN else 400}
    assert max(len(reply.content) for reply in replies) < 10_000
    assert wait < HEALTH_S


def test_health_answers_while_a_program_s_inputs_are_all_wrong():
    program = dspy.Predict("numbers: list[int] -> answer: str")
    app = app_of(lambda messages, seed: fields(answer="x"), program)
    many = f'{{"inputs":{{"numbers":[{",".join(["true"] * 19_000)}]}}}}'.encode()
    more = f'{{"inputs":{{"numbers":[{",".join(["true"] * 190_000)}]}}}}'.encode()
    (wrong, *_), wait = replies_and_wait(app, PATH, many)
    (too_many, *_), other = replies_and_wait(app, PATH, more)
    assert (wrong.status_code, too_many.status_code) == (422, 400)
    error = wrong.json()["error"]
    assert "19000 faults in all" in error["message"]
    assert [fault["where"] for fault in error["faults"]] == [f"inputs.numbers.{i}" for i in range(SHOWN_FAULTS)]
    assert too_many.json()["error"]["code"] == "too_many_values"
    assert "20000 values" in too_many.json()["error"]["message"]
    assert max(wait, other) < HEALTH_S


def test_how_many_values_a_body_may_hold_is_a_setting():
    program = dspy.Predict("numbers: list[int] -> answer: str")
    body = {"inputs": {"numbers": list(range(100))}}
    for most, status in ((101, 400), (102, 200)):
        app = app_of(lambda messages, seed: fields(answer="x"), program, settings={"max_body_values": most})
        assert ask(app, body).status_code == status


def test_names_and_faults_are_cut(app):
    reply = ask(app, {"model": "policy", "messages": [USER], "k" * 5_000: 1}, CHAT)
    (fault,) = reply.json()["error"]["faults"]
    assert fault["where"] == "k" * 64 + "..."
    assert len(reply.content) < 1_000


def test_a_body_must_be_said_to_be_json(app):
    body = json.dumps({"model": "policy", "messages": [USER]})
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        reply = ask(app, None, CHAT, content=body, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/vnd.mine+json"):
        assert ask(app, None, CHAT, content=body, headers={"Content-Type": kind}).status_code == 200


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br", 415), ("identity", 200)])
def test_a_packed_body_is_refused_for_what_it_is(app, encoding, status):
    body = json.dumps({"model": "policy", "messages": [USER]}).encode()
    body = gzip.compress(body) if encoding == "gzip" else body
    reply = ask(app, None, CHAT, content=body, headers={**JSON, "Content-Encoding": encoding})
    assert reply.status_code == status
    if status == 415:
        assert reply.json()["error"]["code"] == "unsupported_media_type"
        assert "Content-Encoding" in reply.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a": "\\ud800"}', b'{"a": 1e999}'])
@pytest.mark.parametrize("path", [PATH, f"{PATH}/stream", CHAT])
def test_a_body_that_is_no_json_is_a_bad_request_on_every_path(path, body):
    reply = ask(app_of(), None, path, content=body, headers=JSON)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("seed", [False, "5", 5.5, -1])
def test_a_program_s_seed_and_inputs_are_of_the_type_that_the_schema_says(seed):
    app = app_of(lambda m, s: fields(answer="x"), dspy.Predict("question: str, year: int, share: float -> answer: str"))
    good = {"question": "x", "year": 1815, "share": 1}
    assert ask(app, {"inputs": good}).status_code == 200
    refused = ask(app, {"inputs": good, "seed": seed})
    assert [fault["where"] for fault in refused.json()["error"]["faults"]] == ["seed"]
    for wrong in ({"year": "1815"}, {"year": True}, {"share": "0.5"}, {"question": 5}):
        reply = ask(app, {"inputs": {**good, **wrong}})
        assert (reply.status_code, reply.json()["error"]["param"]) == (422, f"inputs.{next(iter(wrong))}")


# ---- paths and methods ---------------------------------------------------------------------------


def request(app, method, path, **options):
    async def send():
        async with client_of(app) as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/policy", "/docs", "/openapi.json"]
)
def test_head_is_answered_wherever_get_is(path):
    app = app_of()
    assert request(app, "HEAD", path).status_code == get(app, path).status_code == 200
    assert "head" not in get(app, "/openapi.json").json()["paths"].get(path, {})
    with served(app) as url:
        reply = httpx.head(url + path, headers=AUTH, timeout=60)
        assert (reply.status_code, reply.content) == (200, b"")


@pytest.mark.parametrize("path", [f"{PATH}/", "/health/", "/v1/models/", f"{CHAT}/", "/docs/"])
def test_no_answer_sends_a_caller_to_the_address_that_it_named_as_the_host(path):
    for method in ("GET", "POST"):
        reply = request(app_of(), method, path, headers={"Host": "evil.example"})
        assert reply.status_code in (404, 405)
        assert "evil.example" not in reply.text + str(reply.headers)


# ---- the log -------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["caller", "time"])
def test_who_left_is_logged_as_such_and_what_took_too_long_as_that(caplog, over):
    free, begun, stopped = threading.Event(), threading.Event(), []

    def speak(messages, seed):
        begun.set()
        assert free.wait(30)
        return "no fields, so that DSPy asks again"

    caplog.set_level(logging.INFO, "dspy_fst.serve")
    app = app_of(speak, settings={"timeout_s": 30 if over == "caller" else 1})
    queue = app.state.service.queue

    async def leave():
        async with client_of(app) as client:
            if over == "time":
                assert (await client.post(PATH, json=question("x"))).status_code == 504
            else:
                messages = [{"type": "http.request", "body": json.dumps(question("x")).encode(), "more_body": False}]

                async def receive():
                    if messages:
                        return messages.pop()
                    await asyncio.to_thread(begun.wait, 30)
                    return {"type": "http.disconnect"}

                async def send(message):
                    stopped.append(message)

                headers = [(b"authorization", AUTH["Authorization"].encode()), (b"content-type", b"application/json")]
                scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": headers}
                await app({**scope, "state": {}}, receive, send)
            free.set()
            while queue.at_work():
                await asyncio.sleep(0.01)

    asyncio.run(leave())
    said = [record.getMessage() for record in caplog.records if record.name.startswith("dspy_fst.serve")]
    program = [line for line in said if "the program" in line]
    why = "the caller left" if over == "caller" else "the request timed out"
    assert program == [f"the program was stopped: {why}"]
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)
    assert (f"the caller of {PATH} left before the reply" in said) == (over == "caller")
    assert stopped == []
    assert figures(app)["dspy_fst_overdue"] == 0
