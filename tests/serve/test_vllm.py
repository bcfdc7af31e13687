"""The command with a real vLLM behind it."""

import signal

import httpx
import openai
import psutil
import pytest

from tests.engine.test_server_process import ended
from tests.serve.command import NUMBERS, saved_lab, serving
from tests.serve.makers import PATH, events, wait_until


@pytest.mark.vllm
def test_behind_vllm_programs_and_chats_stream_token_by_token_and_nothing_is_left_running(tmp_path):
    out = saved_lab(tmp_path / "out")
    with serving(out, "--program", "programs.lab.project:program", "--engine", "vllm") as server:
        server.wait_for(lambda: bool(server.url), "it listens")
        assert httpx.get(f"{server.url}/health", timeout=60).json() == {"alive": True}
        server.wait_for(server.ready, "vLLM serves weights", limit_s=500)
        behind = psutil.Process(server.process.pid).children(recursive=True)
        assert behind
        told = next(filter(in_pieces, (events(server.ask(NUMBERS, f"{PATH}/stream").text) for _ in range(20))))
        assert told[0] == ("start", {"tokens": True})
        deltas = [data for name, data in told if name == "delta"]
        assert "".join(delta["text"] for delta in deltas).strip() == told[-1][1]["outputs"]["answer"].strip()
        assert told[-1][1]["outputs"] == server.ask(NUMBERS).json()["outputs"]
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0)
        messages = [{"role": "user", "content": "4 7 1 9"}]
        whole = client.chat.completions.create(model="policy", messages=messages, max_tokens=6, seed=1)
        chunks = client.chat.completions.create(model="policy", messages=messages, max_tokens=6, seed=1, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        client.close()
        assert text == whole.choices[0].message.content
        assert httpx.post(f"{server.url}/collective_rpc", headers=server.auth, timeout=60).status_code == 404
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0, server.said
        wait_until(lambda: all(map(ended, behind)), "nothing is left running")


def in_pieces(told):
    """Whether the answer came in several; a busy server may send all tokens of one so short in one piece."""
    return sum(name == "delta" for name, _ in told) > 1
