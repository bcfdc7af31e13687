"""`micro_batch_tokens="auto"` in a run: chosen from what is free at its start, and kept when the run goes on."""

import pytest

from dspy_fst.memory import DISK, MEMORY, Available
from dspy_fst.memory import does_it_fit as memory_plan
from dspy_fst.policy_lm import policy_of
from dspy_fst.run.directory import read_events
from dspy_fst.slow.trainer import Trainer
from tests.test_compile import compile_relay, weights_of

GIB = 2**30
ONE = {"method": "rl", "cycles": 1, "steps_per_cycle": 2}


@pytest.fixture
def built(monkeypatch):
    """The micro-batch of every trainer that is built."""
    tokens: list[int] = []
    begin = Trainer.__init__

    def noted(self, model, settings, **options):
        tokens.append(settings.micro_batch_tokens)
        begin(self, model, settings, **options)

    monkeypatch.setattr(Trainer, "__init__", noted)
    return tokens


def leave_free(monkeypatch, memory):
    monkeypatch.setattr(memory_plan, "available_now", lambda run_dir: Available({MEMORY: memory, DISK: 100 * GIB}))


def after_a_step(event):
    if event["event"] == "step":
        raise RuntimeError("the power went")


def test_a_run_that_goes_on_with_more_memory_free_keeps_its_micro_batch_and_its_bits(tmp_path, monkeypatch, built):
    leave_free(monkeypatch, 90 * 2**20)  # 22 MiB are taken for certain
    whole = compile_relay(tmp_path / "whole", **ONE)
    with pytest.raises(RuntimeError, match="the power went"):
        compile_relay(tmp_path / "run", listeners=[after_a_step], **ONE)
    assert len(read_events(tmp_path / "run")) > 1
    leave_free(monkeypatch, 100 * GIB)
    continued = compile_relay(tmp_path / "run", **ONE)
    (chosen,) = set(built)
    assert 256 <= chosen < 4096
    plan = next(event for event in read_events(tmp_path / "run") if event["event"] == "plan")
    assert plan["config"]["micro_batch_tokens"] == chosen
    one, other = weights_of(whole), weights_of(continued)
    assert all(one[name].equal(other[name]) for name in one)
    policy_of(whole).release()
    policy_of(continued).release()


def test_a_run_that_goes_on_computes_layers_again_as_it_began(tmp_path, monkeypatch):
    """Where an update would not fit otherwise; with more memory free later it stays so, and the bits are the same."""
    ways: list[object] = []
    begin = Trainer.__init__

    def noted(self, model, settings, **options):
        ways.append(settings.gradient_checkpointing)
        begin(self, model, settings, **options)

    monkeypatch.setattr(Trainer, "__init__", noted)
    recipe = {**ONE, "micro_batch_tokens": 4096}
    leave_free(monkeypatch, 140 * 2**20)
    with pytest.raises(RuntimeError, match="the power went"):
        compile_relay(tmp_path / "run", listeners=[after_a_step], **recipe)
    start = next(event for event in read_events(tmp_path / "run") if event["event"] == "plan" and "config" in event)
    assert start["config"]["gradient_checkpointing"] is True
    leave_free(monkeypatch, 100 * GIB)
    continued = compile_relay(tmp_path / "run", **recipe)
    assert ways == [True, True]
    roomy = compile_relay(tmp_path / "roomy", **recipe)
    assert ways == [True, True, False]
    one, other = weights_of(continued), weights_of(roomy)
    assert all(one[name].equal(other[name]) for name in one)
    policy_of(continued).release()
    policy_of(roomy).release()


def test_a_number_of_the_user_s_own_is_taken_as_it_is(tmp_path, monkeypatch, built):
    leave_free(monkeypatch, 100 * GIB)
    policy_of(compile_relay(tmp_path / "run", micro_batch_tokens=100, **{**ONE, "steps_per_cycle": 1})).release()
    assert built == [100]
