"""`dspy-fst export`: a folder that transformers, any OpenAI-compatible server with DSPy, and dspy_fst can use."""

import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dspy
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import dspy_fst
from dspy_fst.errors import RunDirectoryError
from dspy_fst.policy_lm import policy_of
from dspy_fst.report.from_directory import read_records
from dspy_fst.report.from_events import record_of
from dspy_fst.rollout.components import read_texts
from dspy_fst.run.directory import read_events
from dspy_fst.saving.card import Facts, model_card
from dspy_fst.saving.format import SavedPolicy
from dspy_fst.saving.manifest import MANIFEST, seal
from dspy_fst.types import Candidate, Population
from tests.cli.conftest import invoke
from tests.fakes import fields
from tests.relay import Relay
from tests.report.happenings import plan, step, whole_run
from tests.test_compile import speaks


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """An exported run; nobody writes into it."""
    out = tmp_path_factory.mktemp("exported") / "out"
    invoke("export", finished, out)
    return out


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of one's own."""
    return shutil.copytree(exported, tmp_path / "out")


def best_of(run_dir):
    return read_events(run_dir)[-1]["population"]["members"][0]


# ---- who can use it --------------------------------------------------------------------------------


def test_transformers_loads_the_trained_weights_and_the_tokenizer_from_its_root(exported, finished):
    model, told = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(told.values()), told
    trained = AutoModelForCausalLM.from_pretrained(finished / "weights" / "step-000006").state_dict()
    base = AutoModelForCausalLM.from_pretrained(finished / "weights" / "step-000000").state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert not all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(exported)("1 2 3")["input_ids"]
    assert GenerationConfig.from_pretrained(exported).eos_token_id is not None


def test_dspy_fst_loads_it_as_it_loads_what_it_saved(exported, finished):
    loaded = dspy_fst.load(exported, Relay())
    saved = dspy_fst.load(finished / "compiled", Relay())
    assert read_texts(loaded) == read_texts(saved) == Candidate(best_of(finished))
    assert loaded.population == saved.population
    assert policy_of(loaded).checkpoint.path == exported
    assert speaks(loaded)
    policy_of(loaded).release()


