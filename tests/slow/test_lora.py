"""A LoRA adapter in place of the whole weights: its gradient, its reference, its files, and what it leaves alone."""

import random

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from dspy_fst.engine import lora
from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import TrainingError
from dspy_fst.recipe.lora_settings import LoRA
from dspy_fst.slow.credit import credit
from dspy_fst.slow.model import Policy
from dspy_fst.types import Batch, Group, SeedKLCall
from tests.slow.makers import VOCABULARY, make_rollout, make_tokenizer
from tests.slow.test_trainer import assert_close, draw_call, make_trainer, recorded_gradients

SMALL = LoRA(rank=4, alpha=8.0)


def batch_of(seed: int) -> Batch:
    draw = random.Random(seed)
    rewards = ((1.0, 0.0, 0.25), (0.0, 1.0))
    groups = [
        Group(p, tuple(make_rollout(r, *(draw_call(draw) for _ in range(2)), problem=p) for r in group))
        for p, group in enumerate(rewards)
    ]
    return credit(groups)


@pytest.fixture
def batch() -> Batch:
    return batch_of(3)


def calls_of(seed: int, count: int = 4):
    return [draw_call(random.Random(seed + n)) for n in range(count)]


def trained(start, updates: int = 3, **changes):
    """A trainer whose adapter has moved."""
    trainer = make_trainer(start, **{"adapter": SMALL, "warmup_steps": 0, **changes})
    for update in range(updates):
        trainer.step(batch_of(update))
    return trainer


def flat(values) -> torch.Tensor:
    return torch.tensor([value for row in values for value in row])


def assert_equal(left, right) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---- the update ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_gradient_is_that_of_the_whole_weights_through_b_a(start, tied_start, batch, tied):
    """W + s B A at B = 0: dL/dB = s dL/dW A^T, and dL/dA = 0."""
    begin = tied_start if tied else start
    whole, adapted = make_trainer(begin), make_trainer(begin, adapter=SMALL)
    with recorded_gradients(whole) as of_weights:
        wanted_report = whole.step(batch)
    factors = {name: p.detach().clone() for name, p in adapted.parameters.items()}
    with recorded_gradients(adapted) as found:
        report = adapted.step(batch)
    assert report.loss == pytest.approx(wanted_report.loss, abs=1e-6)
    assert report.kl_to_start == pytest.approx(wanted_report.kl_to_start, abs=1e-6)
    wanted = {}
    for name, factor in factors.items():
        module, part = name.split(".lora_")
        if part.startswith("A"):
            wanted[f"{module}.lora_B.shared.weight"] = 2.0 * of_weights[f"{module}.weight"] @ factor.T
    assert len(wanted) == 14  # seven linear layers in each of two
    assert_close({name: g for name, g in found.items() if ".lora_B" in name}, wanted)
    assert all(float(g.abs().max()) == 0.0 for name, g in found.items() if ".lora_A" in name)
    assert not any("lm_head" in name or "embed" in name for name in found)


def test_the_optimizer_owns_the_adapter_alone_and_the_base_never_moves(start):
    trainer = make_trainer(start, adapter=SMALL, warmup_steps=0)
    base = {name: tensor.clone() for name, tensor in lora.base_state(trainer._policy.model).items()}
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.step(batch_of(0))
    assert (
        trainer.num_parameters
        == sum(p.numel() for p in before.values())
        == sum(p.numel() for p in trainer._policy.model.parameters() if p.requires_grad)
    )
    assert any(not torch.equal(before[name], p) for name, p in trainer.parameters.items())
    assert_equal(lora.base_state(trainer._policy.model), base)


def test_the_kl_with_the_adapter_off_is_that_to_a_second_model(start, batch):
    one, two = trained(start), trained(start)
    second = make_trainer(start, reference=start, adapter=SMALL, warmup_steps=0)
    for update in range(3):
        second.step(batch_of(update))
    assert second._start.policy.model is not second._policy.model
    assert one._start.policy.model is one._policy.model
    calls = calls_of(20)
    values = flat(one.kl_by_call(calls))
    assert float(values.min()) > 1e-3
    assert torch.allclose(values, flat(second.kl_by_call(calls)), atol=1e-6)
    with recorded_gradients(two) as found:
        two.step(batch)
    with recorded_gradients(second) as wanted:
        second.step(batch)
    assert_close(found, wanted)


