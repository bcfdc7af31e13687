"""A program whose predictors speak through LoRA adapters of their own, served: each is a model of its own."""

from pathlib import Path

import dspy
import httpx
import pytest
from dspy import lm15

import dspy_fst
from dspy_fst import ConfigurationError
from dspy_fst.engine.base import AdapterFiles, Checkpoint
from dspy_fst.policy_lm import EngineHandle, policy_of
from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import CHAT, MODELS, ServeSettings
from tests.fakes import fields
from tests.lora_program import OF, two_adapters
from tests.relay import Relay
from tests.serve.fake_vllm import FakeVLLM, behind
from tests.serve.makers import AUTH, KEY, PATH, ask, compiled, events, get, served, wait_until

MESSAGES = [{"role": "user", "content": "4 7 1 9"}]
SIGNATURE = "numbers: str -> answer: str"
NUMBERS = {"inputs": {"numbers": "4 7 1 9"}}


def chat(model, **more):
    return {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 12, **more}


def said_by(engine, adapter):
    """What the engine itself says through an adapter."""
    body = {"model": "m", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    return engine.complete(lm15.request_from_openai_chat(body), 1, adapter=adapter).response.text


def check(url, headers, program):
    """The server gives what the program itself gives, and each of its models what the engine gives."""
    engine = policy_of(program).handle.ready()
    wanted = {name: said_by(engine, name) for name in OF.values()}
    assert len({*wanted.values(), said_by(engine, None)}) == 3, "they would be taken for each other"
    with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
        assert [card["id"] for card in client.get(MODELS).json()["data"]] == ["for-first", "for-last"]
        assert client.get(f"{MODELS}/for-last").json()["id"] == "for-last"
        for name, text in wanted.items():
            reply = client.post(CHAT, json=chat(name)).json()
            assert (reply["model"], reply["choices"][0]["message"]["content"]) == (name, text)
            told = client.post(CHAT, json=chat(name, stream=True)).text
            pieces = [data for _, data in events(told) if data != "[DONE]"]
            assert {piece["model"] for piece in pieces} == {name}
            said = (piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"])
            assert "".join(said) == text
        for name in ("policy", "base"):
            refused = client.post(CHAT, json=chat(name))
            assert refused.status_code == 404
            assert "only 'for-first', 'for-last'" in refused.json()["error"]["message"]
        reply = client.post(PATH, json=NUMBERS)
        assert reply.json()["outputs"]["answer"] == program(numbers="4 7 1 9").answer
        streamed = dict(events(client.post(f"{PATH}/stream", json=NUMBERS).text))
        assert streamed["result"]["outputs"] == reply.json()["outputs"]


@pytest.mark.slow
def test_in_process_every_predictor_and_every_model_has_its_own_adapter(tmp_path):
    program = two_adapters(tmp_path / "weights")
    loaded = dspy_fst.load(dspy_fst.save(program, tmp_path / "saved"), Relay())
    app = create_app(loaded, ServeSettings(api_key=KEY, signature=SIGNATURE))
    with served(app) as url:
        wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200, "the engine is ready")
        check(url, AUTH, program)
    policy_of(program).release()


@pytest.mark.parametrize("around", [dspy.BestOfN, dspy.Refine])
def test_best_of_n_around_one_predictor_asks_through_its_adapter(tmp_path, monkeypatch, around):
    """DSPy 3.4.1 copies the one LM of what it wraps for each try. A whole program of two has no such LM."""
    program, asked = two_adapters(tmp_path / "weights"), []

    def complete(self, request, adapter=None):
        asked.append(adapter)
        return lm15.Response(None, "m", lm15.Message.assistant(fields(answer="1 2")), "stop", lm15.Usage())

    monkeypatch.setattr(EngineHandle, "complete", complete)
    for predictor, own in ((program.first, "for-first"), (program.last, "for-last")):
        rewards = iter((0.0, 1.0))
        best = around(predictor, N=2, reward_fn=lambda inputs, pred, rewards=rewards: next(rewards), threshold=1.0)
        assert best(numbers="4 7 1 9").answer == "1 2"
        assert asked == [own, own]
        asked.clear()
    whole = around(program, N=2, reward_fn=lambda inputs, pred: 1.0, threshold=1.0)
    with pytest.raises(ValueError, match="Multiple LMs are being used in the module"):
        whole(numbers="4 7 1 9")


@pytest.fixture
def fake():
    fake = FakeVLLM(lambda messages, seed: fields(answer="1 2"))
    yield fake
    fake.stop()


def asked_through(fake, program):
    """The app of a program on adapters that a fake server has loaded, and the adapters that its engine is asked for."""
    paths = {name: Path(f"/somewhere/step-000003/{name}") for name in OF.values()}
    policy = policy_of(program)
    adapters = tuple(AdapterFiles(name, path) for name, path in paths.items())
    policy.handle.checkpoint = Checkpoint("step-000003", Path("base"), adapters=adapters, predictors=OF)
    for name, predictor in program.named_predictors():
        predictor.lm = policy.on(policy.handle, OF[name])
    fake.models = {
        "data": [
            {"id": "base", "root": "/somewhere/base"},
            *({"id": f"{name}@step-000003", "root": str(path)} for name, path in paths.items()),
        ]
    }
    return create_app(program, ServeSettings(api_key=KEY, signature=SIGNATURE))


def test_what_is_streamed_comes_from_the_last_predictor_s_adapter(fake):
    program = compiled(fake.speak, Relay())[0]
    with behind(program, fake) as engine:
        app = asked_through(fake, program)
        told = events(ask(app, NUMBERS, f"{PATH}/stream").text)
    assert [body["model"] for body in fake.asked] == ["for-last@step-000003"]
    assert engine.through == ["for-first"]
    assert told[-1][1]["outputs"] == {"answer": "1 2"}


def test_a_model_that_is_asked_for_is_its_adapter_on_the_server(fake):
    program = compiled(fake.speak, Relay())[0]
    with behind(program, fake):
        app = asked_through(fake, program)
        for name in OF.values():
            assert ask(app, chat(name), CHAT).json()["model"] == name
    assert [body["model"] for body in fake.asked] == ["for-first@step-000003", "for-last@step-000003"]
    assert get(app, "/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == [
        *OF.values()
    ]


def test_a_name_for_one_model_is_refused_where_there_are_several(tmp_path):
    program = two_adapters(tmp_path / "weights")
    with pytest.raises(ConfigurationError, match=r"model_name='mine': the program speaks through 2 LoRA adapters, and"):
        create_app(program, ServeSettings(api_key=KEY, signature=SIGNATURE, model_name="mine"))
