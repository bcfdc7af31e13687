"""The program's endpoint: typed, in nobody's way, and plain about what went wrong."""

import asyncio
import json
import random
import re
import time
from typing import Literal

import dspy
import jsonschema
import pytest
from dspy.utils.exceptions import LMAuthError
from pydantic import BaseModel

from dspy_fst import ConfigurationError
from dspy_fst.errors import EngineError
from dspy_fst.serve.app import create_app
from dspy_fst.serve.serving_settings import CHAT, ServeSettings
from tests.fakes import fields
from tests.serve.makers import AUTH, KEY, PATH, app_of, ask, asked, client_of, compiled, echo, figures, get, question


class Person(BaseModel):
    name: str
    age: int


class Extract(dspy.Signature):
    text: str = dspy.InputField()
    year: int = dspy.OutputField()
    kinds: list[Literal["real", "made up"]] = dspy.OutputField()
    person: Person = dspy.OutputField()


class Remembers(dspy.Module):
    """Keeps its input on itself between two calls, as a careless program does."""

    def __init__(self):
        super().__init__()
        self.first = dspy.Predict("question: str -> hint: str")
        self.last = dspy.Predict("question: str, hint: str -> answer: str")
        self.seen = []

    def forward(self, question: str):
        self.question = question
        self.seen.append(question)
        hint = self.first(question=question).hint
        return self.last(question=self.question, hint=f"{hint} of {len(self.seen)}")


def speak_slowly(messages, seed):
    time.sleep(random.random() / 50)
    text = asked(messages, "question")
    if "hint" in messages[-1]["content"].partition("Respond with")[0]:
        return fields(answer=f"{text} by {asked(messages, 'hint')}")
    return fields(hint=text)


def extracted(messages, seed):
    return fields(year=1815, kinds='["real"]', person='{"name": "Ada", "age": 36}')


def test_typed_outputs_stay_typed():
    reply = ask(app_of(extracted, dspy.Predict(Extract)), {"inputs": {"text": "Ada"}})
    assert reply.status_code == 200
    assert reply.json()["outputs"] == {"year": 1815, "kinds": ["real"], "person": {"name": "Ada", "age": 36}}


def test_the_openapi_schema_is_true_of_what_is_sent():
    app = app_of(extracted, dspy.Predict(Extract))
    schema = get(app, "/openapi.json").json()
    operation = schema["paths"][PATH]["post"]

    def validate(value, part):
        jsonschema.validate(
            value, {**part["content"]["application/json"]["schema"], "components": schema["components"]}
        )

    good = {"inputs": {"text": "Ada"}, "seed": 1}
    validate(good, operation["requestBody"])
    reply = ask(app, good).json()
    validate(reply, operation["responses"]["200"])
    for wrong in (
        {},
        {"inputs": {}},
        {"inputs": {"text": 1}},
        {"inputs": {"text": "x", "more": 1}},
        {**good, "more": 1},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong, operation["requestBody"])
        refused = ask(app, wrong)
        assert refused.status_code == 422
        validate(refused.json(), operation["responses"]["422"])
    for status in ("400", "401", "413", "422", "429", "500", "502", "503", "504"):
        told = operation["responses"][status]["content"]["application/json"]["schema"]
        assert told == {"$ref": "#/components/schemas/ErrorReply"}
    reply["outputs"]["year"] = "1815"
    with pytest.raises(jsonschema.ValidationError):
        validate(reply, operation["responses"]["200"])


def test_the_docs_are_served_and_do_not_tell_the_instructions():
    app = app_of(texts=("A secret of the trade.",))
    page = get(app, "/docs")
    assert page.status_code == 200
    linked = re.findall(r"""(?:src|href|url)[=:]\s*["']([^"']+)""", page.text)
    assert len(linked) >= 4
    for path in linked:
        assert path.startswith("/"), f"{path} is somebody else's"
        assert get(app, path).status_code == 200
    assert "secret of the trade" not in get(app, "/openapi.json").text


def test_the_best_candidate_answers_and_the_reply_says_so():
    program, engine = compiled(
        lambda messages, seed: fields(answer="Say it." in messages[0]["content"]), texts=("Say it.", "Other")
    )
    app = create_app(program, ServeSettings(api_key=KEY))
    replies = [ask(app, question("x")).json() for _ in range(5)]
    assert {reply["outputs"]["answer"] for reply in replies} == {"True"}
    meta = replies[0]["meta"]
    assert meta["candidate"] == program.population.best.digest
    assert (meta["choice"], meta["weights"], meta["agreement"]) == ("best", engine.weights, None)