def test_the_seed_term_reads_the_teacher_s_prompts_with_the_adapter_off(start):
    """FST-distill: the start reads another prompt before the same tokens."""
    calls = calls_of(30)
    prompts = [(7, 8, 9), calls[1].prompt_ids[:1], (*calls[2].prompt_ids, *range(20, 50)), calls[3].prompt_ids]
    held = tuple(SeedKLCall(call, prompt) for call, prompt in zip(calls, prompts, strict=True))
    batch = Batch(rows=(), weights="step-000000", seed_kl_calls=held)
    one = trained(start, seed_kl_coefficient=1.0)
    second = make_trainer(start, reference=start, adapter=SMALL, warmup_steps=0, seed_kl_coefficient=1.0)
    for update in range(3):
        second.step(batch_of(update))
    with recorded_gradients(one) as found:
        report = one.step(batch)
    with recorded_gradients(second) as wanted:
        assert second.step(batch).kl_under_seed == pytest.approx(report.kl_under_seed, abs=1e-6)
    assert_close(found, wanted)


@pytest.mark.parametrize("settings", [SMALL, LoRA(rank=4, alpha=8.0, rslora=True)], ids=["plain", "rslora"])
def test_the_scaling_is_the_settings_own(start, batch, settings):
    trainer = make_trainer(start, adapter=settings)
    scalings = {layer.scaling["shared"] for layer in lora.layers_of(trainer._policy.model, "shared").values()}
    assert scalings == {4.0 if settings.rslora else 2.0}


def test_bfloat16_stores_the_frozen_base_in_two_bytes_and_the_adapter_in_four(start, batch):
    low, exact = make_trainer(start, adapter=SMALL, precision="bfloat16"), make_trainer(start, adapter=SMALL)
    model = low._policy.model
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" not in name} == {torch.bfloat16}
    assert {p.dtype for p in low.parameters.values()} == {torch.float32}
    sequence = list(range(20))
    gaps = flat(exact.score([sequence])) - flat(low.score([sequence]))
    assert 1e-4 < float(gaps.abs().max()) < 0.3
    with recorded_gradients(exact) as wanted:
        exact.step(batch)
    with recorded_gradients(low) as found:
        low.step(batch)
    assert_close(found, wanted, tolerance=0.1)


