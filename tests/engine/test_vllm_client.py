"""What is sent to vLLM and what is accepted from it, against a server of canned replies."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import Config, FunctionTool, InvalidRequestError, Message, Request, ToolChoice, UnsupportedFeatureError

from dspy_fst.engine.base import Checkpoint, Holding
from dspy_fst.engine.replies import ReplyReader
from dspy_fst.engine.vllm import server as vllm_server
from dspy_fst.engine.vllm.client import NoAnswerError, pinned
from dspy_fst.engine.vllm.process import ServerProcess
from dspy_fst.engine.vllm.rows import PATH
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.engine.vllm.stalls import watch
from dspy_fst.engine.vllm.wire import PROCESS
from dspy_fst.errors import EngineError
from tests.engine.server_state import answers
from tests.engine.taught import TEMPLATE, make_tokenizer

REQUEST = Request(model="any/name", messages=(Message.user("hi"),), config=Config(max_tokens=4))


def chat_reply(**changes: Any) -> dict[str, Any]:
    """A reply of vLLM 0.32 to ``return_token_ids``, cut down to what is read."""
    scored = [
        {"token": "a", "logprob": -0.5, "bytes": None, "top_logprobs": []},
        {"token": "b", "logprob": -1.5, "bytes": None, "top_logprobs": []},
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "ab"},
        "finish_reason": "length",
        "token_ids": [7, 8],
        "logprobs": {"content": scored},
    }
    reply = {"id": "chatcmpl-1", "model": "policy", "prompt_token_ids": [1, 2, 3], "usage": {}}
    return {**reply, "choices": [{**choice, **changes}]}


class Canned(ThreadingHTTPServer):
    """Answers as vLLM does, unless told otherwise, and notes what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, Any]] = []
        self.replies: dict[str, tuple[int, Any]] = {
            "/v1/models": (200, {"data": [{"id": "policy"}]}),
            "/is_paused": (200, {"is_paused": False}),
            PATH: (200, {"dtype": "float32"}),
            "/v1/completions": (200, None),
            "/health": (200, {}),
            "/pause": (200, {}),
            "/collective_rpc": (200, {"results": [None]}),
            "/reset_prefix_cache": (200, {"success": True}),
            "/resume": (200, {}),
            "/v1/chat/completions": (200, chat_reply()),
        }
        self.process: str | None = f"process-{self.server_port}"
        """None: it has no middleware of ours."""
        self.stall = threading.Event()
        self.stalled_path = ""
        self.last_path = ""
        """With the answer to this the server closes its port and all connections."""
        self.closed = False
        self.logprobs_heed_temperature = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


class _Handler(BaseHTTPRequestHandler):
    server: Canned
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: a body of its own waits 40 ms for the headers' acknowledgement

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.asked.append((self.path, body))
        if path == self.server.stalled_path:
            self.server.stall.wait(60)
        if self.server.closed:
            self.close_connection = True
            return
        if path == self.server.last_path:
            self.server.closed = self.close_connection = True
            self.server.shutdown()
            self.server.server_close()
        status, reply = self.server.replies.get(path, (404, {"error": {"message": "no such path"}}))
        if path == "/v1/completions" and body and reply is None:
            sharpness = 1 / body["temperature"] if self.server.logprobs_heed_temperature else 1.0
            top = {"a": -0.5 * sharpness, "b": -1.0 * sharpness}
            reply = {"choices": [{"index": 0, "logprobs": {"top_logprobs": [top]}}]}
        payload = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        self.send_response(status)
        if path == PATH and self.server.process is not None and status == 200:
            self.send_header(PROCESS, self.server.process)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return Checkpoint("step-000001", tmp_path)


@pytest.fixture
def engine(canned: Canned) -> Iterator[VLLMServer]:
    engine = VLLMServer(VLLMSettings(attach_url=canned.url, request_timeout_s=60, load_timeout_s=60))
    yield engine
    engine.close()


@pytest.fixture
def impatient(canned: Canned) -> Iterator[VLLMServer]:
    engine = VLLMServer(VLLMSettings(attach_url=canned.url, request_timeout_s=2, load_timeout_s=2))
    yield engine
    engine.close()


# What is sent


