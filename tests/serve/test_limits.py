"""Key, size, line and time: what a server does when it is asked wrongly, too much, or too late."""

import asyncio
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import urlsplit

import httpx
import pytest

from dspy_fst.serve.admission import AdmissionQueue, QueueFullError
from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import CHAT, ServeSettings
from tests.serve.makers import (
    AUTH,
    KEY,
    PATH,
    Hold,
    app_of,
    ask,
    client_of,
    compiled,
    echo,
    events,
    figures,
    get,
    question,
    served,
    wait_until,
)

WRONG_KEYS = [
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": f"Basic {KEY}"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": f"Bearer \xfcber-{KEY}".encode("latin-1")},
]


# ---- the key ------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", WRONG_KEYS)
@pytest.mark.parametrize("path", [PATH, f"{PATH}/stream", CHAT, "/v1/nothing"])
def test_nobody_is_answered_without_the_key(path, headers):
    app = app_of()
    reply = ask(app, question("x"), path, headers=headers)
    assert reply.status_code == 401
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in reply.text


@pytest.mark.parametrize("path", ["/metrics", "/v1/models"])
def test_figures_and_models_need_the_key_too(path):
    assert get(app_of(), path, headers=WRONG_KEYS[0]).status_code == 401
    assert get(app_of(), path).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/docs", "/openapi.json"])
def test_what_the_server_is_can_be_asked_without_a_key(path):
    assert get(app_of(), path, headers=WRONG_KEYS[0]).status_code == 200


def test_a_stranger_s_body_is_not_read():
    read = []

    async def body():
        read.append(1)
        yield b"{}"

    assert ask(app_of(), None, content=body(), headers=WRONG_KEYS[1]).status_code == 401
    assert read == []


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example:8000", 403), ("[", 403)],
)
def test_without_a_key_a_browser_s_page_cannot_speak_with_the_server_under_its_own_name(host, status):
    app = create_app(compiled()[0], ServeSettings(no_key=True))
    assert ask(app, question("x"), headers={"Host": host}).status_code == status


# ---- the size -----------------------------------------------------------------------------------


