"""A machine that reaches no hub and no server: `check` and `doctor` ask once and say so, and cached models work."""

import json
import logging
import shutil
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import dspy
import huggingface_hub
import pytest
import yaml

from dspy_fst import FSTOptimizer, PolicyLM
from dspy_fst.errors import ConfigurationError
from dspy_fst.model_files.hub import hub_fault, in_cache
from dspy_fst.model_files.reach import IN_A_RUN_S, why_silent
from programs.lab import BASE
from tests.cli.conftest import invoke

NAME, COMMIT = "somebody/model", "0" * 40
WAIT_S = 30


@pytest.fixture
def refusing(monkeypatch):
    """An address at which nobody listens, as the hub's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    return address


@pytest.fixture
def silent(monkeypatch):
    """(address, connections so far) of one who listens and never says a word, as the hub."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            while True:
                try:
                    connections.append(server.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield address, connections
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def answering():
    """Status -> address of a server that answers with it."""
    servers = []

    def serve(status):
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of huggingface_hub's that holds nothing yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(cache, *, lacking=()):
    """Put the laboratory's model into the cache under a hub's name."""
    repository = cache / "models--somebody--model"
    shutil.copytree(BASE, repository / "snapshots" / COMMIT, ignore=shutil.ignore_patterns(*lacking))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def project(tmp_path):
    invoke("init", tmp_path / "own", "--model", NAME, "--reflection-lm", "openai/gpt-5")
    return tmp_path / "own" / "project.yaml"


def faults(project):
    return json.loads(invoke("check", project, "--json", code=2).stdout)["faults"]


def warnings(project):
    return json.loads(invoke("check", project, "--json").stdout)["warnings"]


def test_check_asks_a_hub_that_refuses_once_and_says_what_to_do(project, cache, refusing, caplog):
    with caplog.at_level(logging.INFO, logger="huggingface_hub"):
        (fault,) = faults(project)
    assert fault.startswith(f"model={NAME!r}: there is no such folder, and as a hub model it is not a model that this ")
    assert f"{refusing} cannot be reached ([Errno 111] Connection refused)" in fault
    assert f"hf download {NAME} --local-dir FOLDER" in fault
    assert "HF_ENDPOINT" in fault
    assert "Retry" not in caplog.text


def test_check_asks_a_hub_that_says_nothing_once_and_for_a_second(project, cache, silent):
    address, connections = silent
    (fault,) = faults(project)
    assert f"{address} cannot be reached (no answer within 1 s)" in fault
    assert len(connections) == 1


@pytest.fixture
def slow(monkeypatch):
    """A hub that answers after 1.5 s, as behind a proxy that looks up names first."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            time.sleep(1.5)
            with suppress(OSError):  # who asked may have gone
                self.send_response(200)
                self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def test_a_run_waits_longer_for_a_slow_hub_than_a_look(cache, slow, monkeypatch, tmp_path):
    assert "no answer within 1 s" in hub_fault(NAME)
    assert hub_fault(NAME, IN_A_RUN_S) is None
    waited = []
    monkeypatch.setattr(
        "dspy_fst.preflight.model_checks.hub_fault", lambda name, seconds: waited.append(seconds) or "refused"
    )
    student = dspy.Predict("question -> answer")
    student.lm = PolicyLM(NAME, engine="in_process", max_tokens=8)
    optimizer = FSTOptimizer(metric=lambda gold, pred, trace=None: 0.0, run_dir=tmp_path / "run", progress=False)
    with pytest.raises(ConfigurationError, match="refused"):
        optimizer.compile(student, trainset=[dspy.Example(question="1", answer="2").with_inputs("question")])
    assert waited == [10.0]


def test_a_model_in_the_cache_is_checked_without_the_hub_and_its_silence_is_told(project, cache, refusing):
    fill(cache)
    assert in_cache(NAME) == "whole"
    (warning,) = [told for told in warnings(project) if NAME in told]
    assert warning.startswith(f"model={NAME!r} is read from the cache, as {refusing} cannot be reached")
    assert "set HF_HUB_OFFLINE=1" in warning


def test_a_model_in_the_cache_is_checked_without_waiting_for_the_files_that_it_lacks(project, cache, refusing, caplog):
    fill(cache)
    with caplog.at_level(logging.INFO, logger="huggingface_hub"):
        warnings(project)
    assert "Retry" not in caplog.text


def test_whoever_said_to_be_offline_is_asked_nothing_and_told_nothing_of_it(project, cache, silent, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (fault,) = faults(project)
    assert "HF_HUB_OFFLINE is set" in fault
    fill(cache)
    assert not any(NAME in told for told in warnings(project))
    assert silent[1] == []


@pytest.mark.parametrize("lacking", ["*.safetensors", "config.json"])
def test_a_part_of_a_model_in_the_cache_is_told_as_a_part(project, cache, refusing, lacking):
    fill(cache, lacking=[lacking])
    assert in_cache(NAME) == "in part"
    (fault,) = faults(project)
    assert "the cache holds a part of it only" in fault


def test_an_index_whose_files_are_not_all_there_is_a_part(cache):
    fill(cache, lacking=["*.safetensors"])
    folder = cache / "models--somebody--model" / "snapshots" / COMMIT
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    (folder / "one.safetensors").touch()
    assert in_cache(NAME) == "in part"
    (folder / "two.safetensors").touch()
    assert in_cache(NAME) == "whole"
    index.write_text("[]")
    assert in_cache(NAME) == "whole", "what an index says wrong is told by whoever reads the weights"


def test_a_name_that_no_hub_could_have_is_left_to_the_library_s_words(cache):
    assert in_cache("not a name") == "not"


@pytest.mark.parametrize(("status", "silence"), [(200, None), (401, None), (404, None), (503, "it answers 503")])
def test_whatever_answers_is_reached_but_for_a_proxy_with_nobody_behind(answering, status, silence):
    assert why_silent(answering(status)) == silence


def test_an_address_that_is_none_is_silent_too():
    assert "protocol" in why_silent("nowhere")


def test_doctor_says_whether_the_hub_answers_and_what_works_without(refusing, answering, monkeypatch):
    def finding():
        told = json.loads(invoke("doctor", "--json").stdout)
        return next(found for found in told["findings"] if found["about"] == "model hub")

    offline = finding()
    assert offline["state"] == "warning"
    assert offline["found"].startswith(f"{refusing} cannot be reached")
    for words in (huggingface_hub.constants.HF_HUB_CACHE, "hf download NAME", "--example lab", "HF_ENDPOINT"):
        assert words in offline["advice"]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", answering(200))
    assert finding()["state"] == "ok"


def test_a_reflection_server_that_nobody_started_is_told(tmp_path, refusing, answering):
    def told(address):
        path = tmp_path / "own" / "project.yaml"
        lm = {"model": "openai/mine", "api_base": address}
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "reflection_lm": lm, "propose": None}))
        return json.loads(invoke("check", path, "--json").stdout)["unreached"]

    invoke("init", tmp_path / "own", "--model", BASE)
    (line,) = told(f"{refusing}/v1")
    assert f"reflection_lm='openai/mine': {refusing}/v1 cannot be reached" in line
    assert "start the server, or correct api_base" in line
    assert f"Cannot be reached from here\n- {line}" in invoke("check", tmp_path / "own" / "project.yaml").stdout
    assert told(f"{answering(404)}/v1") == []
