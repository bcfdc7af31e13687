"""A LoRA adapter's folder given as the model is told for what it is, with its base."""

import json
import shutil

import pytest

from dspy_fst import PolicyLM
from dspy_fst.errors import ConfigurationError
from dspy_fst.preflight.model_checks import model_faults
from programs.lab import BASE


def adapter(folder, **settings):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return PolicyLM(folder, engine="in_process")


def test_it_says_what_it_is_which_base_it_belongs_to_and_what_to_do(tmp_path):
    policy = adapter(tmp_path / "lora", peft_type="LORA", base_model_name_or_path="Qwen/Qwen3-0.6B")
    (fault,) = model_faults(policy)
    assert "holds a LORA adapter of the model 'Qwen/Qwen3-0.6B', and no model" in fault
    assert "merge_and_unload" in fault
    assert str(tmp_path / "lora") in fault


def test_a_policy_that_is_asked_without_a_run_says_the_same(tmp_path):
    policy = adapter(tmp_path / "lora", peft_type="LORA", base_model_name_or_path="Qwen/Qwen3-0.6B")
    (tmp_path / "lora" / "config.json").write_text("{}")  # some trainers leave the base's beside it
    with pytest.raises(ConfigurationError, match=r"adapter of the model 'Qwen/Qwen3-0\.6B', and no model"):
        policy.handle.ready()


@pytest.mark.parametrize("written", ["{}", "[]", "not json"])
def test_one_that_names_no_base_is_told_all_the_same(tmp_path, written):
    policy = adapter(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text(written)
    (fault,) = model_faults(policy)
    assert "adapter of a model that it does not name" in fault


def test_a_model_is_no_adapter(tmp_path):
    shutil.copytree(BASE, tmp_path / "model")
    assert model_faults(PolicyLM(tmp_path / "model", engine="in_process", max_tokens=64)) == []