# ---- its first numbers --------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_its_numbers_are_the_seed_s(start):
    state = torch.get_rng_state()
    policy = Policy.load(start, dtype=torch.float32, adapter=SMALL, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = (Policy.load(start, dtype=torch.float32, adapter=SMALL, seed=seed) for seed in (7, 8))
    first, same, different = (
        torch.cat([p.flatten() for p in lora.parameters_of(each.model, "shared").values()])
        for each in (policy, again, other)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, different)
    ids = torch.tensor([[1, 2, 3, 4]])
    plain = AutoModelForCausalLM.from_pretrained(start)
    assert torch.equal(policy.model(ids).logits, plain(ids).logits)


# ---- its files ----------------------------------------------------------------------------------


def test_a_publish_writes_the_adapter_and_the_base_once(start, tmp_path):
    trainer = trained(start)
    first = trainer.publish(tmp_path / "weights" / "step-000000", "step-000000")
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    trainer.step(batch_of(9))
    second = trainer.publish(tmp_path / "weights" / "step-000001", "step-000001")
    assert first.path == second.path == tmp_path / "weights" / "base"
    assert (second.path / "model.safetensors").stat().st_mtime_ns == stamp
    names = sorted(str(f.relative_to(second.folder)) for f in second.folder.rglob("*") if f.is_file())
    assert names == ["lora.json", "shared/adapter_config.json", "shared/adapter_model.safetensors"]
    assert Checkpoint.at("step-000001", second.folder) == second
    resumed = trained(start, updates=0)
    third = resumed.publish(tmp_path / "weights" / "step-000002", "step-000002")
    assert third.digests == first.digests  # of a base that was there before
    assert third.digests.keys() == {*AutoModelForCausalLM.from_pretrained(first.path).state_dict()}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merged_weights_are_those_of_the_adapter(start, tied_start, tmp_path, tied):
    trainer = trained(tied_start if tied else start)
    published = trainer.publish(tmp_path / "step-000003", "step-000003")
    sequences = [[*range(n, n + 12)] for n in range(5)]
    merged = make_trainer(published.folder)
    assert not any("lora" in name for name in merged.parameters)
    assert torch.allclose(flat(merged.score(sequences)), flat(trainer.score(sequences)), atol=1e-4)
    assert not torch.allclose(flat(merged.score(sequences)), flat(make_trainer(start).score(sequences)), atol=1e-2)


def test_a_restored_trainer_goes_on_bit_for_bit(start, tmp_path):
    whole, first = trained(start, updates=4), trained(start, updates=2)
    first.save_state(tmp_path / "state")
    size = sum(file.stat().st_size for file in (tmp_path / "state").iterdir())
    assert size < 4 * 3 * first.num_parameters + 40_000  # the adapter and its moments; no base
    second = make_trainer(start, adapter=SMALL, warmup_steps=0)
    second.load_state(tmp_path / "state")
    reports = [second.step(batch_of(update)) for update in (2, 3)]
    assert reports[-1].kl_to_start > 0
    assert_equal(dict(second.parameters), dict(whole.parameters))
    assert second.kl_by_call(calls_of(5)) == whole.kl_by_call(calls_of(5))


def test_an_adapter_goes_on_with_its_own_start_as_reference(start, tmp_path):
    before = trained(start)
    folder = before.publish(tmp_path / "step-000003", "step-000003").folder
    after = make_trainer(folder, adapter=SMALL, warmup_steps=0)
    assert_equal(dict(after.parameters), dict(before.parameters))
    calls = calls_of(5)
    assert float(flat(after.kl_by_call(calls)).abs().max()) < 1e-6
    after.step(batch_of(9))
    second = make_trainer(folder, reference=folder, adapter=SMALL, warmup_steps=0)
    second.step(batch_of(9))
    assert float(flat(after.kl_by_call(calls)).max()) > 1e-4
    assert torch.allclose(flat(after.kl_by_call(calls)), flat(second.kl_by_call(calls)), atol=1e-6)
    assert not any("start" in name for name in after.parameters)
    published = after.publish(tmp_path / "next" / "step-000001", "step-000001")
    assert [adapter.name for adapter in published.adapters] == ["shared"]


def test_an_adapter_of_other_settings_is_merged_and_a_new_one_put_on(start, tmp_path):
    folder = trained(start).publish(tmp_path / "step-000003", "step-000003").folder
    sequences = [[*range(12)]]
    wanted = flat(make_trainer(folder).score(sequences))
    other = make_trainer(folder, adapter=LoRA(rank=2, target=("q_proj", "v_proj")))
    assert torch.allclose(flat(other.score(sequences)), wanted, atol=1e-6)
    assert {name.split(".")[-4] for name in other.parameters} == {"q_proj", "v_proj"}
    assert float(flat(other.kl_by_call(calls_of(5))).abs().max()) < 1e-6


def test_whole_weights_go_on_with_an_adapter_and_back(start, tmp_path):
    whole = make_trainer(start, warmup_steps=0)
    whole.step(batch_of(0))
    first = whole.publish(tmp_path / "whole" / "step-000001", "step-000001")
    adapted = make_trainer(first.folder, adapter=SMALL, warmup_steps=0)
    sequences = [[*range(n, n + 12)] for n in range(5)]
    assert torch.allclose(flat(adapted.score(sequences)), flat(whole.score(sequences)), atol=1e-6)
    adapted.step(batch_of(1))
    second = adapted.publish(tmp_path / "adapted" / "step-000001", "step-000001")
    back = make_trainer(second.folder, warmup_steps=0)
    assert torch.allclose(flat(back.score(sequences)), flat(adapted.score(sequences)), atol=1e-4)
    back.step(batch_of(2))
    third = back.publish(tmp_path / "back" / "step-000001", "step-000001")
    assert not third.adapters
    assert torch.allclose(flat(make_trainer(third.folder).score(sequences)), flat(back.score(sequences)), atol=1e-6)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rank": 0}, "rank\n.*greater than or equal to 1"),
        ({"rank": True}, "rank\n.*valid integer"),
        ({"alpha": 0}, "alpha\n.*greater than 0"),
        ({"target": ()}, "name at least one layer"),
        ({"ranks": 4}, "Extra inputs"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, dict) else "",
)
def test_settings_that_are_no_adapter_are_refused(settings, complaint):
    with pytest.raises(ValidationError, match=complaint):
        LoRA(**settings)


