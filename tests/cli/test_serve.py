"""`dspy-fst serve`: whose code is run, what is refused, and the command itself on a compiled program."""

import json
import signal
import sys
import threading
from collections import Counter

import dspy
import httpx
import jsonschema
import openai
import pytest
import yaml
from typer.testing import CliRunner

import dspy_fst
from dspy_fst.cli import app
from dspy_fst.policy_lm import policy_of
from programs.lab import build
from programs.lab.program import Solve
from tests.serve.command import NUMBERS, ROOT, saved_lab, serving
from tests.serve.makers import KEY, PATH, events

MINE = """
from programs.lab import build

number = 4


def broken():
    raise OSError("no such file")


def make():
    return build(train=4, val=0, test=0).program
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The user's folder: a module, a compiled program in out/, and a finished run of it in run/."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "mine.py").write_text(MINE)
    run = folder / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    names = {"metric": "mine:metric", "trainset": "mine:train"}  # never looked for: they may not be there any more
    settings = {"folder": str(folder), "program": "mine:make", "run_dir": str(run), **names}
    (run / "project.yaml").write_text(yaml.safe_dump(settings))
    saved_lab(run / "compiled")
    (folder / "out").symlink_to(run / "compiled")
    return folder


# ---- whose code is run ---------------------------------------------------------------------------


def said(*arguments, code=2):
    """What the command wrote on stderr; it must not get as far as listening."""
    sys.modules.pop("mine", None)  # this process may have imported another test's
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "serving Solve" not in result.stderr
    return result.stderr


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A run's directory from somebody else, whose project names a module that lies in it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("evil", None)
    (tmp_path / "compiled").mkdir()
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    settings = {"program": "evil:make", "metric": "evil:m", "trainset": "evil:t", "run_dir": "."}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_no_code_is_run_from_what_is_served(foreign, monkeypatch):
    for out in (foreign, foreign / "compiled"):
        assert f"{foreign / 'project.yaml'}: folder=None is not the absolute path" in said(out)
    monkeypatch.chdir(foreign)
    assert "evil:make would be looked for in" in said(".", "--program", "evil:make")
    assert not (foreign / "ran").exists()


def test_code_that_the_user_names_is_run_wherever_it_lies(foreign):
    assert "has no 'make'" in said(foreign, "--project", foreign / "project.yaml")
    assert (foreign / "ran").exists()


def test_a_program_that_is_not_named_or_not_there_is_told(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])
    alone = tmp_path / "alone"
    alone.mkdir()
    assert "Give --project FILE, or --program MODULE:ATTRIBUTE" in said(alone)
    assert "give one of them" in said(alone, "--program", "mine:make", "--project", "project.yaml")
    assert "is no folder" in said(tmp_path / "none", "--program", "mine:make")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    assert "holds no compiled/: the run has not ended" in said(tmp_path / "run")
    for reference, words in (
        ("mine", "write module:attribute"),
        ("mine:nothing", "mine.py has no 'nothing'"),
        ("mine:number", "gives int, not a dspy.Module"),
        ("mine:broken", "mine:broken() raised: OSError: no such file"),
        ("no_such_module:make", "No module named 'no_such_module'"),
    ):
        assert words in said(alone, "--program", reference)
    assert "is no saved program" in said(alone, "--program", "mine:make")


def test_settings_that_cannot_work_are_told_together_before_anything_is_loaded(home, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    run = home / "run"
    assert "--api-key-env: the environment variable NO_SUCH_KEY is not set" in said(run, "--api-key-env", "NO_SUCH_KEY")
    words = said(run, "--no-key", "--host", "0.0.0.0", "--max-in-flight", 0, "--vote-on", "answer", "--timeout", "nan")
    assert words.startswith("4 problems found")
    assert "2 problems" in said(run, "--drain", -1, "--port", 70_000)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert "name the field to vote on with vote_on" in said(run, "--choice", "vote")


def test_a_missing_extra_is_told_with_what_installs_it(home, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dspy_fst.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install 'dspy-fst[serve]'" in said(home / "run")


# ---- the command, in a process of its own --------------------------------------------------------


@pytest.fixture(scope="module")
def server(home):
    options = ("--program", "mine:make", "--engine", "in_process", "--max-in-flight", 4, "--max-queue", 4)
    with serving(home / "out", *options, "--model-name", "mine", cwd=home, key=KEY) as started:
        started.wait_for(started.ready, "the engine serves weights")
        yield started


def test_a_compiled_program_answers_as_its_schema_says(server):
    reply = server.ask(NUMBERS)
    assert reply.status_code == 200, reply.text
    schema = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    operation = schema["paths"][PATH]["post"]
    for value, part in ((NUMBERS, operation["requestBody"]), (reply.json(), operation["responses"]["200"])):
        jsonschema.validate(
            value, {**part["content"]["application/json"]["schema"], "components": schema["components"]}
        )
    assert schema["info"]["title"] == "Solve"
    assert reply.json()["meta"]["prompt_tokens"] > 10


def test_the_endpoint_its_stream_and_the_program_loaded_in_python_give_the_same_answer(server, home):
    outputs = server.ask(NUMBERS).json()["outputs"]
    told = events(server.ask(NUMBERS, f"{PATH}/stream").text)
    assert [name for name, _ in told] == ["start", "module", "result"]
    assert told[-1][1]["outputs"] == outputs
    program = dspy_fst.load(home / "out", build(train=4, val=0, test=0).program)
    assert dict(program(**NUMBERS["inputs"]).items()) == outputs
    policy_of(program).release()


def test_the_openai_client_speaks_with_the_trained_model(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    messages = [{"role": "user", "content": "4 7 1 9"}]
    reply = client.chat.completions.create(model="mine", messages=messages, max_tokens=5, seed=1)
    chunks = client.chat.completions.create(model="mine", messages=messages, max_tokens=5, seed=1, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == reply.choices[0].message.content
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another-key-0123456").models.list()
    client.close()
    assert 0 < reply.usage.completion_tokens <= 5


def test_the_compiled_state_on_an_ordinary_lm_at_the_chat_endpoint_is_an_ordinary_dspy_program(server, home):
    program = Solve("Not yet loaded.")
    program.load(home / "out" / "program.json")
    lm = dspy.LM("openai/mine", api_base=f"{server.url}/v1", api_key=KEY, temperature=0.0, max_tokens=12, cache=False)
    program.set_lm(lm)
    best = json.loads((home / "out" / "population.json").read_text())["members"][0]
    assert program.solve.signature.instructions == best["solve"]
    before = server.figure('dspy_fst_tokens_total{kind="completion"')
    answer = program(numbers="4 7 1 9").answer
    assert answer.split()
    spent = lm.history[-1]["usage"]["completion_tokens"]
    assert server.figure('dspy_fst_tokens_total{kind="completion"') - before == spent > 0


def test_malformed_oversized_and_unknown_callers_are_refused(server):
    def told(content, **headers):
        headers = {**server.auth, "Content-Type": "application/json", **headers}
        reply = httpx.post(server.url + PATH, content=content, headers=headers, timeout=60)
        return reply.status_code, reply.json()["error"]["code"]

    assert told(json.dumps({"inputs": {"numbers": 4}})) == (422, "invalid")
    assert told(b"{") == (400, "invalid_json")
    assert told(b"4" * 1_100_000) == (413, "too_large")
    assert told(iter([b"4" * 400_000] * 3)) == (413, "too_large")
    assert told(json.dumps(NUMBERS), Authorization="") == (401, "invalid_api_key")
    assert httpx.get(f"{server.url}/nothing", headers=server.auth, timeout=60).status_code == 404


def test_too_many_at_once_are_refused_and_the_figures_add_up(server):
    def counted():
        kinds = {code: f'dspy_fst_requests_total{{endpoint="{PATH}",status="{code}"' for code in (200, 429)}
        counts = Counter({code: server.figure(start) for code, start in kinds.items()})
        return counts, server.figure('dspy_fst_tokens_total{kind="completion"')

    before, tokens_before = counted()
    replies = []
    barrier = threading.Barrier(40)

    def one():
        barrier.wait(30)
        replies.append(server.ask(NUMBERS))

    threads = [threading.Thread(target=one) for _ in range(40)]
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


def test_a_run_s_directory_is_served_with_a_made_key_and_sigterm_loses_no_request(home):
    outcomes, lock = Counter(), threading.Lock()

    def ask_until_refused():
        outcome = 200
        while outcome == 200:
            try:
                outcome = server.ask(NUMBERS).status_code
            except httpx.ConnectError:
                outcome = "refused"
            except httpx.HTTPError as error:
                outcome = f"lost: {error!r}"
            with lock:
                outcomes[outcome] += 1

    with serving(home / "run", "--max-in-flight", 4, "--max-queue", 60, cwd=ROOT) as server:
        server.wait_for(server.ready, "the engine serves weights")
        assert len(server.key) >= 32
        assert sum(server.key in line for line in server.said) == 1
        threads = [threading.Thread(target=ask_until_refused) for _ in range(8)]
        for thread in threads:
            thread.start()
        server.wait_for(lambda: outcomes[200] >= 8, "every caller was answered once on average")
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert server.end() == 0, server.said
        assert server.process.stdout.read() == ""
    assert outcomes[200] >= 8
    assert set(outcomes) <= {200, 503, "refused"}