async def in_pieces(size):
    for _ in range(size // 100):
        yield b"x" * 100


@pytest.mark.parametrize("content", [lambda: b"x" * 1_100, lambda: in_pieces(1_100)])
def test_a_body_that_is_too_large_is_refused_whether_its_length_is_told_or_not(content):
    app = app_of(settings={"max_body_bytes": 1_000})
    reply = ask(app, None, content=content())
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "too_large"
    assert ask(app, question("x" * 900)).status_code == 200


def test_a_body_that_is_told_to_be_too_large_is_not_read():
    read = []

    async def body():
        read.append(1)
        yield b"x" * 2_000

    app = app_of(settings={"max_body_bytes": 1_000})
    assert ask(app, None, content=body(), headers={"Content-Length": "2000"}).status_code == 413
    assert read == []


# ---- the line -----------------------------------------------------------------------------------


def test_when_the_line_is_full_the_next_is_told_when_to_come_back_and_the_others_are_served():
    hold = Hold()
    app = app_of(hold, settings={"max_in_flight": 2, "max_queue": 3, "retry_after_s": 7})
    queue = app.state.service.queue

    async def crowd():
        async with client_of(app) as client:
            sent = [asyncio.ensure_future(client.post(PATH, json=question(str(i)))) for i in range(5)]
            while queue.waiting() < 3:
                await asyncio.sleep(0.01)
            assert queue.at_work() == 2
            refused = await client.post(PATH, json=question("too many"))
            shown = (await client.get("/metrics")).text
            hold.free.set()
            return refused, shown, await asyncio.gather(*sent)

    refused, shown, served = asyncio.run(crowd())
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "7"
    assert refused.json()["error"]["code"] == "queue_full"
    assert "dspy_fst_in_flight 2.0" in shown
    assert "dspy_fst_queue 3.0" in shown
    assert [reply.json()["outputs"]["answer"] for reply in served] == [f"echo {i}" for i in range(5)]
    assert ask(app, question("later")).status_code == 200


def test_a_caller_who_left_the_line_is_not_served_and_leaves_no_trace_in_it():
    hold = Hold()
    app = app_of(hold, settings={"max_in_flight": 1, "max_queue": 1})
    queue = app.state.service.queue

    async def leave():
        async with client_of(app) as client:
            first = asyncio.ensure_future(client.post(PATH, json=question("first")))
            while not hold.begun:
                await asyncio.sleep(0.01)
            messages = [{"type": "http.request", "body": b"{}", "more_body": False}, {"type": "http.disconnect"}]
            replies = []

            async def receive():
                return messages.pop(0)

            async def send(message):
                replies.append(message)

            headers = [(b"authorization", AUTH["Authorization"].encode())]
            await app({"type": "http", "method": "POST", "path": PATH, "headers": headers}, receive, send)
            assert replies == []
            assert queue.waiting() == 0
            hold.free.set()
            await first

    asyncio.run(leave())
    assert hold.begun == 1
    assert figures(app)[f'dspy_fst_requests_total{{endpoint="{PATH}",status="499"}}'] == 1


@pytest.mark.parametrize("path", [PATH, f"{PATH}/stream"])
def test_a_caller_who_leaves_stops_the_program_at_its_next_call_and_keeps_the_place_until_then(path):
    hold, asked = Hold(), []

    def speak(messages, seed):
        asked.append(messages[-1]["content"])
        if "leaves" not in asked[-1]:
            return echo(messages, seed)
        hold(messages, seed)
        return "no fields, so that DSPy would ask again in JSON"

    app = app_of(speak, settings={"max_in_flight": 1})
    queue = app.state.service.queue
    with served(app) as url, httpx.Client(base_url=url, headers=AUTH, timeout=60) as client:
        with closing(http.client.HTTPConnection(urlsplit(url).netloc)) as leaver:
            headers = {**AUTH, "Content-Type": "application/json"}
            leaver.request("POST", path, json.dumps(question("who leaves")), headers)
            wait_until(lambda: hold.begun, "the leaver's request is at work")
        wait_until(queue.overdue, "the server sees that the caller left")
        assert queue.at_work() == 1
        assert client.get("/ready").status_code == 200, "the place comes back, so the others wait for it"
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(client.post, PATH, json=question("who stays"))
            wait_until(queue.waiting, "the next caller waits in line")
            hold.free.set()
            assert waits.result(60).json()["outputs"] == {"answer": "echo who stays"}
        assert queue.overdue() == 0
    assert len(asked) == 2, "one call each"
    status = 200 if path.endswith("stream") else 499
    assert figures(app)[f'dspy_fst_requests_total{{endpoint="{path}",status="{status}"}}'] >= 1


# ---- the time -----------------------------------------------------------------------------------


def test_a_request_over_its_time_is_told_so_and_keeps_its_place_until_its_thread_ends():
    hold = Hold()
    app = app_of(hold, settings={"timeout_s": 2, "max_in_flight": 1, "max_queue": 0})
    queue = app.state.service.queue
    late = ask(app, question("x"))
    assert late.status_code == 504
    assert late.json()["error"]["code"] == "timeout"
    assert (queue.at_work(), queue.overdue(), queue.waiting()) == (1, 1, 0)
    not_ready = get(app, "/ready")
    assert (not_ready.status_code, not_ready.json()["error"]["code"]) == (503, "not_ready")
    assert ask(app, question("x")).status_code == 503
    hold.free.set()


def test_a_place_whose_thread_ended_late_is_free_again():
    hold = Hold()
    app = app_of(hold, settings={"timeout_s": 2, "max_in_flight": 1, "max_queue": 1})
    queue = app.state.service.queue

    async def late_then_free():
        async with client_of(app) as client:
            assert (await client.post(PATH, json=question("x"))).status_code == 504
            assert queue.overdue() == 1
            hold.free.set()
            while queue.at_work():
                await asyncio.sleep(0.01)
            return await client.post(PATH, json=question("x"))

    assert asyncio.run(late_then_free()).status_code == 200
    assert queue.overdue() == 0


def test_a_request_that_was_given_up_does_not_ask_the_model_again():
    hold, asked = Hold(), []

    def speak(messages, seed):
        asked.append(1)
        hold(messages, seed)
        return "no fields, so that DSPy would ask again in JSON"

    app = app_of(speak, settings={"timeout_s": 2})

    async def give_up():
        async with client_of(app) as client:
            assert (await client.post(PATH, json=question("x"))).status_code == 504
            hold.free.set()
            while app.state.service.queue.at_work():
                await asyncio.sleep(0.01)

    asyncio.run(give_up())
    assert asked == [1]


def test_the_wait_in_line_counts_as_time():
    hold = Hold()
    app = app_of(hold, settings={"timeout_s": 2, "max_in_flight": 1})

    async def two():
        async with client_of(app) as client:
            return await asyncio.gather(*(client.post(PATH, json=question(str(i))) for i in range(2)))

    assert [reply.status_code for reply in asyncio.run(two())] == [504, 504]
    assert hold.begun == 1
    hold.free.set()


def test_a_body_that_does_not_come_is_not_waited_for():
    async def slow():
        yield b"{"
        await asyncio.sleep(20)

    began = time.monotonic()
    assert ask(app_of(settings={"timeout_s": 2}), None, content=slow()).status_code == 504
    assert time.monotonic() - began < 15


def test_a_stream_over_its_time_ends_with_an_error():
    hold = Hold()
    reply = ask(app_of(hold, settings={"timeout_s": 2}), question("x"), f"{PATH}/stream")
    hold.free.set()
    names = [name for name, _ in events(reply.text)]
    assert names == ["start", "error"]
    assert events(reply.text)[-1][1]["error"]["code"] == "timeout"


# ---- readiness and the end ----------------------------------------------------------------------


def test_until_weights_are_served_the_server_is_alive_and_not_ready():
    program, engine = compiled()
    engine.version = None
    app = create_app(program, ServeSettings(api_key=KEY))
    assert get(app, "/health").status_code == 200
    assert get(app, "/ready").status_code == 503
    refused = ask(app, question("x"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    assert refused.headers["Retry-After"] == "1"
    engine.version = "step-000009"
    assert get(app, "/ready").json() == {"weights": "step-000009"}
    assert ask(app, question("x")).json()["meta"]["weights"] == "step-000009"


def test_while_it_ends_the_server_refuses_and_finishes_what_is_in_line():
    hold = Hold()
    app = app_of(hold, settings={"max_in_flight": 1, "max_queue": 2})
    queue = app.state.service.queue

    async def end():
        async with client_of(app) as client:
            sent = [asyncio.ensure_future(client.post(PATH, json=question(str(i)))) for i in range(3)]
            while queue.waiting() < 2:
                await asyncio.sleep(0.01)
            queue.draining = True
            refused = await client.post(PATH, json=question("late"))
            ready = await client.get("/ready")
            assert await queue.emptied(0.2) == 3
            hold.free.set()
            assert await queue.emptied(30) == 0
            return refused, ready, await asyncio.gather(*sent)

    refused, ready, served = asyncio.run(end())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["Connection"] == "close"
    assert ready.status_code == 503
    assert [reply.status_code for reply in served] == [200, 200, 200]


def test_what_is_not_finished_when_the_drain_is_over_gets_an_answer_all_the_same():
    hold = Hold()
    app = app_of(hold, settings={"max_in_flight": 1, "max_queue": 2})
    queue = app.state.service.queue

    async def end():
        async with client_of(app) as client:
            sent = [asyncio.ensure_future(client.post(PATH, json=question(str(i)))) for i in range(2)]
            while queue.waiting() < 1:
                await asyncio.sleep(0.01)
            queue.draining = True
            queue.expire()
            return await asyncio.gather(*sent)

    replies = asyncio.run(end())
    hold.free.set()
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in replies] == [(503, "draining")] * 2


def test_the_lifespan_starts_the_engine_and_releases_it():
    program, engine = compiled()
    engine.version = None
    engine.load = lambda checkpoint: setattr(engine, "version", "loaded")
    app = create_app(program, ServeSettings(api_key=KEY))
    program.lm.handle.checkpoint = type(program.lm.handle.checkpoint)("base", __import__("pathlib").Path.cwd())

    async def live():
        async with app.router.lifespan_context(app):
            while engine.version is None:
                await asyncio.sleep(0.01)
            assert engine.closed == 0

    asyncio.run(live())
    assert engine.closed >= 1


def test_an_engine_that_does_not_start_is_told_and_leaves_the_server_not_ready():
    program, engine = compiled()
    engine.version = None
    app = create_app(program, ServeSettings(api_key=KEY))

    async def live():
        async with app.router.lifespan_context(app), client_of(app) as client:
            while app.state.service.failure is None:
                await asyncio.sleep(0.01)
            return await client.get("/ready")

    reply = asyncio.run(live())
    assert reply.status_code == 503
    assert "log" in reply.json()["error"]["message"]


# ---- the figures --------------------------------------------------------------------------------


def test_the_figures_add_up():
    app = app_of(settings={"max_body_bytes": 200})
    codes = [ask(app, question(str(i))).status_code for i in range(5)]
    codes += [ask(app, question("x" * 300)).status_code, ask(app, {}).status_code]
    codes += [ask(app, question("x"), headers=WRONG_KEYS[0]).status_code]
    assert codes == [200] * 5 + [413, 422, 401]
    ask(app, question("x"), f"{PATH}/stream")
    for name in ("a", "b"):
        get(app, f"/{name}")
    found = figures(app)
    requests = {key: value for key, value in found.items() if key.startswith("dspy_fst_requests_total")}
    assert requests == {
        f'dspy_fst_requests_total{{endpoint="{PATH}",status="200"}}': 5,
        f'dspy_fst_requests_total{{endpoint="{PATH}",status="413"}}': 1,
        f'dspy_fst_requests_total{{endpoint="{PATH}",status="422"}}': 1,
        f'dspy_fst_requests_total{{endpoint="{PATH}",status="401"}}': 1,
        f'dspy_fst_requests_total{{endpoint="{PATH}/stream",status="200"}}': 1,
        'dspy_fst_requests_total{endpoint="other",status="404"}': 2,
    }
    assert found[f'dspy_fst_request_seconds_count{{endpoint="{PATH}"}}'] == 8
    assert found['dspy_fst_errors_total{type="too_large"}'] == 1
    assert found["dspy_fst_in_flight"] == found["dspy_fst_queue"] == found["dspy_fst_overdue"] == 0
    assert found['dspy_fst_tokens_total{kind="completion"}'] == sum(len(echo_of(str(i))) for i in [*range(5), "x"])


def echo_of(text):
    return echo([{"content": f"[[ ## question ## ]]\n{text}"}], 0)


def test_the_gate_lets_no_more_in_than_its_places_and_its_line():
    async def crowd():
        queue = AdmissionQueue(slots=2, max_waiting=1)
        entered = [queue.admitted(5) for _ in range(3)]
        for block in entered:
            await block.__aenter__()
        with pytest.raises(QueueFullError):
            async with queue.admitted(5):
                pass
        await entered[0].__aexit__(None, None, None)
        async with queue.admitted(5) as ticket:
            await ticket.turn()
            assert (queue.at_work(), queue.waiting()) == (1, 2)

    asyncio.run(crowd())


def test_an_unforeseen_failure_is_told_without_its_inside():
    app = app_of()

    async def broken(*arguments, **more):
        raise RuntimeError("secret-token-123")

    app.state.service.answer = broken
    reply = ask(app, question("x"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
    assert "secret-token-123" not in reply.text
    assert isinstance(reply, httpx.Response)