def test_the_same_seed_draws_the_same_answer_and_the_reply_tells_a_seed_that_was_drawn():
    app = app_of(lambda messages, seed: fields(answer=seed))
    drawn = ask(app, question("x")).json()
    again = ask(app, question("x", seed=drawn["meta"]["seed"])).json()
    other = ask(app, question("x", seed=drawn["meta"]["seed"] + 1)).json()
    assert again["outputs"] == drawn["outputs"]
    assert other["outputs"] != drawn["outputs"]


def test_sampled_candidates_are_drawn_by_the_request_s_seed():
    app = app_of(
        lambda m, seed: fields(answer="Xylo" in m[0]["content"]),
        texts=("Xylo.", "Brass."),
        settings={"choice": "sampled"},
    )
    replies = [ask(app, question("x", seed=seed)).json() for seed in range(12)]
    assert {reply["outputs"]["answer"] for reply in replies} == {"True", "False"}
    assert ask(app, question("x", seed=3)).json() == replies[3]


TEXTS = ("one", "two", "two again", "three")


def votes(messages, seed):
    said = next(text for text in reversed(TEXTS) if f"objective is: \n        {text}" in messages[0]["content"])
    return fields(answer={"one": 1, "two": 2, "two again": 2, "three": 3}[said])


def test_the_majority_of_the_population_answers():
    program = dspy.Predict("question: str -> answer: int")
    app = app_of(votes, program, TEXTS, settings={"choice": "vote"})
    reply = ask(app, question("x")).json()
    assert reply["outputs"] == {"answer": 2}
    assert reply["meta"]["agreement"] == 0.5
    assert reply["meta"]["candidate"] == program.population.members[1].digest
    assert figures(app)['dspy_fst_tokens_total{kind="completion"}'] == reply["meta"]["completion_tokens"]


def test_a_candidate_that_fails_abstains():
    def fails_at_first(messages, seed):
        return "no fields" if TEXTS[0] in messages[0]["content"] else votes(messages, seed)

    program = dspy.Predict("question: str -> answer: int")
    reply = ask(app_of(fails_at_first, program, TEXTS[:2], settings={"choice": "vote"}), question("x")).json()
    assert reply["outputs"] == {"answer": 2}
    assert reply["meta"]["agreement"] == 0.5


def test_a_vote_on_free_text_is_refused_before_anything_is_served():
    program, _ = compiled()
    with pytest.raises(ConfigurationError, match="vote_on"):
        create_app(program, ServeSettings(choice="vote"))
    assert create_app(program, ServeSettings(choice="vote", vote_on="answer"))


def test_a_vote_has_no_stream():
    app = app_of(votes, dspy.Predict("question: str -> answer: int"), TEXTS, settings={"choice": "vote"})
    assert f"{PATH}/stream" not in get(app, "/openapi.json").json()["paths"]
    assert ask(app, question("x"), f"{PATH}/stream").status_code == 404


def test_answers_of_requests_at_the_same_time_never_mix():
    app = app_of(speak_slowly, Remembers(), settings={"max_in_flight": 24, "max_queue": 400})

    async def all_at_once():
        async with client_of(app) as client:
            return await asyncio.gather(*(client.post(PATH, json=question(f"number {i}")) for i in range(200)))

    answers = [reply.json()["outputs"]["answer"] for reply in asyncio.run(all_at_once())]
    assert answers == [f"number {i} by number {i} of 1" for i in range(200)]


def test_serving_leaves_the_program_as_it_is():
    program, _ = compiled(speak_slowly, Remembers(), texts=("A.", "B."))
    before, traced = json.dumps(program.dump_state(), default=str), len(dspy.settings.trace)
    app = create_app(program, ServeSettings(api_key=KEY))
    assert ask(app, question("x")).status_code == 200
    assert json.dumps(program.dump_state(), default=str) == before
    assert program.seen == []
    assert program.first.lm.history == []
    assert len(dspy.settings.trace) == traced


