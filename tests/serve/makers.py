"""Programs that are served in these tests: compiled ones, over an engine that says what it is told."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import dspy
import httpx
import uvicorn

from dspy_fst.rollout.components import read_texts
from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import ServeSettings
from dspy_fst.types import Candidate, Population
from tests.fakes import ScriptedEngine, fields, scripted_policy

KEY = "a-key-of-the-tests-0123"
AUTH = {"Authorization": f"Bearer {KEY}"}
PATH = "/v1/program"


def asked(messages: list[dict[str, str]], name: str) -> str:
    """The value of an input field in the last message."""
    found = re.search(rf"\[\[ ## {name} ## \]\]\n(.*?)(?:\n\n|$)", messages[-1]["content"], re.DOTALL)
    assert found is not None
    return found[1]


def echo(messages: list[dict[str, str]], seed: int) -> str:
    return fields(answer=f"echo {asked(messages, 'question')}")


def compiled(
    speak: Callable[..., str] = echo,
    program: dspy.Module | None = None,
    texts: tuple[str, ...] = ("Say it.",),
) -> tuple[dspy.Module, ScriptedEngine]:
    """A program as FSTOptimizer would give it back, with one member of the population for each text."""
    program = program or dspy.Predict("question: str -> answer: str")
    policy, engine = scripted_policy(speak, version="step-000003")
    program.set_lm(policy)
    seed = read_texts(program)
    members = tuple(Candidate(dict.fromkeys(seed.texts, text)) for text in texts)
    program.population = Population(members, tuple(1.0 - rank / 10 for rank in range(len(members))))
    return program, engine


def app_of(*arguments: Any, settings: dict[str, Any] | None = None, **more: Any) -> Any:
    program, _ = compiled(*arguments, **more)
    return create_app(program, ServeSettings(**{"api_key": KEY, **(settings or {})}))


def client_of(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=AUTH, timeout=60)


def ask(app: Any, body: Any, path: str = PATH, **options: Any) -> httpx.Response:
    """One request to an app, outside of any server."""

    async def send() -> httpx.Response:
        async with client_of(app) as client:
            return await client.post(path, json=body, **options)

    return asyncio.run(send())


def get(app: Any, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with client_of(app) as client:
            return await client.get(path, **options)

    return asyncio.run(send())


def question(text: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": {"question": text}, **more}


def figures(app: Any) -> dict[str, float]:
    """Everything at /metrics: name with labels -> value."""
    lines = get(app, "/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def events(text: str) -> list[tuple[str, Any]]:
    """(name, data) of every server-sent event."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if lines:
            data = lines["data"]
            found.append((lines.get("event", "message"), data if data == "[DONE]" else json.loads(data)))
    return found


class Hold:
    """Replies that wait until they are let go."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.begun = 0

    def __call__(self, messages: list[dict[str, str]], seed: int) -> str:
        self.begun += 1
        assert self.free.wait(30), "nobody let the replies go for 30 s"
        return echo(messages, seed)


def wait_until(true: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    until = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < until, f"waited {limit_s:g} s in vain until {what}"
        time.sleep(0.01)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The app on a real socket of this machine; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, "the server listens")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
