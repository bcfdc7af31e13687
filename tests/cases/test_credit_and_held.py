"""The batch's standard deviation by hand, and how much a model reads at once for the seed term."""

import numpy as np
import pytest
import torch

from dspy_fst.slow.credit import credit
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Batch, Group, SeedKLCall
from tests.slow.conftest import one_thread, start  # noqa: F401
from tests.slow.makers import VOCABULARY, make_call, make_group, make_rollout, save_model
from tests.slow.test_trainer import assert_close, mean_kl_gradient, recorded_gradients

BUDGET = 64


def untrained_group(*rewards: float, problem: int) -> Group:
    """A live group whose runs made no call that is trained: another predictor's, a greedy one, none at all."""
    calls = [make_call(predictor="frozen"), make_call(temperature=0.0), make_call(completion=[])]
    rollouts = [make_rollout(reward, calls[i % 3], problem=problem) for i, reward in enumerate(rewards)]
    return Group(problem, tuple(rollouts))


def test_a_live_group_without_a_trained_call_is_in_no_standard_deviation():
    """Centred rewards +-0.5 of the trained group: std 0.5, so advantages +-1. With the other's +-5 it was 3.55."""
    groups = [make_group(1.0, 0.0), untrained_group(10.0, 0.0, problem=1)]
    batch = credit(groups, normalize="batch", trained={"answer"}, epsilon=0.0)
    assert [row.advantage for row in batch.rows] == pytest.approx([1.0, -1.0])
    assert (batch.counts["live_groups"], batch.counts["rows"]) == (2, 2)


def test_two_trained_groups_share_one_standard_deviation_whatever_a_third_did():
    groups = [make_group(1.0, 0.0), make_group(4.0, 0.0, problem=1), untrained_group(0.0, 100.0, 0.0, problem=2)]
    batch = credit(groups, normalize="batch", trained={"answer"}, epsilon=0.0)
    scale = np.std([0.5, -0.5, 2.0, -2.0])
    assert [row.advantage for row in batch.rows] == pytest.approx([0.5 / scale, -0.5 / scale, 2 / scale, -2 / scale])


@pytest.mark.parametrize("longest", [50, 100])
def test_the_start_reads_no_more_at_once_than_the_budget(start, tmp_path, longest):  # noqa: F811
    """Short prompts of its own and long ones of a teacher; a sequence above the budget stands alone."""
    reference = save_model(tmp_path / "reference", seed=5)
    draw = np.random.default_rng(0)
    calls = tuple(
        make_call(draw.integers(VOCABULARY, size=2).tolist(), draw.integers(VOCABULARY, size=3).tolist(), temperature=t)
        for t in (1.0, 0.7) * 6
    )
    prompts = [tuple(draw.integers(VOCABULARY, size=longest - 7 * (i % 3)).tolist()) for i in range(len(calls))]
    settings = TrainingSettings(
        learning_rate=1e-2, kl_coefficient=0.1, seed_kl_coefficient=1.0, micro_batch_tokens=BUDGET
    )
    trainer = Trainer(start, settings, device="cpu", reference=reference, share_prompts=False)
    held = tuple(SeedKLCall(call, prompt) for call, prompt in zip(calls, prompts, strict=True))
    reads = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: reads.append(given[0].shape) if isinstance(module, torch.nn.Embedding) else None
    )
    try:
        with recorded_gradients(trainer) as found:
            trainer.step(Batch(rows=(), weights="step-000000", seed_kl_calls=held))
    finally:
        hook.remove()
    reads = [shape for shape in reads if shape[-1] > 6 or shape.numel() > 24]  # without the probes of loading
    assert reads
    assert all(shape.numel() <= BUDGET or shape[0] == 1 for shape in reads), reads
    wanted, _ = mean_kl_gradient(start, reference, calls, prompts)
    assert_close(found, wanted)
