"""vLLM's own sleep mode on a card. Written without one, and never run: vLLM refuses sleep mode on a CPU."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.machine import free_gpu_bytes
from dspy_fst.engine.verification import verify_tensors
from dspy_fst.engine.vllm.supervisor import Supervisor
from tests.engine.test_vllm_lora import HOPS, Versions
from tests.engine.tiny_qwen import make_model, save, small

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: sleep mode is untried"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
TEXTS = [[2, 30, 31, 32, 33], [5, 6, 7, 8, 9, 10, 11]]
SHARE = 0.3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[int], Supervisor]]:
    engines: list[Supervisor] = []

    def make(level: int) -> Supervisor:
        settings = replace(
            small(tmp_path / "vllm.log"), sleep_level=level, max_model_len=512, gpu_memory_utilization=SHARE
        )
        engines.append(Supervisor(settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def publish(engine: Supervisor, checkpoint: Checkpoint) -> None:
    engine.on_recovery(pytest.fail, lambda scorer: verify_tensors(scorer, checkpoint) and None)
    engine.load(checkpoint)


def freed_by_a_sleep(engine: Supervisor) -> float:
    """Share of the card that is free while the server sleeps, and is not while it is awake."""
    awake = free_gpu_bytes()
    with engine.asleep():
        asleep = free_gpu_bytes()
    again = free_gpu_bytes()
    assert awake is not None
    assert asleep is not None
    assert again is not None
    assert abs(again[0] - awake[0]) < 0.02 * awake[1], "it takes as much again"
    return (asleep[0] - awake[0]) / awake[1]


def alike(scores: list[list[float]]) -> list[object]:
    """The same weights' log-probabilities, however the kernels add up."""
    return [pytest.approx(row, abs=0.05) for row in scores]


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleep_frees_the_server_s_share_and_leaves_its_weights_right(server, tmp_path, level):
    engine = server(level)
    first, second = (save(make_model(seed), tmp_path, f"step-{seed:06d}") for seed in range(2))
    publish(engine, first)
    before = engine.score(TEXTS)
    assert freed_by_a_sleep(engine) > 0.8 * SHARE
    assert engine.score(TEXTS) == alike(before), "the same weights, verified before this call"
    assert freed_by_a_sleep(engine) > 0.8 * SHARE
    publish(engine, second)
    assert engine.score(TEXTS) != alike(before)
    assert engine.take_counts() == {}


def test_lora_adapters_and_their_base_are_right_after_a_sleep(server, tmp_path):
    versions = Versions(tmp_path)
    engine = server(1)
    publish(engine, versions.make("step-000000"))
    before = engine.score(TEXTS, HOPS)
    assert freed_by_a_sleep(engine) > 0.8 * SHARE
    assert engine.score(TEXTS, HOPS) == alike(before)
    freed_by_a_sleep(engine)
    publish(engine, versions.make("step-000001"))
    assert engine.score(TEXTS, HOPS) != alike(before)
    assert engine.take_counts() == {}
