"""A server that its owner starts anew keeps its address, and has other weights. What was meant for the one before is
refused by it. Here our middleware stands before canned replies, in a process of its own."""

import json
import multiprocessing
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from dspy_fst.engine.machine import free_port
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.launch import _SERVED_FOLDER
from dspy_fst.engine.vllm.rows import AskedRow
from dspy_fst.engine.vllm.served.dspy_fst_rows import _process
from dspy_fst.errors import ServerReplacedError
from tests.engine.test_vllm_client import REQUEST, chat_reply

SERVER = """
import json, sys, uvicorn
from types import SimpleNamespace
from dspy_fst_rows import Rows

async def canned(scope, receive, send):
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    reply = json.dumps(json.loads(sys.argv[2]).get(scope["path"], {})).encode()
    await send({"type": "http.response.body", "body": reply})

config = SimpleNamespace(dtype="torch.bfloat16", hf_text_config=SimpleNamespace(hidden_size=64, vocab_size=9))
app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(model_config=config)))

async def in_vllm(scope, receive, send):
    await Rows(canned)(scope | {"app": app}, receive, send)

uvicorn.run(in_vllm, port=int(sys.argv[1]), lifespan="off", log_level="error")
"""
SCORED = {"choices": [{"index": 0, "prompt_logprobs": [None, {"2": {"logprob": -1.0}}]}]}
REPLIES = {
    "/v1/models": {"data": [{"id": "policy"}]},
    "/v1/chat/completions": chat_reply(),
    "/v1/completions": SCORED,
}
CALLS: dict[str, Callable[[VLLMClient], object]] = {
    "a chat": lambda client: client.sample(REQUEST, 1, "v0"),
    "a reply in pieces": lambda client: next(client.stream(REQUEST, 1, "v0")),
    "a row": lambda client: client.rows and client.rows.reply_to(AskedRow((1, 2), "policy", 1, 1.0, 4)),
    "scores": lambda client: client.score([[1, 2]]),
    "new weights": lambda client: client.swap_weights(lambda: client.run("reload_weights")),
}


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def serving(port: int) -> Iterator[None]:
    command = [sys.executable, "-c", SERVER, str(port), json.dumps(REPLIES)]
    process = subprocess.Popen(command, cwd=_SERVED_FOLDER)
    try:
        until = time.monotonic() + 60
        while not listens(port):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client() -> Iterator[VLLMClient]:
    """Of a server that was started anew since its process was asked for."""
    port = free_port("127.0.0.1")
    client = VLLMClient(
        Address(f"http://127.0.0.1:{port}", None, through_proxy=False), request_timeout_s=60, load_timeout_s=60
    )
    with serving(port):
        client.find_rows()
        assert client.score([[1, 2]]) == [[-1.0]]
        assert client.sample(REQUEST, 1, "v0").completion_ids == (7, 8)
    with serving(port):
        yield client
    client.close()


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_was_started_anew_answers_nothing_that_was_meant_for_the_one_before(client, call):
    with pytest.raises(ServerReplacedError, match="the server was started anew since it got its weights"):
        CALLS[call](client)


def test_who_comes_later_asks_the_process_that_is_there_then(client):
    later = VLLMClient(client.address, request_timeout_s=60, load_timeout_s=60)
    later.find_rows()
    assert later.score([[1, 2]]) == [[-1.0]]
    served = later.process()
    assert served is not None
    assert served.dtype == "bfloat16"
    assert served.sizes == {"hidden_size": 64, "num_hidden_layers": None, "vocab_size": 9}
    later.close()


def test_all_api_processes_of_one_server_have_one_name():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        named = {pool.apply(_process) for _ in range(4)}
    assert named == {_process()}