def test_a_name_that_is_no_linear_layer_is_refused_with_those_that_are(start, tied_start):
    with pytest.raises(TrainingError, match=r"target='qproj'.*did you mean 'q_proj'.*it has down_proj, gate_proj"):
        make_trainer(start, adapter=LoRA(target=("qproj", "v_proj")))
    with pytest.raises(TrainingError, match=r"lm_head.* \(it shares its weight with the embedding\)"):
        make_trainer(tied_start, adapter=LoRA(target=("lm_head",)))
    with pytest.raises(TrainingError, match=r"target='lm_head' is the LM head"):
        make_trainer(start, adapter=LoRA(target=("lm_head",)))


def test_two_adapters_are_no_whole_weights(start, tmp_path):
    folder = trained(start).publish(tmp_path / "step-000003", "step-000003").folder
    (folder / "shared").rename(folder / "hops")
    (folder / "lora.json").write_text('{"format": 1, "base": "../base", "adapters": ["hops", "answer"]}')
    with pytest.raises(TrainingError, match="holds 2 LoRA adapters"):
        make_trainer(folder)


# ---- other models -------------------------------------------------------------------------------


def test_the_routers_and_the_fused_experts_of_a_mixture_get_no_adapter(tmp_path):
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    trainer = make_trainer(tmp_path, adapter=SMALL)
    assert {name.split(".")[-4] for name in trainer.parameters} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name in ("gate", "gate_up_proj"):
        with pytest.raises(TrainingError, match=rf"target='{name}'.*no linear layer of this name"):
            make_trainer(tmp_path, adapter=LoRA(target=(name,)))


def test_layers_that_keep_their_weights_transposed_are_merged_right(tmp_path):
    """GPT-2's Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    trainer = trained(tmp_path / "start")
    folder = trainer.publish(tmp_path / "step-000001", "step-000001").folder
    sequences = [[*range(n, n + 12)] for n in range(3)]
    assert torch.allclose(flat(make_trainer(folder).score(sequences)), flat(trainer.score(sequences)), atol=1e-4)
    assert float((flat(trainer.score(sequences)) - flat(trainer_start(tmp_path).score(sequences))).abs().max()) > 1e-3


def trainer_start(tmp_path):
    return make_trainer(tmp_path / "start")


def test_other_settings_of_the_trainer_hold_for_an_adapter(start):
    trainer = make_trainer(start, adapter=SMALL, warmup_steps=0)
    with recorded_gradients(trainer) as plain:
        trainer.step(batch_of(0))
    clipped = make_trainer(start, adapter=SMALL, warmup_steps=0, max_grad_norm=0.01)
    with recorded_gradients(clipped) as small:
        norm = clipped.step(batch_of(0)).grad_norm
    assert_close(small, {name: g * 0.01 / norm for name, g in plain.items()}, tolerance=1e-4)
    shared, alone = (make_trainer(start, adapter=SMALL, share_prompts=share) for share in (True, False))
    with recorded_gradients(shared) as one:
        shared.step(batch_of(0))
    with recorded_gradients(alone) as other:
        alone.step(batch_of(0))
    assert_close(one, other)
    assert shared.settings == alone.settings
