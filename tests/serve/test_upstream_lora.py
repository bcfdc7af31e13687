"""Behind a server with LoRA adapters the adapter of the served program is asked, and never its base."""

from pathlib import Path

import pytest

from dspy_fst.engine.base import AdapterFiles, Checkpoint
from dspy_fst.errors import EngineError
from dspy_fst.policy_lm import policy_of
from dspy_fst.serve.service import Service
from dspy_fst.serve.serving_settings import ServeSettings
from dspy_fst.serve.upstream import Upstream
from tests.serve.fake_vllm import FakeVLLM, ServerEngine, behind
from tests.serve.makers import KEY, compiled

ADAPTER = Path("/somewhere/weights/step-000007/shared")
BASE = {"id": "base", "root": "/somewhere/weights/base", "max_model_len": 512}
OLD = {"id": "shared@step-000006", "root": "/somewhere/weights/step-000006/shared", "parent": "base"}
NOW = {"id": "shared@step-000007", "root": str(ADAPTER), "parent": "base"}
BODY = {"messages": [{"role": "user", "content": "hello"}], "seed": 1}


@pytest.fixture
def fake():
    fake = FakeVLLM(lambda messages, seed: "answer")
    yield fake
    fake.stop()


def test_a_reply_is_asked_of_the_adapter_by_its_name_of_now(fake):
    fake.models = {"data": [BASE, OLD, NOW]}
    upstream = Upstream(ServerEngine(fake), 10.0, ADAPTER)
    upstream.chat(BODY)
    fake.models = {"data": [BASE, {**NOW, "id": "shared@step-000007-2"}]}  # the server was started again
    list(upstream.stream(BODY))
    assert [body["model"] for body in fake.asked] == ["shared@step-000007", "shared@step-000007-2"]
    assert upstream.context == 512
    upstream.close()


def test_an_adapter_that_is_not_loaded_is_an_error_and_not_the_base_s_reply(fake):
    fake.models = {"data": [BASE, OLD]}
    upstream = Upstream(ServerEngine(fake), 10.0, ADAPTER)
    with pytest.raises(EngineError, match=r"vLLM has not loaded the LoRA adapter .*step-000007/shared"):
        upstream.chat(BODY)
    assert fake.asked == []
    upstream.close()


def test_without_an_adapter_the_server_s_model_is_asked(fake):
    fake.models = {"data": [BASE, OLD]}
    upstream = Upstream(ServerEngine(fake), 10.0)
    upstream.chat(BODY)
    assert fake.asked[0]["model"] == "base"
    upstream.close()


def test_a_served_program_names_its_adapter(fake):
    program = compiled(lambda messages, seed: "answer")[0]
    handle = policy_of(program).handle
    handle.checkpoint = Checkpoint("step-000007", Path("base"), adapters=(AdapterFiles("shared", ADAPTER),))
    fake.models = {"data": [BASE, NOW]}
    with behind(program, fake):
        service = Service(program, ServeSettings(api_key=KEY))
        service.upstream.chat(BODY)
    assert fake.asked[0]["model"] == "shared@step-000007"
