"""The KL's reference under a bfloat16 body: its linear layers take half the memory, and no bit of the KL changes."""

import random

import pytest
import torch
from torch import nn

from benchmarks.families import FAMILIES
from dspy_fst.slow.batching import Scored, micro_batches
from dspy_fst.slow.credit import credit
from dspy_fst.slow.model import Policy
from dspy_fst.types import Group
from tests.slow.makers import make_rollout
from tests.slow.test_trainer import draw_call, make_trainer

TEXTS = [(tuple(range(3, 40)), 4), (tuple(range(3, 30)), 20), (tuple(range(9, 60)), 5)]


def in_float32(monkeypatch) -> None:
    """The reference as it was: every number of it in float32."""
    monkeypatch.setattr(Policy, "_store_linear_layers", lambda self, dtype: None)


def size(policy: Policy) -> int:
    return sum(parameter.nbytes for parameter in policy.parameters())


@torch.no_grad()
def logits(policy: Policy) -> torch.Tensor:
    (batch,) = micro_batches([Scored(ids, start) for ids, start in TEXTS], 1000, share=policy.shares_prompts)
    return policy.logits(batch)


@pytest.mark.parametrize("name", ["Qwen3", "Gemma 2", "GPT-2", "Qwen3-MoE", "Granite 4 (hybrid)"])
def test_a_frozen_model_has_the_same_logits_with_linear_layers_of_half_the_size(name, tmp_path, monkeypatch):
    folder = next(family for family in FAMILIES if family.name == name).save(tmp_path / "model")
    held = Policy.load(folder, dtype=torch.bfloat16, trainable=False)
    linear = [module for module in held.model.modules() if isinstance(module, nn.Linear)]
    low = [module for module in linear if module.weight.dtype == torch.bfloat16]
    assert name == "GPT-2" or len(low) == len(linear) - 1
    assert held.model.get_output_embeddings().weight.dtype == torch.float32
    assert held.model.get_input_embeddings().weight.dtype == torch.float32
    in_float32(monkeypatch)
    whole = Policy.load(folder, dtype=torch.bfloat16, trainable=False)
    assert all(parameter.dtype == torch.float32 for parameter in whole.parameters())
    assert torch.equal(logits(held), logits(whole))
    assert size(held) < size(whole)


def test_updates_and_kl_under_a_bfloat16_body_keep_their_bits(start, monkeypatch):
    draw = random.Random(5)
    calls = [draw_call(draw) for _ in range(4)]
    rollouts = [make_rollout(reward, call) for reward, call in zip((1, 0, 0.2, 1), calls, strict=True)]
    batch = credit([Group(0, tuple(rollouts))])
    seen = []
    for keep in (lambda: None, lambda: in_float32(monkeypatch)):
        keep()
        trainer = make_trainer(start, precision="bfloat16")
        reports = [trainer.step(batch) for _ in range(3)]
        seen.append((reports, trainer.kl_by_call(calls), [p.detach().clone() for p in trainer.parameters.values()]))
    assert seen[0][:2] == seen[1][:2]
    assert seen[0][0][-1].kl_to_start > 0
    assert all(torch.equal(one, other) for one, other in zip(seen[0][2], seen[1][2], strict=True))


def test_a_reference_in_float32_stays_whole(start):
    policy = Policy.load(start, dtype=torch.float32, trainable=False)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
