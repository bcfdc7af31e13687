"""A run of both halves on its own vLLM server, which answers 500, is killed and is stopped, each in mid-step."""

import json
import os
import signal

import pytest

from dspy_fst.config import FSTConfig
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import read_events
from dspy_fst.training.plan import Plan
from programs.lab import build
from tests.engine.server_state import group_of
from tests.engine.test_server_process import below, wait_until_gone
from tests.relay import relay
from tests.test_compile import SHORT, assert_trained_together, compile_relay

TROUBLE = """
import json
import os

class Trouble:
    '''Lets as many requests for replies pass as a file says, then refuses some or sends a process a signal.'''

    def __init__(self, app):
        self._app, self._passed, self._refusals = app, 0, 0

    async def __call__(self, scope, receive, send):
        asks = scope.get("path") in ("/v1/chat/completions", "/dspy_fst/rows") and scope["method"] == "POST"
        if not asks:
            return await self._app(scope, receive, send)
        if os.path.exists(os.environ["TROUBLE"]):
            self._passed += 1
            with open(os.environ["TROUBLE"]) as file:
                trouble = json.load(file)
            if self._passed > trouble["passed"]:
                os.unlink(os.environ["TROUBLE"])
                self._passed, self._refusals = 0, trouble["refusals"]
                if trouble["signal"]:
                    os.kill(trouble["pid"], trouble["signal"])
        if not self._refusals:
            return await self._app(scope, receive, send)
        self._refusals -= 1
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "an outage"}}'})
"""
OPTIONS = {
    "cpu_kv_cache_gib": 1,
    "max_model_len": 256,
    "stall_timeout_s": 20,
    "extra_args": ("--middleware", "dspy_fst_trouble.Trouble"),
}


class Trouble:
    """Orders the server's trouble as a step's rollouts begin. The server itself counts the calls until it is due.

    A listener that counted rollouts could act when all are through: its thread may get no core meanwhile.
    """

    def __init__(self, file):
        self.file, self.engine, self.groups = file, None, set()
        self.plan = {1: self.answer_500_a_few_times, 2: self.kill_the_core, 3: self.stop_the_api}

    def __call__(self, event):
        words = event.get("phase", "").split()
        if words[:1] == ["step"] and (step := int(words[1].rstrip(":"))) in self.plan:
            self.plan.pop(step)()

    def answer_500_a_few_times(self):
        self.note_group()
        self.order(refusals=3)

    def kill_the_core(self):
        self.note_group()
        self.order("EngineCore", signal.SIGKILL)

    def stop_the_api(self):
        self.note_group()
        self.order("api_server", signal.SIGSTOP)

    def note_group(self):
        self.groups.add(group_of(self.engine.server))

    def order(self, name=None, signal=0, refusals=0, group=None):
        """After a few requests, of up to four calls each: a signal for the process with this name, or refusals.

        The process belongs to the engine's server, or to another group.
        """
        process = below(group or group_of(self.engine.server), name) if name else None
        trouble = {"passed": 2, "pid": process and process.pid, "signal": int(signal), "refusals": refusals}
        self.file.with_suffix(".part").write_text(json.dumps(trouble))
        self.file.with_suffix(".part").rename(self.file)


def program_with(options, trouble):
    """The relay on a vLLM server with these options; the trouble is told of the engine that is trained."""
    program = relay("vllm")
    policy = policy_of(program)
    policy.handle.options.update(options)
    original = policy.fork

    def fork():
        forked = original()
        trouble.engine = forked.handle.engine
        return forked

    policy.fork = fork
    return program


@pytest.mark.vllm
def test_a_run_survives_its_server(tmp_path, monkeypatch):
    (tmp_path / "dspy_fst_trouble.py").write_text(TROUBLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TROUBLE", str(tmp_path / "trouble"))
    trouble = Trouble(tmp_path / "trouble")

    student = program_with(OPTIONS, trouble)
    compiled = compile_relay(tmp_path / "run", program=student, listeners=[trouble], num_threads=4)
    trouble.groups.add(group_of(trouble.engine.server))
    assert_trained_together(student, compiled, tmp_path / "run")
    policy_of(compiled).release()

    steps = [event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert not trouble.plan
    recovered = [{what: n for what, n in step["counts"].items() if what.startswith("engine: ")} for step in steps]
    assert recovered[0] == {}
    assert recovered[1].keys() == {"engine: asked again"}
    assert [step.get("engine: restarts", 0) for step in recovered] == [0, 0, 1, 1]
    for step in steps:
        assert not [reason for reason in step["counts"] if reason.startswith("masked")]
        assert step["counts"]["calls"] == calls_of(step["step"])  # none lost, and none kept twice
    for group in trouble.groups:
        assert wait_until_gone(group, seconds=60) == []


def calls_of(step):
    """How many calls the step's rollouts make: the relay's number of calls follows from the problem alone."""
    config = FSTConfig(**{key: value for key, value in SHORT.items() if key != "progress"})
    problems = build(train=32, val=4, test=4).trainset
    lengths = [len(problems[index].numbers.split()) for index in Plan(config, len(problems)).problems(step)]
    return config.group_size * sum(length - 3 + 1 for length in lengths)
