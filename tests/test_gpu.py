"""The same promises on a GPU: bfloat16 bodies, float32 logits. Skipped where there is none."""

import pytest
import torch

from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.verification import Expected, verify
from dspy_fst.rollout.call_recorder import Recording
from dspy_fst.slow.trainer import Trainer, TrainerSettings
from programs.lab import BASE
from programs.lab.demo import run
from tests.engine.test_contract import request_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: the GPU paths are untried"),
]
SEQUENCES = [[2, 30, 31, 32, 33], [5, 6, 7, 8, 9, 10, 11]]


def test_the_trainer_computes_in_bfloat16_and_keeps_float32_parameters():
    trainer = Trainer(BASE, TrainerSettings(learning_rate=1e-4))
    assert trainer.dtype == "bfloat16"
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}


def test_the_engine_serves_what_the_trainer_publishes(tmp_path):
    trainer = Trainer(BASE, TrainerSettings(learning_rate=1e-4))
    engine = InProcessEngine()
    checkpoint = trainer.publish(tmp_path / "v0", "v0")
    engine.load(checkpoint)
    assert verify(engine, Expected(checkpoint, SEQUENCES, trainer.score(SEQUENCES), trainer.dtype)).identical
    completion = engine.complete(request_of("1 2 3 4"), seed=Recording(0).seed)
    assert completion.completion_ids
    engine.close()


@pytest.mark.parametrize("engine", ["in_process", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_the_demo_s_joint_cell_is_best(engine, tmp_path):
    cells = run("reverse_drop", engine, 0, tmp_path / "run")["cells"]
    scores = [cell["mean_at_k"] for cell in cells.values()]
    assert scores[-1] == max(scores)