def test_a_request_asks_for_exact_tokens_and_leaves_no_sampling_to_the_server(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    engine.complete(REQUEST, seed=11)
    _, body = canned.asked[-1]
    assert body["model"] == "policy"
    sent = {name: body[name] for name in ("seed", "logprobs", "return_token_ids", "temperature", "top_p", "top_k")}
    assert sent == {
        "seed": 11,
        "logprobs": True,
        "return_token_ids": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }
    assert body["min_p"] == 0.0
    assert body["repetition_penalty"] == 1.0


def test_extensions_of_the_caller_are_kept() -> None:
    request = Request("m", (Message.user("hi"),), config=Config(extensions={"chat_template_kwargs": {"x": 1}}))
    extensions = pinned(request, model="vllm:policy", seed=0).config.extensions
    assert extensions is not None
    assert extensions["chat_template_kwargs"] == {"x": 1}


@pytest.mark.parametrize(
    "config",
    [
        *(Config(top_p=0.9), Config(top_k=20), Config(extensions={"min_p": 0.1}), Config(presence_penalty=1.0)),
        *(
            Config(response_format={"type": "json_object"}),
            Config(extensions={"logit_bias": {"1": 2.0}}),
            Config(extensions={"guided_regex": "a"}),
        ),
    ],
)
def test_sampling_that_training_would_not_score_is_refused(config: Config) -> None:
    with pytest.raises(UnsupportedFeatureError, match="not what training scores"):
        pinned(Request("m", (Message.user("hi"),), config=config), model="vllm:policy", seed=0)


def test_tools_are_shown_to_the_model_and_the_server_is_left_no_way_to_force_one(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    engine._reader = ReplyReader.of(make_tokenizer(["x"], TEMPLATE))
    forced = Config(tool_choice=ToolChoice("required", allowed=("add",)))
    engine.complete(Request("m", (Message.user("hi"),), tools=(FunctionTool("add"),), config=forced), seed=0)
    _, body = canned.asked[-1]
    assert [tool["function"]["name"] for tool in body["tools"]] == ["add"]
    assert body["tool_choice"] == "none"


# What is accepted


def test_tokens_and_version_come_with_the_reply_and_provider_data_does_not(
    engine: VLLMServer, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    completion = engine.complete(REQUEST, seed=0)
    assert completion.prompt_ids == (1, 2, 3)
    assert completion.completion_ids == (7, 8)
    assert completion.logprobs == (-0.5, -1.5)
    assert completion.finish_reason == "length"
    assert completion.weights == "step-000001"
    assert completion.response.text == "ab"
    assert completion.response.provider_data is None
    assert completion.response.logprobs is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"token_ids": None}, "no token ids"),
        ({"token_ids": [7, 8, 9]}, "3 sampled ids but 2 log-probabilities"),
        ({"logprobs": None}, "2 sampled ids but 0 log-probabilities"),
        ({"finish_reason": "abort"}, "broke off a reply"),
    ],
)
def test_a_reply_without_exact_tokens_is_refused(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint, changes: dict[str, Any], complaint: str
) -> None:
    engine.load(checkpoint)
    canned.replies["/v1/chat/completions"] = (200, chat_reply(**changes))
    with pytest.raises(EngineError, match=complaint):
        engine.complete(REQUEST, seed=0)