@contextmanager
def openai_server(reply):
    """A server that speaks just enough of OpenAI's protocol, and the requests that it got."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": reply}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": requests[-1]["model"]}
            body = json.dumps({**answer, "choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


@pytest.mark.usefixtures("dspy_may_be_configured")
def test_it_is_an_ordinary_dspy_program_before_any_openai_compatible_server(exported, finished):
    """As the card says it, with DSPy alone."""
    card = (exported / "README.md").read_text()
    code = next(block for block in card.split("```python\n")[1:] if "program.load" in block).partition("```")[0]
    with openai_server(fields(answer="3 2 1")) as (address, requests):
        code = code.replace("FOLDER", str(exported)).replace("http://localhost:8000/v1", address)
        names = {"program": Relay()}
        exec(code.replace("program = ...", "pass"), names)
        assert names["program"](numbers="1 2 3 4").answer == "3 2 1"
    assert len(requests) == 2
    for request, said in zip(requests, best_of(finished).values(), strict=True):
        assert request["model"] == str(exported)
        assert said in request["messages"][0]["content"]
        sampling = (request["temperature"], request.get("max_tokens") or request["max_completion_tokens"])
        assert sampling == (1.5, 12)


def test_no_code_and_no_lm_of_the_machine_is_in_it(exported):
    names = {path.name for path in exported.iterdir()}
    assert {"README.md", "manifest.json", "program.json", "population.json", "policy.json", "config.json"} <= names
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert {path.suffix for path in exported.rglob("*")} <= {".json", ".jinja", ".md", ".safetensors"}
    assert all(
        part["lm"] is None
        for name, part in json.loads((exported / "program.json").read_text()).items()
        if name != "metadata"
    )
    assert (exported / "model.safetensors").stat().st_mode & 0o777 == 0o644


# ---- the card --------------------------------------------------------------------------------------


def test_the_card_tells_what_the_run_measured(exported, finished):
    card = (exported / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["library_name"] == "transformers"
    assert "dspy" in head["tags"]
    assert "base_model" not in head, "the base is a folder of this machine, which others do not have"
    assert str(finished.parent) not in card
    (record,) = read_records([finished])
    for line in (
        "| program | Relay |",
        "| trained predictors | first, last |",
        r"| metric | tests.relay.any\_answer |",
        "| examples for training | 32 |",
        "| examples for validation | 4 |",
        "| steps | 6 |",
        r"| learning\_rate | 0.0005 |",
        f"| rollouts of training | {record.costs.training_rollouts:,} |",
        f"| mean training reward, last step | {record.rewards[-1]:.3f} |",
        f"| dspy at the export | {dspy.__version__} |",
    ):
        assert line in text
    for member in read_events(finished)[-1]["population"]["members"]:
        assert all(said in text for said in member.values())


def test_the_card_holds_the_evaluations_that_were_made(run_dir, tmp_path):
    cells = {"seed/base": [0.125, 0.01], "evolved/trained": [0.875, 0.02]}
    under = {"split": "test", "limit": 4, "problems_of_split": 4, "weights": "step-000006", "cycle": 1, "k": 2}
    made = [
        {"kind": "eval", "mean": 0.5, "low": 0.25, "high": 0.75, "candidate": "abc", "problems": 3, **under},
        {"kind": "two_by_two", "cells": cells, **under, "split": "train"},
    ]
    (run_dir / "evaluations.jsonl").write_text("\n".join(map(json.dumps, made)))
    invoke("export", run_dir, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| test | 3/4, limit 4 | abc | step-000006 | 1 | – | 2 | 0.500 | 0.250 to 0.750 |" in card  # noqa: RUF001
    assert "brought (split train, the first 4 problems, k=2, cycle 1, weights step-000006):" in card
    assert "\n- train: these problems were trained on\n" in card
    assert "| evolved instructions | – | 0.875 ± 0.020 |" in card  # noqa: RUF001


def facts(**changes):
    text = 'Say "```".\n````\n</details>'
    settings = {"model": "weights", "engine": "auto", "engine_options": {}, "temperature": 1.0, "max_tokens": 9}
    policy = {**settings, "num_retries": 0, "version": "step-000004"}
    predictors = {"self": {"temperature": 1.0, "max_tokens": 9}}
    made = {
        "population": Population((Candidate({"self": text}),), (None,)),
        "policy": SavedPolicy.model_validate({"policy": policy, "predictors": predictors, "frozen": {}}),
        "saved_by": "0.1.0",
        "packages": {},
        "record": record_of(whole_run()),
        "plan": {"program": "x|y"},
        "base": "some/model",
    }
    return Facts(**{**made, **changes})


def test_a_text_of_the_population_cannot_leave_its_block_or_its_cell():
    card = model_card(facts())
    assert '`````text\nSay "```".\n````\n</details>\n`````' in card
    assert r"| program | x\|y |" in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "some/model"
    assert "\nprogram.lm = lm.copy(temperature=1, max_tokens=9)" in card, "a program may be one predictor"


def test_the_card_of_a_run_that_trained_no_weights_has_no_training_reward():
    events = [event for event in whole_run() if event["event"] not in ("step", "trajectories")]
    card = model_card(facts(record=record_of(events)))
    assert "validation score, best candidate | 0.875" in card
    assert "training reward" not in card


def test_a_card_without_a_run_says_so_and_makes_nothing_up():
    card = model_card(facts(record=None, plan={}, base=None))
    assert "saved outside of its run's directory" in card
    for word in ("base_model", "Costs", "Scores", "metric"):
        assert word not in card


# ---- whole or not at all ---------------------------------------------------------------------------


def test_a_changed_file_is_found_but_the_card_may_be_edited(folder):
    (folder / "README.md").write_text("# Mine")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    dspy_fst.load(folder, Relay())
    (folder / "population.json").write_text((folder / "population.json").read_text() + " ")
    with pytest.raises(RunDirectoryError, match=r"population\.json has \d+ bytes instead of"):
        dspy_fst.load(folder, Relay())


def test_code_that_was_put_beside_the_weights_is_refused(folder):
    (folder / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(RunDirectoryError, match=r"modeling\.py does not belong"):
        dspy_fst.load(folder, Relay())
    (folder / MANIFEST).unlink()
    seal(folder, "0")  # who sends a folder writes its checksums too
    with pytest.raises(RunDirectoryError, match=r"modeling\.py: only .* files are read, as others can run code"):
        dspy_fst.load(folder, Relay())


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(finished, run_dir, tmp_path):
    (tmp_path / "taken").mkdir()
    assert "exists; name a new folder" in invoke("export", finished, tmp_path / "taken", code=2).stderr
    assert list((tmp_path / "taken").iterdir()) == []
    (run_dir / "compiled" / "population.json").write_text("{}")
    assert "population.json has 2 bytes" in invoke("export", run_dir, tmp_path / "new" / "out", code=2).stderr
    assert not (tmp_path / "new").exists()
    assert "holds no compiled/" in invoke("export", tmp_path, tmp_path / "out", code=2).stderr


def test_a_secret_is_refused_by_its_place_and_not_shown(finished, tmp_path, monkeypatch):
    said = next(iter(best_of(finished).values()))
    monkeypatch.setenv("MY_API_KEY", said)
    text = invoke("export", finished, tmp_path / "out", code=2).stderr
    assert "population.json would hold a secret at members[0].first" in text
    assert "README.md would hold a secret at" in text
    assert said not in text
    assert list(tmp_path.iterdir()) == []


def test_a_program_of_another_run_is_not_given_this_run_s_numbers(run_dir, tmp_path):
    events = [
        {**event, "weights": "step-000009"} if event["event"] == "done" else event for event in read_events(run_dir)
    ]
    (run_dir / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    text = invoke("export", run_dir, tmp_path / "out", code=2).stderr
    assert "holds the weights step-000006, but the run beside it ended with step-000009" in text


def test_a_saved_program_alone_is_exported_with_what_it_tells(finished, tmp_path):
    alone = shutil.copytree(finished / "compiled", tmp_path / "alone")
    outcome = json.loads(invoke("export", alone, tmp_path / "out", "--json").stdout)
    assert outcome["out"] == str(tmp_path / "out")
    assert "model.safetensors" in outcome["files"]
    assert "saved outside of its run's directory" in (tmp_path / "out" / "README.md").read_text()
    dspy_fst.load(tmp_path / "out", Relay())


def test_the_card_of_a_run_that_changed_no_weights_says_so():
    flat = step(0, 0.0, tokens=0, rows=0)
    assert "In this run no update changed the weights: " in model_card(facts(record=record_of([plan(), flat])))
    assert "no update changed" not in model_card(facts())