def test_two_apps_in_one_process_keep_to_themselves():
    one, two = app_of(lambda m, seed: fields(answer="one")), app_of(lambda m, seed: fields(answer="two"))
    assert ask(one, question("x")).json()["outputs"]["answer"] == "one"
    assert ask(two, question("x")).json()["outputs"]["answer"] == "two"
    asked_for = f'dspy_fst_requests_total{{endpoint="{PATH}",status="200"}}'
    assert figures(one)[asked_for] == figures(two)[asked_for] == 1


class Fails(dspy.Module):
    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("question: str -> answer: str")

    def forward(self, question: str):
        raise RuntimeError(f"secret-token-123 in {question}")


class Forgets(Fails):
    def forward(self, question: str):
        return dspy.Prediction(other="x")


def failing(error):
    def speak(messages, seed):
        raise error

    return speak


@pytest.mark.parametrize(
    ("app", "status", "type"),
    [
        (lambda: app_of(lambda messages, seed: "no fields"), 502, "reply_not_parsed"),
        (lambda: app_of(failing(EngineError("secret-token-123"))), 503, "engine"),
        (lambda: app_of(failing(dspy.lm15.ContextLengthError("secret-token-123"))), 400, "context_length_exceeded"),
        (lambda: app_of(failing(LMAuthError("secret-token-123"))), 502, "lm_failed"),
        (lambda: app_of(echo, Fails()), 500, "program_failed"),
        (lambda: app_of(echo, Forgets()), 502, "outputs_invalid"),
    ],
)
def test_what_went_wrong_is_named_and_nothing_of_the_inside_is_told(app, status, type):
    app = app()
    reply = ask(app, question("x"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, type)
    assert "secret-token-123" not in reply.text
    assert "Traceback" not in reply.text
    assert figures(app)[f'dspy_fst_errors_total{{type="{type}"}}'] == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        pytest.param(b"", "invalid_json", id="empty"),
        pytest.param(b"{", "invalid_json", id="cut off"),
        pytest.param(b"[]", "invalid", id="an array"),
        pytest.param(b"null", "invalid", id="null"),
        pytest.param(b'{"inputs": "x"}', "invalid", id="a string of inputs"),
        pytest.param(b'{"inputs": {"question": "\\ud800"}}', "invalid_json", id="half a surrogate pair"),
        pytest.param(b'{"inputs": {"question": NaN}}', "invalid_json", id="NaN"),
        pytest.param(b"[" * 10_000, "too_deep", id="10,000 levels"),
        pytest.param(b"[" * 100_000, "too_many_values", id="100,000 levels"),
        pytest.param(b"\xff\xfe", "invalid_json", id="no UTF-8"),
    ],
)
def test_a_malformed_body_is_refused_in_the_same_shape(body, code):
    reply = ask(app_of(), None, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == (422 if code == "invalid" else 400)
    assert set(reply.json()["error"]) == {"type", "message", "param", "code", "faults"}
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert reply.json()["error"]["code"] == code


def test_faults_say_where_and_do_not_repeat_what_was_sent():
    reply = ask(app_of(), {"inputs": {"question": {"my": "secret-token-123"}}, "sed": 3})
    faults = {fault["where"] for fault in reply.json()["error"]["faults"]}
    assert faults == {"inputs.question", "sed"}
    assert "secret-token-123" not in reply.text


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", PATH, 405), ("POST", "/v1/nothing", 404), ("GET", "/", 404)]
)
def test_paths_and_methods_that_are_not_there_are_told_in_the_same_shape(method, path, status):
    async def send():
        async with client_of(app_of()) as client:
            return await client.request(method, path)

    reply = asyncio.run(send())
    assert reply.status_code == status
    assert reply.json()["error"]["code"] in ("not_found", "method_not_allowed")


def test_a_program_that_was_not_compiled_is_refused():
    with pytest.raises(ConfigurationError, match="population"):
        create_app(dspy.Predict("question -> answer"))


def test_the_path_can_be_chosen():
    app = app_of(settings={"path": "/v2/reverse"})
    assert ask(app, question("x"), "/v2/reverse").status_code == 200
    assert ask(app, question("x"), "/v2/reverse/stream").status_code == 200
    assert ask(app, question("x")).status_code == 404
    assert {"/v2/reverse", CHAT} <= set(get(app, "/openapi.json", headers=AUTH).json()["paths"])
