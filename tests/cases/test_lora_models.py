"""LoRA adapters on the architectures that people have: on exactly the layers that are meant, or refused before work."""

import pytest
import torch
from transformers import AutoConfig

from benchmarks.families import FAMILIES
from dspy_fst.engine.lora import layers_of, peft_fault, put_on
from dspy_fst.engine.lora_layers import adaptable_layers, target_faults, target_modules
from dspy_fst.errors import ConfigurationError, TrainingError
from dspy_fst.model_files.architectures import empty_model
from dspy_fst.recipe.lora_settings import LoRA
from programs.lab import BASE
from tests.cases.test_lora_settings import LORA, checked, examples  # noqa: F401  # a fixture

BY_NAME = {family.name: family for family in FAMILIES}
SMALL = LoRA(rank=4)
SHARED_EXPERTS = ("DeepSeek-V3, Kimi-K2", "GLM 4-MoE", "Qwen3-Next", "LongCat-Flash", "HunYuan (MoE)")
"""Mixtures whose shared experts or first layers name their linear layers as fused experts are named elsewhere."""


@pytest.mark.parametrize("name", BY_NAME)
def test_an_adapter_is_on_the_layers_that_are_meant_and_on_no_other(name):
    model = empty_model(BY_NAME[name].make().config)
    assert target_faults(model, SMALL) == []
    wanted = target_modules(model, SMALL)
    assert peft_fault(model, SMALL) is None
    assert [*layers_of(model, "shared")] == wanted


@pytest.mark.parametrize("name", SHARED_EXPERTS)
def test_a_shared_expert_s_layer_is_not_taken_for_fused_experts(name):
    """peft reads the name `down_proj` as the fused experts' parameter of this name."""
    model = BY_NAME[name].make()
    wanted = [layer for layer in adaptable_layers(model) if layer.endswith(".down_proj")]
    for adapter in ("one", "two"):
        put_on(model, adapter, LoRA(rank=2, target=("down_proj",)))
        assert [*layers_of(model, adapter)] == wanted
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", ["Mamba", "Falcon-H1"])
def test_a_layer_that_fused_kernels_read_past_an_adapter_gets_none(name):
    model = BY_NAME[name].make()
    assert not any(layer.endswith("out_proj") for layer in adaptable_layers(model))
    with pytest.raises(TrainingError, match=r"target='out_proj'.*no linear layer of this name"):
        put_on(model, "one", LoRA(target=("out_proj",)))


def test_what_peft_refuses_is_told_before_any_work(examples, tmp_path, monkeypatch):  # noqa: F811
    def refuse(*_, **__):
        raise ValueError("not on such a layer")

    monkeypatch.setattr("peft.inject_adapter_in_model", refuse)
    with pytest.raises(
        ConfigurationError, match=r"adapter: peft cannot put .* on a 'qwen3' model: not on such a layer"
    ):
        checked(examples, tmp_path, **LORA)


def test_the_trial_of_peft_takes_no_memory():
    model = empty_model(AutoConfig.from_pretrained(BASE))
    assert peft_fault(model, LoRA(rank=16)) is None
    assert {p.device.type for layer in layers_of(model, "shared").values() for p in layer.parameters()} == {"meta"}
