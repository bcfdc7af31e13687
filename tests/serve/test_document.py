"""The service held against its own OpenAPI document, by requests that schemathesis makes of the document."""

from typing import Literal

import dspy
import jsonschema
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished

from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import CHAT, MODELS, ServeSettings
from tests.fakes import fields
from tests.serve.fake_vllm import FakeVLLM, behind
from tests.serve.makers import AUTH, KEY, PATH, ask, compiled, events, get, question

EXAMPLES = 8
CONFIG = {
    "seed": 7,
    "headers": AUTH,
    "continue-on-failure": True,
    "cache": {"enabled": False},
    "generation": {"max-examples": EXAMPLES, "deterministic": True, "no-shrink": True, "database": "none"},
    "phases": {"stateful": {"enabled": False}},
    # A document cannot say that text is JSON, nor that the engine in process refuses what only a server knows.
    "operations": [
        {
            "include-path": CHAT,
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "429"]}},
        }
    ],
}


SAID = {"model": "policy", "messages": [{"role": "user", "content": "x"}]}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {
    PATH: [question("x"), {"inputs": {"question": "x", "year": 7, "shares": [0.5], "kind": "made up"}}],
    CHAT: [
        SAID,
        {**SAID, "messages": [SYSTEM, *SAID["messages"]], "temperature": 0.5, "max_tokens": 8, "seed": 3},
        {**SAID, "n": 1, "stream": False},
    ],
}
"""Path -> bodies that every client sends."""


class Typed(dspy.Signature):
    question: str = dspy.InputField()
    year: int = dspy.InputField(default=3, ge=1)
    shares: list[float] | None = dspy.InputField(default=None)
    kind: Literal["real", "made up"] = dspy.InputField(default="real")
    answer: str = dspy.OutputField()


def speak(messages, seed):
    return fields(answer="yes")


@pytest.fixture(params=["in_process", "behind_vllm"])
def engine(request):
    return request.param


@pytest.fixture
def app(engine):
    program, _ = compiled(speak, dspy.Predict(Typed))
    if engine == "in_process":
        yield create_app(program, ServeSettings(api_key=KEY))
        return
    with behind(program, FakeVLLM(speak)):
        yield create_app(program, ServeSettings(api_key=KEY))


@pytest.mark.slow
def test_the_service_does_what_its_document_says(app, engine):
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=SchemathesisConfig.from_dict(CONFIG))
    statuses: dict[str, set[int]] = {}
    failures = []
    for event in from_schema(schema).execute():
        assert not isinstance(event, FatalError | NonFatalError), vars(event)
        if not isinstance(event, ScenarioFinished):
            continue
        for case, checks in event.recorder.checks.items():
            asked, reply = event.recorder.cases[case].value, event.recorder.interactions[case].response
            statuses.setdefault(asked.operation.label, set()).add(reply.status_code)
            for check in checks:
                if check.status == Status.FAILURE:
                    told = f"{asked.operation.label} {asked.body!r:.400}: {reply.status_code} {reply.content!r:.400}"
                    failures.append(f"{check.name}: {check.failure_info.failure.title}\n{told}")
    assert not failures, "\n\n".join(failures)
    assert statuses[f"POST {PATH}"] >= {200, 422}
    assert statuses[f"POST {CHAT}"] >= ({400} if engine == "in_process" else {200, 400})


def test_what_a_known_client_asks_is_answered_as_the_document_says(app):
    # Made requests may all be refused within the document's words; these may not.
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=SchemathesisConfig.from_dict(CONFIG))
    for path, bodies in GOOD.items():
        for body in bodies:
            case = schema[path]["POST"].Case(body=body, media_type="application/json")
            reply = case.call_and_validate(headers=AUTH)
            assert reply.status_code == 200, f"{path} {body}: {reply.text}"


def test_everything_that_can_be_answered_is_documented_in_one_shape(app):
    document = get(app, "/openapi.json").json()
    for path, statuses in ((PATH, {422}), (f"{PATH}/stream", {422}), (CHAT, {404})):
        told = document["paths"][path]["post"]["responses"]
        errors = {status: reply for status, reply in told.items() if status != "200"}
        assert set(map(int, errors)) == {400, 401, 403, 413, 415, 429, 500, 502, 503, 504} | statuses
        for reply in errors.values():
            assert reply["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ErrorReply"}
    assert "404" in document["paths"][f"{MODELS}/{{name}}"]["get"]["responses"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_events_are_the_objects_that_the_document_says(app):
    document = get(app, "/openapi.json").json()

    def check(path, body):
        stream = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
        kinds = stream.get("oneOf", [stream])
        assert all(kind["type"] == "object" for kind in kinds)
        told = {kind["properties"].get("event", {}).get("const", "message"): kind for kind in kinds}
        found = [(name, data) for name, data in events(ask(app, body, path).text) if data != "[DONE]"]
        for name, data in found:
            part = told[name]["properties"]["data"]
            assert part["contentMediaType"] == "application/json"
            jsonschema.validate(data, {**part["contentSchema"], "components": document["components"]})
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate("text", {**part["contentSchema"], "components": document["components"]})
        return {name for name, _ in found}

    assert check(f"{PATH}/stream", question("x")) >= {"start", "module", "result"}
    chat = {"model": "policy", "messages": [{"role": "user", "content": "x"}], "stream": True}
    assert check(CHAT, {**chat, "stream_options": {"include_usage": True}}) == {"message"}


def test_a_whole_number_may_be_written_with_a_point(app):
    for year in (1815, 1815.0):
        assert ask(app, {"inputs": {"question": "x", "year": year}}).status_code == 200
    for wrong in (1815.5, "1815", True, 0.0):
        assert ask(app, {"inputs": {"question": "x", "year": wrong}}).status_code == 422
