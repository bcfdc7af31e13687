"""Layers that are computed again in the backward pass have the gradient of layers that are kept, bit for bit."""

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from benchmarks.architectures import TEXTS
from benchmarks.families import FAMILIES
from dspy_fst.errors import TrainingError
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.slow.batching import completions, micro_batches
from dspy_fst.slow.credit import credit
from dspy_fst.slow.head import learn
from dspy_fst.slow.layers import recompute_layers
from dspy_fst.slow.model import Policy
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Group, SeedKLCall
from tests.slow.makers import make_rollout, save_model
from tests.slow.test_trainer import draw_call, recorded_gradients

BY_NAME = {family.name: family for family in FAMILIES}
SETTINGS = {
    "learning_rate": 1e-2,
    "kl_coefficient": 0.1,
    "seed_kl_coefficient": 0.2,
    "micro_batch_tokens": 80,
    "min_effective_share": 0.0,
}
WAYS = {
    "shared prompts": {},
    "alone": {},
    "bfloat16": {"precision": "bfloat16"},
    "LoRA": {"adapter": LoRA(rank=4)},
    "LoRA in bfloat16": {"adapter": LoRA(rank=4), "precision": "bfloat16"},
}


@pytest.fixture
def batch():
    draw = random.Random(2)
    groups = [Group(p, tuple(make_rollout(r, draw_call(draw), problem=p) for r in (1.0, 0.0, 0.4))) for p in range(3)]
    calls = [draw_call(draw) for _ in range(3)]
    held = tuple(SeedKLCall(call, (5, *call.prompt_ids)) for call in calls)
    return dataclasses.replace(credit(groups), seed_kl_calls=held)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_update_whose_layers_are_computed_again_is_the_same_bit_for_bit(tied, way, tmp_path, batch):
    start, reference = (save_model(tmp_path / str(seed), tied=tied, seed=seed) for seed in (0, 9))
    seen = []
    for again in (False, True):
        trainer = Trainer(
            start,
            TrainingSettings(**(SETTINGS | WAYS[way]), gradient_checkpointing=again),
            device="cpu",
            reference=reference,
            share_prompts=way != "alone",
        )
        reports = []
        for _ in range(2):  # an adapter's first gradient is zero in one of its halves
            with recorded_gradients(trainer) as gradients:
                reports.append(trainer.step(batch))
        assert gradients
        seen.append((gradients, reports))
    (kept, kept_reports), (again, reports) = seen
    assert reports == kept_reports
    assert kept.keys() == again.keys()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []


def test_each_layer_is_computed_twice_for_a_gradient_and_once_without(start, batch):
    trainer = Trainer(start, TrainingSettings(**SETTINGS, gradient_checkpointing=True), device="cpu")
    layer, computed = trainer._policy.model.model.layers[1], []
    layer.mlp.register_forward_pre_hook(lambda *_: computed.append(torch.is_grad_enabled()))
    trainer.score([[1, 2, 3, 4]])
    assert computed == [False]
    computed.clear()
    trainer.step(dataclasses.replace(batch, seed_kl_calls=()))
    passes = len(list(trainer._micro_batches(completions(batch.rows))))
    assert computed == [True] * 2 * passes


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_a_family_s_gradient_is_the_same_bit_for_bit(name, tmp_path):
    found = []
    for again in (False, True):
        policy = Policy.load(BY_NAME[name].save(tmp_path / str(again)), dtype=torch.float32)
        if again:
            policy.recompute_layers()
        found.append(_gradient(policy))
    kept, again = found
    assert kept.keys() == again.keys()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []


def _gradient(policy: Policy) -> dict[str, Tensor]:
    for share in {False, policy.shares_prompts}:
        for micro in micro_batches(TEXTS, 40, share=share):
            learn(policy.readout(micro), micro, lambda logprobs, _, part: logprobs.sum())
    return {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}


def test_layers_that_cannot_be_computed_again_are_refused():
    with pytest.raises(TrainingError, match="Linear has no layers that can be computed again"):
        recompute_layers(torch.nn.Linear(2, 2), lambda: None)
