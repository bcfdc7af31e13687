"""Two real vLLM servers that somebody else launched, as one engine: their prefix caches, and a run that they fail."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.machine import free_port
from dspy_fst.engine.verification import verify_tensors
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.client import VLLMClient
from dspy_fst.engine.vllm.fleet.affinity import Routes
from dspy_fst.engine.vllm.fleet.fleet import Fleet
from dspy_fst.engine.vllm.launch import vllm_command, vllm_environment
from dspy_fst.engine.vllm.process import ServerProcess
from dspy_fst.engine.vllm.server import _answers
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.policy_lm import PolicyLM, policy_of
from dspy_fst.run.directory import read_events
from dspy_fst.training.attached import attached_server_faults
from programs.lab import BASE
from tests.engine.test_contract import request_of
from tests.engine.test_server_process import below
from tests.test_compile import assert_trained_together, compile_relay
from tests.test_survival import TROUBLE, Trouble, calls_of, program_with

pytestmark = pytest.mark.vllm
KEY = "a-key-of-both"
SETTINGS = VLLMSettings(
    max_model_len=1024,
    cpu_kv_cache_gib=1,
    extra_args=("--middleware", "dspy_fst_trouble.Trouble", "--block-size", "32"),
)
BLOCK, STALL_S, BOOT_S = 32, 10, 400


class Launched:
    """A server, and the file in which its trouble is ordered."""

    def __init__(self, folder: Path, number: int):
        self.trouble, self._log = folder / f"trouble-{number}", folder / f"log-{number}"
        self._port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        environment = vllm_environment(SETTINGS, KEY) | {"TROUBLE": str(self.trouble)}
        environment["PYTHONPATH"] += os.pathsep + str(self.trouble.parent)
        command = vllm_command(SETTINGS, BASE, self._port)
        self.process = ServerProcess(command, environment, log_path=self._log, grace_s=10)

    def wait(self) -> None:
        """Until it answers."""
        client = VLLMClient(Address(self.url, KEY, False), request_timeout_s=60, load_timeout_s=60)
        deadline = time.monotonic() + BOOT_S
        while not _answers(client):
            assert not self.process.exits_within(0.5), self.process.output()[-5:]
            assert time.monotonic() < deadline, self.process.output()[-5:]
        client.close()

    def caches(self) -> tuple[float, float]:
        """Tokens of prompts that its prefix cache was asked for, and those that it had."""
        figures = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}, trust_env=False)
        names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
        found = [[line for line in figures.text.splitlines() if line.startswith(name)] for name in names]
        return tuple(sum(float(line.split()[-1]) for line in lines) for lines in found)  # type: ignore[return-value]

    def signal(self, number: int) -> None:
        below(self.process.group, "api_server").send_signal(number)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[list[Launched]]:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "dspy_fst_trouble.py").write_text(TROUBLE)
    servers = [Launched(folder, number) for number in (1, 2)]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.process.stop()


def options_of(pair: list[Launched]) -> dict[str, object]:
    urls = tuple(server.url for server in pair)
    return {"attach_url": urls, "api_key": KEY, "max_model_len": 1024, "stall_timeout_s": STALL_S}


def test_a_group_s_prompt_is_read_by_one_server(pair, monkeypatch):
    fleet = Fleet(VLLMSettings(**options_of(pair)))
    fleet.load(Checkpoint("v0", BASE))

    def shares(first: int) -> list[float]:
        """What share of the prompts' whole blocks each server's cache had, for four groups of four calls."""
        before, blocks = [server.caches() for server in pair], 0
        for problem in range(first, first + 4):
            numbers = " ".join(str((problem * 7 + place) % 10) for place in range(200))
            for seed in range(4):
                reply = fleet.complete(request_of(f"{problem} {numbers}", max_tokens=2), seed)
                blocks += (len(reply.prompt_ids) - 1) // BLOCK * BLOCK
        gained = [server.caches()[1] - old[1] for server, old in zip(pair, before, strict=True)]
        assert all(gained)  # both servers were given some
        return [sum(gained) / blocks]

    with_affinity = shares(0)
    monkeypatch.setattr(Routes, "_reader", lambda *_: None)
    without = shares(10)
    fleet.close()
    assert 0.75 <= with_affinity[0] < 0.85, (with_affinity, without)  # one of four calls reads the prompt
    assert 0.5 <= without[0] < 0.6, (with_affinity, without)  # two of four


class PausedThenKilled(Trouble):
    """Pauses the second server in mid-step, lets it go on a step later, and then kills the first one in mid-step."""

    def __init__(self, pair: list[Launched]):
        self.pair, self.engine, self.groups = pair, None, set()
        self.plan = {1: self.pause, 2: self.go_on, 3: self.kill}

    def pause(self):
        self.order_for(1, signal.SIGSTOP)

    def go_on(self):
        self.pair[1].signal(signal.SIGCONT)

    def kill(self):
        changed, member = self.engine._changed, self.engine.members[1]
        with changed:
            assert changed.wait_for(lambda: member.state == "up", 120), member.why
        self.order_for(0, signal.SIGKILL)

    def order_for(self, number, signal_number):
        self.file = self.pair[number].trouble
        super().order("api_server", signal_number, group=self.pair[number].process.group)


def test_a_run_survives_a_server_that_hangs_and_one_that_dies(pair, tmp_path):
    trouble = PausedThenKilled(pair)
    student = program_with(options_of(pair), trouble)
    compiled = compile_relay(tmp_path / "run", program=student, listeners=[trouble], num_threads=8)
    assert_trained_together(student, compiled, tmp_path / "run")
    policy_of(compiled).release()

    events = list(read_events(tmp_path / "run"))
    steps = [event["report"] for event in events if event["event"] == "step"]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert not trouble.plan
    assert [step["counts"].get("engine: servers lost", 0) for step in steps] == [0, 1, 0, 1]
    assert [step["counts"].get("engine: asked elsewhere", 0) > 0 for step in steps] == [False, True, False, True]
    for step in steps:
        assert not [reason for reason in step["counts"] if reason.startswith("masked")]
        assert step["counts"]["calls"] == calls_of(step["step"])  # none lost, and none kept twice


def test_a_server_that_was_started_anew_between_two_calls_answers_with_the_weights_it_was_given(pair, tmp_path):
    server = pair[1]
    options = {**options_of(pair), "attach_url": server.url}
    policy = PolicyLM(BASE, engine="vllm", engine_options=options)
    assert attached_server_faults(policy, tmp_path) == []
    moved = Checkpoint("step-000001", shutil.copytree(BASE, tmp_path / "moved"))
    tensors = load_file(moved.path / "model.safetensors")
    tensors["model.norm.weight"] *= 0.5
    save_file(tensors, moved.path / "model.safetensors", metadata={"format": "pt"})

    engine = Supervisor(VLLMSettings(**options))
    engine.on_recovery(print, lambda scorer: verify_tensors(scorer, moved))
    engine.load(moved)
    before = engine.complete(request_of("1 2 3", max_tokens=8), 1)
    server.process.stop()
    server.start()
    server.wait()
    after = engine.complete(request_of("1 2 3", max_tokens=8), 1)
    assert engine.take_counts()["restarts"] == 1
    assert after.logprobs == pytest.approx(before.logprobs, abs=1e-5)
    engine.on_recovery(print, None)
    engine.load(Checkpoint("step-000000", BASE))
    assert engine.complete(request_of("1 2 3", max_tokens=8), 1).logprobs != pytest.approx(before.logprobs, abs=0.01)
    engine.close()
