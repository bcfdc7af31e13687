"""LoRA adapters of several predictors on a vLLM server that `dspy-fst serve` started: served, then trained.

One server is started for this file; its last test kills the command.
"""

import os

import pytest

import dspy_fst
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import read_events
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from tests.engine.test_server_process import below, wait_until_gone
from tests.lora_program import two_adapters
from tests.relay import relay
from tests.serve.command import serving
from tests.serve.test_lora_models import SIGNATURE, check
from tests.test_compile import compile_relay, speaks
from tests.test_lora_runs import ADAPTER, RATE, SEQUENCES

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """What is served. Its version is none that the run here publishes: one name is one adapter on a server."""
    program = two_adapters(tmp_path_factory.mktemp("weights"), name="step-000099")
    yield program
    policy_of(program).release()


@pytest.fixture(scope="module")
def command(program, tmp_path_factory):
    saved = dspy_fst.save(program, tmp_path_factory.mktemp("lora") / "saved")
    with serving(saved, "--program", "tests.relay:Relay", "--engine", "vllm", "--signature", SIGNATURE) as server:
        server.wait_for(server.ready, "it is ready", limit_s=500)
        yield server


def test_behind_vllm_every_predictor_and_every_model_has_its_own_adapter(command, program):
    check(command.url, command.auth, program)


def test_two_adapters_are_trained_on_a_vllm_server(command, tmp_path):
    student = relay("vllm")
    policy_of(student).handle.options.update(command.vllm)
    apart = {**RATE, "cycles": 1, "steps_per_cycle": 3, "adapters": "per_predictor"}
    compiled = compile_relay(tmp_path / "run", program=student, **apart)
    try:
        steps = [event["report"] for event in read_events(tmp_path / "run") if event["event"] == "step"]
        assert len(steps) == 3
        for step in steps:  # every token was sampled through the adapter under which the trainer scores it
            assert step["update"]["max_log_ratio"] < 1e-4
            assert min(step["predictors"][name]["rows"] for name in ("first", "last")) > 0
        assert speaks(compiled)
        checkpoint, engine = policy_of(compiled).checkpoint, policy_of(compiled).handle.ready()
        trainer = Trainer(
            checkpoint.folder, TrainingSettings(adapter=ADAPTER), device="cpu", adapters=checkpoint.predictors
        )
        for name in ("for-first", "for-last"):
            for ours, its in zip(trainer.score(SEQUENCES, name), engine.score(SEQUENCES, name), strict=True):
                assert its == pytest.approx(ours, abs=1e-4)
    finally:
        policy_of(compiled).release()


def test_sigkill_of_the_owner_takes_vllm_and_its_engine_core_along(command):
    """Last of the file: the server that the tests before asked is gone."""
    core = below(command.process.pid, "EngineCore")
    assert core is not None
    group = os.getpgid(core.pid)
    command.process.kill()
    assert wait_until_gone(group, seconds=60) == []
