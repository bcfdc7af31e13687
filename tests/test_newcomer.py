"""The newcomer's path, in a shell as the README has it: from an empty folder to answers over HTTP."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

COMMAND = str(Path(sys.executable).parent / "dspy-fst")
ROOT = Path(__file__).parent.parent
WAIT_S = 240
PATH = """
init trial --example lab
check trial/project.yaml
run trial/project.yaml
show trial/run
eval trial/run --two-by-two --k 2 --limit 32
report trial/run --out trial/report.html
export trial/run trial/exported
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each command wrote to stdout, by its name."""
    folder = tmp_path_factory.mktemp("newcomer")
    outputs = {"folder": folder}
    for line in PATH.strip().splitlines():
        done = subprocess.run(
            [COMMAND, *line.split()], cwd=folder, capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert done.returncode == 0, f"dspy-fst {line}: {done.stderr[-3000:]}"
        outputs[line.split()[0]] = done.stdout
    return outputs


@pytest.fixture(scope="module")
def server(said):
    """(address, key) of `dspy-fst serve trial/run`; it must end well."""
    process = subprocess.Popen(
        [COMMAND, "serve", "trial/run", "--port", "0"], cwd=said["folder"], stderr=subprocess.PIPE, text=True
    )
    killer = threading.Timer(WAIT_S, process.kill)
    killer.start()
    told, key, address = [], None, None
    for line in process.stderr:
        told.append(line)
        if line.startswith("serving "):
            address = line.split(" at ")[1].split("/v1/")[0]
        if line.startswith("key: "):
            key = line.removeprefix("key: ").strip()
        if key and address:
            break
    assert key, "".join(told)
    threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
    ready = httpx.Client(transport=httpx.HTTPTransport(retries=5))
    while ready.get(f"{address}/ready", timeout=WAIT_S).status_code != 200:
        assert process.poll() is None, "".join(told)
    yield address, key
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    killer.cancel()


@pytest.mark.slow
def test_each_command_of_the_readme_s_path_works_and_says_what_it_did(said):
    readme = (ROOT / "README.md").read_text()
    for line in PATH.strip().splitlines():
        assert f"dspy-fst {line.partition(' --k')[0]}" in readme
    assert "Plan, at most" in said["check"]
    assert "the compiled program is in" in said["run"]
    assert "finished; 6 of 6 steps" in said["show"]
    assert "evolved instructions, trained weights" in said["eval"]
    page = (said["folder"] / "trial" / "report.html").read_text()
    assert "<html" in page
    assert "model.safetensors" in said["export"]


@pytest.mark.slow
def test_training_helped_the_newcomer_s_program(said):
    (line,) = (said["folder"] / "trial" / "run" / "evaluations.jsonl").read_text().splitlines()
    means = {cell: mean for cell, (mean, _) in json.loads(line)["cells"].items()}
    assert means["evolved/trained"] > means["seed/base"] + 0.3


@pytest.mark.slow
def test_curl_gets_an_answer_with_the_key_and_a_refusal_without(server):
    address, key = server

    def asked(*headers):
        words = [
            "curl",
            "-s",
            "-w",
            "\n%{http_code}",
            f"{address}/v1/program",
            "-d",
            '{"inputs": {"numbers": "1 2 3 4"}}',
        ]
        for header in ("Content-Type: application/json", *headers):
            words += ["-H", header]
        done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S, check=True)
        *body, status = done.stdout.splitlines()
        return int(status), json.loads("\n".join(body))

    status, answer = asked(f"Authorization: Bearer {key}")
    assert status == 200
    assert answer["outputs"]["answer"]
    assert asked()[0] == 401


@pytest.mark.slow
def test_the_openai_client_speaks_with_the_trained_model(server):
    address, key = server
    client = OpenAI(base_url=f"{address}/v1", api_key=key, timeout=WAIT_S)
    reply = client.chat.completions.create(
        model="policy", messages=[{"role": "user", "content": "Reverse the list."}], max_tokens=8
    )
    assert reply.choices[0].message.content is not None
    assert reply.usage.completion_tokens > 0
