"""A run of both halves on its own vLLM server, which answers 500, is killed and is stopped, each in mid-step."""

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

OUTAGE = """
import os

class Outage:
    '''Answers 500 to as many chat completions as a file says, then removes it.'''

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope.get("path") != "/v1/chat/completions" or not os.path.exists(os.environ["OUTAGE_FLAG"]):
            return await self._app(scope, receive, send)
        with open(os.environ["OUTAGE_FLAG"]) as file:
            left = int(file.read()) - 1
        if left:
            with open(os.environ["OUTAGE_FLAG"], "w") as file:
                file.write(str(left))
        else:
            os.unlink(os.environ["OUTAGE_FLAG"])
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "an outage"}}'})
"""
OPTIONS = {
    "cpu_kv_cache_gib": 1,
    "max_model_len": 256,
    "stall_timeout_s": 20,
    "extra_args": ("--middleware", "dspy_fst_outage.Outage"),
}


class Trouble:
    """Does something to the server once a few rollouts of a step are through and the others are under way."""

    def __init__(self, flag):
        self.flag, self.engine, self.groups = flag, None, set()
        self.plan = {1: self.answer_500_a_few_times, 2: self.kill_the_core, 3: self.stop_the_api}
        self.step, self.played = -1, 0

    def __call__(self, event):
        if event["event"] == "phase":
            words = event["phase"].split()
            self.step, self.played = (int(words[1].rstrip(":")) if words[0] == "step" else -1), 0
        if event["event"] == "rollout":
            self.played += 1
            if self.played == 3 and self.step in self.plan:
                self.groups.add(group_of(self.engine.server))
                self.plan.pop(self.step)()

    def answer_500_a_few_times(self):
        self.flag.write_text("3")

    def kill_the_core(self):
        self.process("EngineCore").send_signal(signal.SIGKILL)

    def stop_the_api(self):
        self.process("api_server").send_signal(signal.SIGSTOP)

    def process(self, name):
        """The server's process whose command line contains this."""
        return below(group_of(self.engine.server), name)


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
    (tmp_path / "dspy_fst_outage.py").write_text(OUTAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("OUTAGE_FLAG", str(tmp_path / "outage"))
    trouble = Trouble(tmp_path / "outage")

    student = program_with(OPTIONS, trouble)
    compiled = compile_relay(tmp_path / "run", program=student, listeners=[trouble], num_threads=4)
    trouble.groups.add(group_of(trouble.engine.server))
    assert_trained_together(student, compiled, tmp_path / "run")
    policy_of(compiled).release()

    steps = [event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
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
