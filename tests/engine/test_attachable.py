"""What is found out of servers of somebody else before they get weights, and what a gateway before them says."""

import gc
import json
import re
import threading
from collections.abc import Iterator

import pytest

from dspy_fst.engine.vllm.fleet.alike import attached_faults, require_alike
from dspy_fst.engine.vllm.lora_client import LoRAClient
from dspy_fst.engine.vllm.rows import PATH, AskedRow
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.errors import EngineError, NoAnswerError
from tests.engine.test_vllm_client import REQUEST, Canned, checkpoint, engine  # noqa: F401 - fixtures

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def pair() -> Iterator[list[Canned]]:
    servers = [Canned(), Canned()]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        serves(server)
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


def serves(server: Canned, root: str = "/models/a", length: int = 512, dtype: str = "float32") -> None:
    server.replies["/v1/models"] = (200, {"data": [{"id": "policy", "root": root, "max_model_len": length}]})
    server.replies[PATH] = (200, {"dtype": dtype})


def faults_of(*urls: str, max_model_len: int | None = None) -> list[str]:
    return list(attached_faults(VLLMSettings(attach_url=urls, max_model_len=max_model_len)).values())


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"root": "/models/b"}, "/models/a, max_model_len 512, dtype float32; .*/models/b, max_model_len 512"),
        ({"length": 256}, "max_model_len 512, dtype float32; .*max_model_len 256, dtype float32"),
        ({"dtype": "bfloat16"}, "dtype float32; .*dtype bfloat16.*--max-model-len and --dtype"),
    ],
)
def test_servers_that_differ_are_refused_before_any_gets_weights(pair, other, told):
    settings = VLLMSettings(attach_url=tuple(server.url for server in pair))
    assert str(require_alike(settings)) == "/models/a, max_model_len 512, dtype float32"
    serves(pair[1], **other)
    with pytest.raises(EngineError, match=told):
        require_alike(settings)
    assert not any(body for server in pair for _, body in server.asked)


@pytest.mark.parametrize("answer", [{"data": []}, {"data": [{"root": "/models/a"}]}, [], "hello"])
def test_what_is_no_vllm_is_told(canned, answer):
    canned.replies["/v1/models"] = (200, answer)
    (fault,) = faults_of(canned.url)
    assert f"{canned.url}/v1/models answers, but lists no model as vLLM does; name" in fault


def test_one_server_under_two_addresses_is_found_by_its_process(pair):
    pair[1].process = pair[0].process
    (fault,) = faults_of(*(server.url for server in pair))
    assert f"{pair[0].url} and {pair[1].url} are one server" in fault


def test_all_that_is_wrong_is_told_at_once(pair):
    pair[0].process = None
    pair[1].replies[PATH] = (502, {})
    told = faults_of(NOBODY, pair[0].url, pair[1].url)
    assert "does not answer" in told[0]
    assert "Launch it, or correct its address" in told[0]
    assert "--middleware dspy_fst_rows.Rows" in told[1]
    assert f"{pair[1].url} does not answer" in told[2]
    assert "answered 502" in told[2]


def test_a_context_shorter_than_the_run_counts_on_is_refused(canned):
    serves(canned)
    assert faults_of(canned.url, max_model_len=512) == []
    (fault,) = faults_of(canned.url, max_model_len=1024)
    assert "max_model_len is 1024, and vLLM at" in fault
    assert "set max_model_len to 512 or less" in fault


def test_a_server_of_another_model_is_told_before_any_work_and_gets_no_weights(engine, canned, checkpoint):  # noqa: F811
    sizes = {"hidden_size": 576, "num_hidden_layers": 4, "vocab_size": None}
    canned.replies[PATH] = (200, {"dtype": "float32", "sizes": sizes})
    (checkpoint.path / "config.json").write_text(
        json.dumps({"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 9})
    )
    told = f"serves another model than {checkpoint.path}: hidden_size 576 there and 64 here; launch it on this model"
    (fault,) = attached_faults(VLLMSettings(attach_url=canned.url), checkpoint.path).values()
    assert told in fault
    with pytest.raises(EngineError, match=re.escape(told)):
        engine.load(checkpoint)
    assert not [path for path in canned.paths() if path in ("/pause", "/collective_rpc")]
    (checkpoint.path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 576}}))
    engine.load(checkpoint)


def test_a_server_that_would_answer_with_other_weights_unnoticed_gets_none(engine, canned, checkpoint):  # noqa: F811
    canned.replies[PATH] = (503, {})  # a gateway's: nobody knows whether it has the middleware
    with pytest.raises(NoAnswerError, match="answered 503"):
        engine.load(checkpoint)
    del canned.replies[PATH]
    with pytest.raises(EngineError, match=r"--middleware dspy_fst_rows\.Rows, which refuses calls"):
        engine.load(checkpoint)
    assert not [path for path in canned.paths() if path in ("/pause", "/collective_rpc")]


# Behind a gateway


@pytest.mark.parametrize("reply", [(429, {}), (408, {}), (502, {}), (200, "<html>at work</html>"), (200, '{"cut":')])
def test_what_a_gateway_says_is_no_answer_and_may_be_asked_again(engine, canned, checkpoint, reply):  # noqa: F811
    engine.load(checkpoint)
    client = engine._require_client()
    for path in ("/v1/chat/completions", "/v1/completions", "/collective_rpc"):
        canned.replies[path] = reply
    for ask in (
        lambda: client.sample(REQUEST, 1, "v0"),
        lambda: client.score([[1, 2]]),
        lambda: client.run("reload_weights"),
    ):
        with pytest.raises(NoAnswerError):
            ask()


def test_a_server_is_not_known_to_load_adapters_by_a_gateway_s_answer(engine, canned, checkpoint):  # noqa: F811
    engine.load(checkpoint)
    loras = LoRAClient(engine._require_client())
    canned.replies["/v1/load_lora_adapter"] = (400, {})
    loras.require("how")
    canned.replies["/v1/load_lora_adapter"] = (502, {})
    with pytest.raises(NoAnswerError):
        loras.require("how")


@pytest.mark.parametrize("line", [b"12\n", b'{"other": 1}\n', b'{"row": 7}\n', b"[]\n"])
def test_a_line_that_is_none_of_ours_is_no_reply(engine, canned, checkpoint, line, caplog):  # noqa: F811
    engine.load(checkpoint)
    canned.replies[PATH] = (200, line.decode())
    rows = engine._require_client().rows
    with pytest.raises(NoAnswerError, match="gave no reply"):
        rows.reply_to(AskedRow((1, 2), "policy", 1, 1.0, 4))
    rows.close()
    gc.collect()  # then asyncio tells of errors that nobody took
    assert "never retrieved" not in caplog.text
