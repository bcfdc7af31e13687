"""A server in its own process, asked over real connections: by hand, by the openai client, by too many, to the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx
import jsonschema
import openai
import psutil
import pytest

import dspy_fst
from dspy_fst import ConfigurationError
from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import EngineError
from dspy_fst.rollout.texts import read_texts
from dspy_fst.serve.app import create_app
from dspy_fst.serve.run import serve
from dspy_fst.serve.settings import ServeSettings
from dspy_fst.types import Candidate, Population
from programs.lab import BASE, build
from tests.serve.makers import PATH, compiled, events, question

ROOT = Path(__file__).parent.parent.parent
START_S = 240
END_S = 60


class Child:
    """A server process; its address and key are read from what it prints."""

    def __init__(self, process):
        self.process = process
        self.url = self.key = ""
        self.said = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            if line.startswith("serving "):
                self.url = line.split(" at ")[1].split("/v1/")[0]
            if line.startswith("key: "):
                self.key = line.removeprefix("key: ").strip()

    def wait_for(self, true, what, limit_s=START_S):
        until = time.monotonic() + limit_s
        while not true():
            assert self.process.poll() is None, f"it ended: {self.said}"
            assert time.monotonic() < until, f"waited {limit_s} s in vain until {what}: {self.said}"
            time.sleep(0.05)

    @property
    def auth(self):
        return {"Authorization": f"Bearer {self.key}"}

    def ready(self):
        return bool(self.url) and httpx.get(f"{self.url}/ready", timeout=10).status_code == 200

    def ask(self, body, path=PATH, **options):
        return httpx.post(self.url + path, json=body, headers=self.auth, timeout=120, **options)

    def in_flight(self):
        text = httpx.get(f"{self.url}/metrics", headers=self.auth, timeout=30).text
        return sum(figure(text, name) for name in ("dspy_fst_in_flight", "dspy_fst_queue"))

    def end(self):
        """Its exit code, and everything that it said."""
        code = self.process.wait(END_S)
        self._reader.join(END_S)
        return code


def figure(text, start):
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(start))


@contextmanager
def child(kind, *more, **settings):
    command = [sys.executable, "-m", "tests.serve.child", kind, json.dumps({"port": 0, **settings}), *map(str, more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    server = Child(process)
    try:
        yield server
    finally:
        process.kill()
        process.wait(END_S)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The laboratory's base model as a compiled program of two candidates, in a folder."""
    lab = build(train=4, val=0, test=0)
    lab.program.set_lm(dspy_fst.PolicyLM(BASE, engine="in_process", max_tokens=12))
    names = read_texts(lab.program).texts
    members = tuple(Candidate(dict.fromkeys(names, text)) for text in (lab.world.told, lab.world.seed_instruction))
    lab.program.population = Population(members, (0.4, 0.1))
    return dspy_fst.save(lab.program, tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture(scope="module")
def lab_server(saved):
    with child("saved", saved, "in_process", max_in_flight=4, max_queue=4, max_body_bytes=2_000) as server:
        server.wait_for(server.ready, "the engine serves weights")
        yield server


NUMBERS = {"inputs": {"numbers": "4 7 1 9"}, "seed": 11}


def test_a_saved_program_answers_over_http_as_its_schema_says(lab_server):
    reply = lab_server.ask(NUMBERS)
    assert reply.status_code == 200, reply.text
    assert lab_server.ask(NUMBERS).json() == reply.json()
    schema = httpx.get(f"{lab_server.url}/openapi.json").json()
    operation = schema["paths"][PATH]["post"]
    for value, part in ((NUMBERS, operation["requestBody"]), (reply.json(), operation["responses"]["200"])):
        jsonschema.validate(
            value, {**part["content"]["application/json"]["schema"], "components": schema["components"]}
        )
    assert reply.json()["meta"]["prompt_tokens"] > 10


def test_the_stream_tells_the_module_and_the_same_answer(lab_server):
    told = events(lab_server.ask(NUMBERS, f"{PATH}/stream").text)
    assert [name for name, _ in told] == ["start", "module", "result"]
    assert told[-1][1] == lab_server.ask(NUMBERS).json()


def test_the_openai_client_speaks_with_the_trained_model(lab_server):
    client = openai.OpenAI(base_url=f"{lab_server.url}/v1", api_key=lab_server.key, max_retries=0)
    messages = [{"role": "user", "content": "4 7 1 9"}]
    reply = client.chat.completions.create(model="policy", messages=messages, max_tokens=5, seed=1)
    with pytest.raises(openai.BadRequestError, match="vllm"):
        client.chat.completions.create(model="policy", messages=messages, stream=True)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another-key-0123456").models.list()
    client.close()
    assert 0 < reply.usage.completion_tokens <= 5


def test_malformed_oversized_and_unknown_callers_are_refused(lab_server):
    assert lab_server.ask({"inputs": {"numbers": 4}}).status_code == 422
    assert lab_server.ask({"inputs": {"numbers": "4" * 3_000}}).status_code == 413
    assert (
        httpx.post(lab_server.url + PATH, content=iter([b"4" * 1_500] * 3), headers=lab_server.auth).status_code == 413
    )
    assert httpx.post(lab_server.url + PATH, json=NUMBERS).status_code == 401
    assert httpx.get(f"{lab_server.url}/nothing", headers=lab_server.auth).status_code == 404


def test_too_many_at_once_are_refused_and_the_figures_add_up(lab_server):
    def counted():
        text = httpx.get(f"{lab_server.url}/metrics", headers=lab_server.auth).text
        found = {
            code: figure(text, f'dspy_fst_requests_total{{endpoint="{PATH}",status="{code}"') for code in (200, 429)
        }
        return Counter(found), figure(text, 'dspy_fst_tokens_total{kind="completion"')

    before, tokens_before = counted()
    replies = []
    barrier = threading.Barrier(40)

    def one(number):
        barrier.wait(30)
        replies.append(lab_server.ask({**NUMBERS, "seed": number}))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    codes = Counter(reply.status_code for reply in replies)
    assert set(codes) == {200, 429}
    assert codes.total() == 40
    assert all(reply.headers["Retry-After"] == "1" for reply in replies if reply.status_code == 429)
    after, tokens_after = counted()
    assert after - before == codes
    spent = sum(reply.json()["meta"]["completion_tokens"] for reply in replies if reply.status_code == 200)
    assert tokens_after - tokens_before == spent


def test_the_real_engine_s_server_finishes_its_work_when_it_is_told_to_end(saved):
    with child("saved", saved, "in_process", max_in_flight=4, max_queue=60) as server:
        server.wait_for(server.ready, "the engine serves weights")
        outcomes = crowd(server, lambda number: {**NUMBERS, "seed": number})
        assert server.end() == 0, server.said
    assert set(outcomes) <= {200, 503, "refused"}
    assert outcomes[200] >= 8


# ---- the end, with a program that takes its time ------------------------------------------------


def crowd(server, body, callers=8):
    """Callers who ask until they are refused; SIGTERM is sent while all are let in. Status -> count."""
    outcomes, lock = Counter(), threading.Lock()

    def one(number):
        for turn in range(1_000):
            try:
                reply = server.ask(body(number * 1_000 + turn))
            except httpx.ConnectError:
                outcome = "refused"
            except httpx.HTTPError as error:
                outcome = f"lost: {error!r}"
            else:
                outcome = reply.status_code
                if outcome == 200 and "question" in body(0)["inputs"]:
                    asked = body(number * 1_000 + turn)["inputs"]["question"]
                    assert reply.json()["outputs"]["answer"] == f"echo {asked}"
            with lock:
                outcomes[outcome] += 1
            if outcome != 200:
                return

    threads = [threading.Thread(target=one, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    server.wait_for(lambda: outcomes[200] >= callers, "every caller was answered once on average")
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(END_S)
        assert not thread.is_alive()
    return outcomes


def test_what_was_let_in_is_answered_before_the_end_and_the_engine_is_released():
    with child("slow", max_in_flight=4, max_queue=60) as server:
        server.wait_for(server.ready, "it is ready")
        outcomes = crowd(server, lambda number: question(f"number {number}"))
        assert server.end() == 0, server.said
        assert set(outcomes) <= {200, 503, "refused"}
        # Four at work and four in line when the signal came: all of these were answered, too.
        assert outcomes[200] >= 8 + 8 - 4
        assert "closed" in server.said[-1]
        assert server.said[-1] != "closed 0"


def test_a_request_that_does_not_end_is_answered_when_the_drain_is_over_and_keeps_nobody():
    with child("stuck", drain_s=1.0) as server:
        server.wait_for(server.ready, "it is ready")
        replies = []
        caller = threading.Thread(target=lambda: replies.append(server.ask(question("x"))))
        caller.start()
        server.wait_for(lambda: server.in_flight() == 1, "the request is at work")
        server.process.send_signal(signal.SIGTERM)
        caller.join(END_S)
        assert (replies[0].status_code, replies[0].json()["error"]["type"]) == (503, "draining")
        assert server.end() == 0, server.said
        assert any("1 requests were not answered within 1 s" in line for line in server.said)


def test_a_second_signal_ends_at_once():
    with child("stuck", drain_s=600.0) as server:
        server.wait_for(server.ready, "it is ready")
        replies = []
        caller = threading.Thread(target=lambda: replies.append(server.ask(question("x"))))
        caller.start()
        server.wait_for(lambda: server.in_flight() == 1, "the request is at work")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "it drains")
        server.process.send_signal(signal.SIGTERM)
        caller.join(END_S)
        assert replies[0].status_code == 503
        assert server.process.wait(END_S) == -signal.SIGTERM


def test_a_server_whose_engine_does_not_start_ends_and_says_why():
    program, engine = compiled()
    engine.version = None

    def fail(checkpoint):
        raise EngineError("no such weights")

    engine.load = fail
    program.lm.handle.checkpoint = Checkpoint("base", ROOT)
    settings = ServeSettings(port=0)
    with pytest.raises(EngineError, match="could not be started: no such weights"):
        serve(create_app(program, settings), settings)
    assert engine.closed >= 1


def test_an_address_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServeSettings(port=taken.getsockname()[1])
        with pytest.raises(ConfigurationError, match="port="):
            serve(create_app(compiled()[0], settings), settings)


# ---- a real vLLM --------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_behind_vllm_programs_and_chats_stream_token_by_token_and_nothing_is_left_running(saved):
    with child("saved", saved, "vllm") as server:
        server.wait_for(lambda: bool(server.url), "it listens")
        assert httpx.get(f"{server.url}/health").json() == {"alive": True}
        server.wait_for(server.ready, "vLLM serves weights", limit_s=500)
        behind = psutil.Process(server.process.pid).children(recursive=True)
        assert behind
        told = events(server.ask(NUMBERS, f"{PATH}/stream").text)
        assert told[0] == ("start", {"tokens": True})
        deltas = [data for name, data in told if name == "delta"]
        assert len(deltas) > 1
        assert "".join(delta["text"] for delta in deltas).strip() == told[-1][1]["outputs"]["answer"].strip()
        assert told[-1][1]["outputs"] == server.ask(NUMBERS).json()["outputs"]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)
        messages = [{"role": "user", "content": "4 7 1 9"}]
        whole = client.chat.completions.create(model="policy", messages=messages, max_tokens=6, seed=1)
        chunks = client.chat.completions.create(model="policy", messages=messages, max_tokens=6, seed=1, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        client.close()
        assert text == whole.choices[0].message.content
        assert httpx.post(f"{server.url}/collective_rpc", headers=server.auth).status_code == 404
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0, server.said
        _, alive = psutil.wait_procs(behind, timeout=30)
        assert alive == []
