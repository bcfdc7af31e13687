"""vLLM's weight transfer over NCCL and CUDA IPC, on cards. Written without one, and never run."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest
import torch

from dspy_fst.engine.vllm.supervisor import Supervisor
from tests.engine.test_sleep_mode_on_gpu import SHARE, TEXTS, alike, publish
from tests.engine.tiny_qwen import make_model, save, small

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.mark.parametrize(("way", "cards"), [("ipc", 1), ("nccl", 2)])
def test_weights_are_sent_and_verified(way: Literal["ipc", "nccl"], cards: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < cards:
        pytest.skip(f"fewer than {cards} CUDA devices here: weight_transfer={way!r} is untried")
    settings = replace(small(tmp_path / "vllm.log"), max_model_len=512, gpu_memory_utilization=SHARE)
    engine = Supervisor(replace(settings, weight_transfer=way, cards=(1,) if way == "nccl" else None))
    first, second = (save(make_model(seed), tmp_path, f"step-{seed:06d}") for seed in range(2))
    try:
        publish(engine, first)
        before = engine.score(TEXTS)
        publish(engine, second)
        assert engine.score(TEXTS) != alike(before)
        publish(engine, first)
        assert engine.score(TEXTS) == alike(before)
        assert engine.take_counts() == {}
    finally:
        engine.close()