def test_a_refused_request_is_the_callers_and_a_broken_server_the_engines(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    canned.replies["/v1/chat/completions"] = (400, {"error": {"message": "maximum context length is 4"}})
    with pytest.raises(InvalidRequestError):
        engine.complete(REQUEST, seed=0)
    canned.replies["/v1/chat/completions"] = (500, {"error": {"message": "EngineDeadError"}})
    with pytest.raises(EngineError, match="EngineDeadError"):
        engine.complete(REQUEST, seed=0)


def test_what_may_pass_when_asked_again_has_its_own_class(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    for reply in ((503, {"error": {"message": "dying"}}), (200, chat_reply(finish_reason="abort"))):
        canned.replies["/v1/chat/completions"] = reply
        with pytest.raises(NoAnswerError):
            engine.complete(REQUEST, seed=0)
    canned.replies["/v1/chat/completions"] = (200, chat_reply(token_ids=None))
    with pytest.raises(EngineError) as caught:
        engine.complete(REQUEST, seed=0)
    assert not isinstance(caught.value, NoAnswerError)


def ids_reply(**changes: Any) -> dict[str, Any]:
    """A reply of vLLM 0.32 to a prompt of ids, cut down to what is read."""
    choice = {
        "index": 0,
        "text": "ab",
        "finish_reason": "stop",
        "token_ids": [7, 8],
        "prompt_token_ids": [5, 6],
        "logprobs": {"token_logprobs": [-0.5, -1.5]},
    }
    return {"id": "cmpl-1", "model": "policy", "choices": [{**choice, **changes}]}


def test_a_prompt_of_ids_is_sampled_from_as_it_is_with_the_same_pins(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    engine._require_client().rows = None
    canned.replies["/v1/completions"] = (200, ids_reply())
    canned.asked.clear()
    completion = engine.complete(REQUEST, 3, (5, 6))
    ((path, body),) = canned.asked
    assert (path, body["prompt"], body["max_tokens"], body["seed"]) == ("/v1/completions", [5, 6], 4, 3)
    pins = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0}
    assert {name: body[name] for name in pins} == pins
    assert body["return_token_ids"] is True
    assert (completion.prompt_ids, completion.completion_ids) == ((5, 6), (7, 8))
    assert (completion.logprobs, completion.finish_reason) == ((-0.5, -1.5), "stop")
    assert (completion.response.text, completion.weights) == ("ab", "step-000001")


def test_a_reply_to_ids_tells_its_logprobs_to_who_asks(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    engine._require_client().rows = None
    scored = {"token_logprobs": [-0.5, -1.5], "tokens": ["a", "\u00e9"], "top_logprobs": [{"b": -2.0, "a": -0.5}] * 2}
    canned.replies["/v1/completions"] = (200, ids_reply(logprobs=scored))
    assert engine.complete(REQUEST, 3, (5, 6)).response.logprobs is None
    for asked, top in ((0, []), (2, [("a", -0.5), ("b", -2.0)])):
        request = replace(REQUEST, config=replace(REQUEST.config, logprobs=asked))
        entries = engine.complete(request, 3, (5, 6)).response.logprobs
        assert entries is not None
        assert canned.asked[-1][1]["logprobs"] == asked
        assert [(e.token, e.logprob, e.token_id) for e in entries] == [("a", -0.5, 7), ("\u00e9", -1.5, 8)]
        assert [[(t.token, t.logprob) for t in e.top] for e in entries] == [top] * 2
        assert entries[1].bytes == (0xC3, 0xA9)


def test_ids_that_the_server_refuses_are_put_to_it_as_messages(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    engine._require_client().rows = None
    canned.replies["/v1/completions"] = (400, {"error": {"message": "no"}})
    assert engine.complete(REQUEST, 3, (5, 6)).prompt_ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ((200, ids_reply(finish_reason="abort")), NoAnswerError),
        ((500, {"error": {"message": "EngineDeadError"}}), NoAnswerError),
        ((200, ids_reply(prompt_token_ids=[5])), EngineError),
        ((200, ids_reply(logprobs=None)), EngineError),
    ],
)
def test_a_reply_to_ids_that_is_not_exact_is_refused(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint, reply: Any, kind: type[EngineError]
) -> None:
    engine.load(checkpoint)
    engine._require_client().rows = None
    canned.replies["/v1/completions"] = reply
    with pytest.raises(EngineError) as caught:
        engine.complete(REQUEST, 3, (5, 6))
    assert isinstance(caught.value, NoAnswerError) == (kind is NoAnswerError)


def test_progress_shows_tokens_and_replies_and_a_silent_server_shows_none(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    canned.replies["/metrics"] = (200, 'vllm:generation_tokens_total{engine="0"} 4.0\nvllm:num_requests_waiting 3.0\n')
    first = engine.progress(5)
    assert first[1] == 'vllm:generation_tokens_total{engine="0"} 4.0'
    canned.replies["/metrics"] = (200, 'vllm:generation_tokens_total{engine="0"} 4.0\nvllm:num_requests_waiting 2.0\n')
    assert engine.progress(5) == first
    engine.complete(REQUEST, seed=0)
    second = engine.progress(5)
    assert second != first
    canned.replies["/metrics"] = (200, 'vllm:generation_tokens_total{engine="0"} 5.0\n')
    third = engine.progress(5)
    assert third not in (first, second)
    canned.stalled_path = "/metrics"
    assert engine.progress(0.2) == third


def test_a_connection_that_another_thread_closed_is_an_engine_error(engine: VLLMServer, checkpoint: Checkpoint) -> None:
    engine.load(checkpoint)
    client = engine._client
    assert client is not None
    client.close()
    with pytest.raises(NoAnswerError, match="closed"):
        client.score([[1, 2]])


def test_a_reply_that_never_comes_ends_with_the_time_out(
    impatient: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    impatient.load(checkpoint)
    canned.stalled_path = "/v1/chat/completions"
    with pytest.raises(EngineError, match="gave no reply"):
        impatient.complete(REQUEST, seed=0)


SLOW_END = "import time; time.sleep({}); raise SystemExit(3)"


@pytest.mark.parametrize("port", ["open", "closed"])
def test_a_server_whose_engine_is_gone_is_waited_for_so_that_its_end_can_be_told(
    port: str, engine: VLLMServer, canned: Canned, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "_DEATH_NOTICE_S", 0.1)
    engine.load(checkpoint)
    canned.replies["/health"] = (503, "")
    canned.last_path = "/v1/chat/completions" if port == "closed" else ""
    engine._process = ServerProcess([sys.executable, "-c", SLOW_END.format(2)], os.environ, log_path=None, grace_s=1)
    canned.replies["/v1/chat/completions"] = (500, {"error": {"message": "EngineDeadError"}})
    with pytest.raises(EngineError, match="vLLM died, exit status 3"):
        engine.complete(REQUEST, seed=0)


def test_a_server_whose_engine_is_gone_and_that_does_not_end_is_killed(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "_DEATH_NOTICE_S", 2)
    monkeypatch.setattr(vllm_server, "_WIND_UP_S", 0.1)
    engine.load(checkpoint)
    canned.replies["/health"] = (503, "")
    engine._process = ServerProcess([sys.executable, "-c", SLOW_END.format(600)], os.environ, log_path=None, grace_s=1)
    canned.replies["/v1/chat/completions"] = (500, {"error": {"message": "EngineDeadError"}})
    told = r"vLLM was killed: its engine died or it closed its port, and it did not end within 0\.1 s"
    with pytest.raises(EngineError, match=told):
        engine.complete(REQUEST, seed=0)


def test_a_server_that_is_well_and_refuses_a_request_is_not_waited_for(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server, "_DEATH_NOTICE_S", 0.1)
    engine.load(checkpoint)
    engine._process = ServerProcess([sys.executable, "-c", SLOW_END.format(50)], os.environ, log_path=None, grace_s=1)
    canned.replies["/v1/chat/completions"] = (500, {"error": {"message": "an outage"}})
    began = time.monotonic()
    with pytest.raises(NoAnswerError, match="an outage"):
        engine.complete(REQUEST, seed=0)
    assert time.monotonic() - began < 25


# Swapping weights


def test_a_swap_pauses_reloads_empties_the_cache_and_resumes(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    engine.load(checkpoint)
    assert canned.paths()[-4:] == ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"]
    rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(checkpoint.path)}}
    assert canned.asked[-3][1] == rpc


@pytest.mark.parametrize(
    ("path", "reply", "complaint"),
    [
        ("/collective_rpc", (500, {"error": "shape mismatch"}), "collective_rpc answered 500.*shape mismatch"),
        ("/reset_prefix_cache", (200, {"success": False}), "prefix cache"),
    ],
)
def test_a_failed_swap_resumes_the_server_but_serves_nothing(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint, path: str, reply: Any, complaint: str
) -> None:
    engine.load(checkpoint)
    canned.replies[path] = reply
    with pytest.raises(EngineError, match=complaint):
        engine.load(checkpoint)
    assert canned.paths()[-1] == "/resume"
    assert engine.weights is None
    with pytest.raises(EngineError, match="no weights are served"):
        engine.complete(REQUEST, seed=0)


def test_a_500_of_a_server_that_is_well_is_a_refusal_and_tells_its_reason(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    canned.replies["/collective_rpc"] = (500, {"error": {"message": "rank 64 is above max_lora_rank 16"}})
    with pytest.raises(
        EngineError, match=r"the server is well, so it refused: rank 64 is above max_lora_rank 16$"
    ) as told:
        engine.load(checkpoint)
    assert not isinstance(told.value, NoAnswerError)


def test_a_500_of_a_server_that_is_not_well_may_mean_that_it_is_dead(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    canned.replies["/collective_rpc"] = (500, {"error": {"message": "EngineDeadError"}})
    canned.replies["/health"] = (500, "")
    with pytest.raises(NoAnswerError, match="EngineDeadError"):
        engine.load(checkpoint)


# Checking weights

HELD: dict[str, Any] = {"digests": {"w": "1"}, "wrong": {}, "dtype": "float32"}
MISSING = "Call to collective_rpc method failed: Method 'dspy_fst_compare' is not implemented."
BROKEN = "Call to collective_rpc method failed: dspy_fst_compare() ran out of memory"


def test_a_check_that_fails_on_a_server_that_is_well_is_told_and_not_taken_for_a_dead_server(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    engine.load(checkpoint)
    canned.replies["/collective_rpc"] = (500, {"error": {"message": BROKEN}})
    with pytest.raises(EngineError, match=r"the server is well, so it refused: .* ran out of memory") as told:
        engine.held(checkpoint)
    assert not isinstance(told.value, NoAnswerError)
    canned.replies["/health"] = (503, "")
    with pytest.raises(NoAnswerError, match="ran out of memory"):
        engine.held(checkpoint)


def test_only_a_server_that_says_so_lacks_the_extension(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    """A check that fails names the method too; taken for a missing one it would never be asked for again."""
    engine.load(checkpoint)
    canned.replies["/collective_rpc"] = (500, {"error": {"message": BROKEN}})
    with pytest.raises(EngineError):
        engine.held(checkpoint)
    canned.replies["/collective_rpc"] = (200, {"results": [HELD]})
    assert engine.held(checkpoint) == Holding(HELD["digests"], {}, "float32")
    canned.replies["/collective_rpc"] = (500, {"error": {"message": MISSING}})
    assert engine.held(checkpoint) is None
    asked = len(canned.asked)
    assert engine.held(checkpoint) is None
    assert len(canned.asked) == asked


def test_a_check_that_takes_long_is_no_request_that_hangs(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It processes no token for as long as it takes, which load_timeout_s bounds and not stall_timeout_s."""
    engine.load(checkpoint)
    killed: list[str] = []
    monkeypatch.setattr(engine, "kill", killed.append)
    canned.replies["/metrics"] = (200, 'vllm:generation_tokens_total{engine="0"} 4.0\n')
    canned.replies["/collective_rpc"] = (200, {"results": [HELD]})
    watch(engine, 0.5)
    canned.stalled_path = "/collective_rpc"
    with ThreadPoolExecutor(2) as pool:
        checking = pool.submit(engine.held, checkpoint)
        time.sleep(1.5)
        assert (engine.in_flight, killed) == (0, [])
        loading = pool.submit(engine.load, checkpoint)
        time.sleep(0.2)
        assert not loading.done()  # the weights stay while they are compared
        canned.stall.set()
        assert checking.result(30) == Holding(HELD["digests"], {}, "float32")
        loading.result(30)
    canned.stall.clear()
    canned.stalled_path = "/v1/chat/completions"
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(engine.complete, REQUEST, 0)
        for _ in range(200):
            if killed:
                break
            time.sleep(0.1)
        canned.stall.set()
        asking.result(30)
    assert "no token was processed for 0.5 s" in killed[0]


@pytest.mark.parametrize("temperature", [1e-6, 0.001, 0.0099])
def test_a_temperature_that_vllm_would_raise_is_refused(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint, temperature: float
) -> None:
    engine.load(checkpoint)
    asked = len(canned.asked)
    request = replace(REQUEST, config=replace(REQUEST.config, temperature=temperature))
    with pytest.raises(UnsupportedFeatureError, match=r"vLLM samples at 0.01 instead"):
        engine.complete(request, seed=0)
    assert len(canned.asked) == asked


def test_a_swap_that_hangs_says_what_was_waited_for_and_resumes(
    impatient: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    impatient.load(checkpoint)
    canned.stalled_path = "/collective_rpc"
    with pytest.raises(EngineError, match=r"waited 2 s in vain .*collective_rpc"):
        impatient.load(checkpoint)
    assert canned.paths()[-1] == "/resume"


def test_a_folder_without_weights_is_refused_before_the_old_ones_are_touched(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    engine.load(checkpoint)
    asked = len(canned.asked)
    with pytest.raises(EngineError, match=r"no config\.json"):
        engine.load(Checkpoint("step-000002", tmp_path / "missing"))
    assert engine.weights == "step-000001"
    assert len(canned.asked) == asked


# Attaching


def test_a_server_without_developer_endpoints_is_refused_with_how_to_launch_it(
    engine: VLLMServer, canned: Canned, checkpoint: Checkpoint
) -> None:
    del canned.replies["/is_paused"]
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        engine.load(checkpoint)


def test_a_server_with_raw_logprobs_is_refused(engine: VLLMServer, canned: Canned, checkpoint: Checkpoint) -> None:
    canned.logprobs_heed_temperature = False
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        engine.load(checkpoint)


def test_nobody_at_the_url_is_an_engine_error(checkpoint: Checkpoint) -> None:
    engine = VLLMServer(VLLMSettings(attach_url="http://127.0.0.1:9"))
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9"):
        engine.load(checkpoint)
    assert not answers(engine)
    engine.close()
