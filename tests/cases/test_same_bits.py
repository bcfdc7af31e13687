"""An update is the same bit for bit each time, also on several threads: a continued run equals an undisturbed one."""

from collections.abc import Iterator

import pytest
import torch

from dspy_fst.run.files import sha256_of
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Row
from programs.lab import BASE

PROMPT = tuple(3 + n % 90 for n in range(400))
REPEATS = 12


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_gradient_of_a_prompt_that_several_rows_share_has_the_same_bits_each_time(two_threads, tmp_path):
    rows = tuple(
        Row(PROMPT, (5 + n, 7, 9 + n), (-4.0, -4.0, -4.0), (-1.0) ** n, 1 / 48, predictor="ask", problem=0)
        for n in range(16)
    )
    batch = Batch(rows=rows, weights="base", counts={}, predictors={})
    left = set()
    for index in range(REPEATS):
        trainer = Trainer(
            BASE, TrainingSettings(learning_rate=1e-3, kl_coefficient=0.0, min_effective_share=0.0), device="cpu"
        )
        trainer.step(batch)
        trainer.save_state(tmp_path / str(index))  # weights, and AdamW's moments, which are the gradient's
        left.add(tuple(sha256_of(path) for path in sorted((tmp_path / str(index)).glob("*.safetensors"))))
    assert len(left) == 1
