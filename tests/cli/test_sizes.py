"""`dspy-fst sizes` and `check --gpu`: what fits where, from a config alone."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from dspy_fst.memory import find_size
from dspy_fst.model_files.hub import unknown_fault
from programs.lab import BASE
from tests.cli.conftest import invoke

GIB = 2**30
SMALL = "Qwen/Qwen3-0.6B"
BODY = 596_049_920 - 151_936 * 1024
"""Its parameters without the tied embedding; under a bfloat16 body the start's take two bytes each."""


def told(*options):
    return json.loads(invoke("sizes", *options, "--json").stdout)


@pytest.fixture
def config_alone(tmp_path):
    """A model's folder that holds nothing but the config of Qwen3-0.6B's shape."""
    from transformers import AutoConfig

    from dspy_fst.model_files.hub import known_models

    folder = tmp_path / "config-alone"
    AutoConfig.for_model(**known_models()[SMALL], architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)
    return folder


def test_a_model_is_told_part_by_part_for_a_card(config_alone):
    said = told(config_alone, "--gpu", "24GiB", "--max-tokens", "512")
    assert said["parameters"] == 596_049_920
    assert (said["fits"], said["sure"]) == (True, True)
    needs = {need["place"]: need for need in said["needs"]}
    assert needs["GPU memory"]["parts"]["the trainer"] == 20 * 596_049_920 - 2 * BODY
    assert needs["GPU memory"]["free"] == 24 * GIB - GIB // 2
    assert needs["memory"]["parts"]["a state being saved"] == 12 * 596_049_920
    assert needs["memory"]["free"] is None
    assert needs["GPU memory"]["certain"] < needs["GPU memory"]["expected"] <= needs["GPU memory"]["at_most"]
    assert said["micro_batch_tokens"] == {"tokens": 1024, "chosen": True}
    trained = needs["GPU memory"]["made_of"]["the trainer"]
    assert sum(trained.values()) == needs["GPU memory"]["parts"]["the trainer"]
    assert trained["AdamW's moments"] == 8 * 596_049_920
    assert (said["trained"], said["gradient_checkpointing"]) == ("trained: all weights, which fit", False)
    assert said["source"].startswith("computed, not measured")


def test_a_known_name_says_the_same_as_its_config(config_alone):
    named, folder = (told(model, "--gpu", "48GiB") for model in (SMALL, config_alone))
    assert {**folder, "model": SMALL} == named


def test_two_cards_give_the_engine_one_and_nothing_is_sharded():
    one, two = (told(SMALL, "--gpu", "24GiB", "--cards", cards) for cards in (1, 2))
    parts = {need["place"]: need["parts"] for need in two["needs"]}
    assert set(parts["GPU memory"]) == {"the trainer"}
    assert set(parts["GPU memory of the second card"]) == {"the engine"}
    assert two["micro_batch_tokens"]["tokens"] > one["micro_batch_tokens"]["tokens"]
    large = told("Qwen/Qwen3-8B", "--gpu", "80GiB", "--cards", "2")
    assert not large["fits"]
    assert "139.6 GiB for the trainer" in large["faults"][0]


def test_replies_longer_than_the_micro_batch_make_it_doubtful():
    said = told(SMALL, "--gpu", "24GiB", "--max-tokens", "32768")
    assert (said["fits"], said["sure"]) == (False, False)
    assert "an update may take up to" in said["warnings"][0]
    limit = said["reply_limit"]
    advice = f"lower max_tokens=32768: it fits only if replies stay under {limit + 1} tokens"
    assert advice in said["warnings"][0]
    text = invoke("sizes", SMALL, "--gpu", "24GiB", "--max-tokens", "32768").stdout
    assert f"It fits only if replies stay under {limit + 1} tokens; lower max_tokens" in text
    assert told(SMALL, "--gpu", "24GiB", "--max-tokens", limit, "--micro-batch-tokens", "16")["sure"]
    assert not told(SMALL, "--gpu", "24GiB", "--max-tokens", limit + 1, "--micro-batch-tokens", "16")["sure"]


def test_a_smaller_micro_batch_is_not_advised_against_long_replies():
    said = told(SMALL, "--gpu", "24GiB", "--max-tokens", "65536", "--micro-batch-tokens", "16")
    assert not said["fits"]
    assert "micro_batch_tokens" not in " ".join(said["warnings"])
    both = told(SMALL, "--gpu", "24GiB", "--max-tokens", "65536", "--micro-batch-tokens", "32768")["warnings"][0]
    assert "lower max_tokens=65536 and micro_batch_tokens=32768: it fits only if" in both


def test_settings_that_cannot_help_are_not_advised():
    faults = " ".join(told("Qwen/Qwen3-8B", "--gpu", "16GiB")["faults"])
    assert "use a smaller model" in faults
    assert not [word for word in ("lower", "raise", "kl_coefficient") if word in faults]


def test_without_the_kl_the_frozen_start_is_left_out():
    with_kl, without = (told(SMALL, "--gpu", "24GiB", kl) for kl in ("--kl", "--no-kl"))
    held = [said["needs"][0]["parts"]["the trainer"] for said in (with_kl, without)]
    assert held[0] - held[1] == 4 * 596_049_920 - 2 * BODY


@pytest.mark.parametrize(
    ("model", "gpu", "checkpointed"), [("Qwen/Qwen3-8B", "80GiB", False), ("Qwen/Qwen3-4B", "24GiB", True)]
)
def test_a_lora_adapter_fits_where_all_weights_do_not_and_the_bytes_of_each_part_are_told(model, gpu, checkpointed):
    said = told(model, "--gpu", gpu, "--lora")
    assert (said["sure"], said["gradient_checkpointing"]) == (True, checkpointed)
    text = invoke("sizes", model, "--gpu", gpu, "--lora").stdout
    assert ("gradient checkpointing is on: layers are computed again" in text) == checkpointed
    for part in ("frozen base", "trained weights", "gradients", "AdamW's moments", "weights, "):
        assert part in text
    full = told(model, "--gpu", gpu)
    assert not full["fits"]
    assert "a LoRA adapter is expected to: adapter='lora'" in full["trained"]
    assert "or train a LoRA adapter, which is expected to fit: adapter='lora'" in " ".join(full["faults"])


def test_a_given_micro_batch_is_kept_and_a_bad_one_refused():
    assert told(SMALL, "--gpu", "24GiB", "--micro-batch-tokens", "300")["micro_batch_tokens"] == {
        "tokens": 300,
        "chosen": False,
    }
    assert "micro_batch_tokens='many'" in invoke("sizes", SMALL, "--micro-batch-tokens", "many", code=2).stderr


def test_this_machine_is_looked_at_when_no_card_is_named():
    said = told(BASE)
    assert {need["place"] for need in said["needs"]} >= {"memory", "disk"}
    assert all(need["free"] > 0 for need in said["needs"])


def test_the_text_says_what_is_taken_what_is_written_and_what_was_measured_on_a_card():
    text = invoke("sizes", "Qwen/Qwen3-8B", "--gpu", "80GiB").stdout
    assert "It does not fit" in text
    assert "written over the run: at most 5141.4 GiB" in text
    assert "on one H100 the peaks of four updates, without vLLM, were met to -2 to +5 %" in text


@pytest.mark.parametrize("size", ["much", "0GiB", "-1", "24 TiB"])
def test_a_size_that_is_none_is_refused(size):
    assert "is no size; write one like 24GiB" in invoke("sizes", SMALL, "--gpu", size, code=2).stderr


def test_cards_without_their_size_are_refused():
    assert "say how large each card is" in invoke("sizes", SMALL, "--cards", "2", code=2).stderr


def test_an_unknown_name_without_a_hub_is_told_in_a_sentence_and_at_once(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.process_time()
    fault = unknown_fault("nobody/nothing")
    assert time.process_time() - began < 1
    assert "there is no such folder, as a hub model its config is not on this machine" in fault
    assert SMALL in fault


def test_an_unknown_name_is_told_before_anything_heavy_is_imported():
    source = (
        "import sys; from dspy_fst.cli import main; sys.argv = ['dspy-fst', 'sizes', 'nobody/nothing', '--gpu', '24']\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules, 'dspy' in sys.modules)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, env=environment)
    assert ended.stdout.split() == ["2", "False", "False"], ended.stderr
    assert "HF_HUB_OFFLINE is set" in ended.stderr


BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
QUANTIZED = {"model_type": "qwen3", "quantization_config": {"quant_method": "gptq", "bits": 4}}
MISTYPED = {
    "model_type": "qwen3",
    "hidden_size": "1024",
    "num_hidden_layers": "abc",
    "num_attention_heads": 16,
    "vocab_size": None,
}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BERT, "it is a BertForMaskedLM, which writes no text; choose a causal language model"),
        (QUANTIZED, "its weights are quantized (gptq) and cannot be trained"),
        (MISTYPED, "not a model that transformers can read: "),
        ([], "not a model that transformers can read: "),
    ],
    ids=["encoder", "quantized", "wrong types", "a list"],
)
def test_a_config_that_a_run_refuses_is_refused_in_the_same_sentence(tmp_path, config_alone, project, config, said):
    (config_alone / "config.json").write_text(json.dumps(config))
    for command in (("sizes", config_alone), ("check", project), ("check", project, "--gpu", "24GiB")):
        assert f"model={str(config_alone)!r}: {said}" in invoke(*command, code=2).stderr.replace("\n", " "), command


def test_what_a_config_leaves_out_is_told(config_alone):
    (config_alone / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    said = told(config_alone, "--gpu", "800GiB", "--max-tokens", "256")
    lacking = "hidden_size, num_hidden_layers, num_attention_heads, vocab_size"
    assert f"its config.json does not set {lacking}, so transformers' defaults are counted" in said["warnings"][0]
    assert not said["sure"]


def test_a_config_with_names_of_its_own_leaves_nothing_out(tmp_path):
    own = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert find_size(str(tmp_path)).assumed == ()


# ---- check -------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, config_alone):
    """The laboratory's project with a model of which only the config is there."""
    invoke("init", tmp_path, "--example", "lab")
    file = tmp_path / "project.yaml"
    settings = yaml.safe_load(file.read_text())
    settings |= {"model": str(config_alone), "policy": {"engine": "auto", "max_tokens": 512}}
    file.write_text(yaml.safe_dump(settings))
    return file


def test_check_tells_the_room_on_an_imagined_card_from_the_config_alone(project):
    said = json.loads(invoke("check", project, "--gpu", "80GiB", "--json").stdout)
    needs = {need["place"]: need for need in said["needs"]}
    assert needs["GPU memory"]["parts"] == {
        "the trainer": 20 * 596_049_920 - 2 * BODY,
        "the engine": int(80 * GIB * 0.3),
    }
    assert said["micro_batch_tokens"]["chosen"]
    rows = {row["name"]: row for row in said["settings"]}
    assert rows["micro_batch_tokens"]["value"] == said["micro_batch_tokens"]["tokens"] >= 4096
    assert "computed, not measured here" in invoke("check", project, "--gpu", "80GiB").stdout
    two = json.loads(invoke("check", project, "--gpu", "80GiB", "--cards", "2", "--json").stdout)
    assert "GPU memory of the second card" in {need["place"] for need in two["needs"]}


def test_check_tells_what_is_trained_and_that_layers_are_computed_again_and_why(project):
    text = invoke("check", project, "--gpu", "24GiB").stdout
    assert "trained: all weights, which fit" in text
    assert "gradient checkpointing is on" not in text
    recipe = yaml.safe_load(project.read_text())
    recipe["policy"]["max_tokens"] = 4096
    project.write_text(yaml.safe_dump(recipe))
    said = json.loads(invoke("check", project, "--gpu", "22GiB", "--json").stdout)
    assert said["gradient_checkpointing"] is True
    (why,) = [warning for warning in said["warnings"] if warning.startswith("gradient_checkpointing: it is on")]
    assert "an update may take " in why
    assert "gradient checkpointing is on" in invoke("check", project, "--gpu", "22GiB").stdout
    recipe["recipe"] = {**recipe.get("recipe", {}), "gradient_checkpointing": False}
    project.write_text(yaml.safe_dump(recipe))
    assert json.loads(invoke("check", project, "--gpu", "22GiB", "--json").stdout)["gradient_checkpointing"] is False


def test_check_says_what_does_not_fit_on_it(project):
    refused = json.loads(invoke("check", project, "--gpu", "8GiB", "--json", code=2).stdout)
    assert any(fault.startswith("GPU memory: training model=") for fault in refused["faults"])


def test_check_on_this_machine_still_wants_the_weights(project):
    assert "the folder holds no weights" in invoke("check", project, code=2).stderr


def test_check_measures_on_this_machine_only(project):
    assert "--gpu imagines another" in invoke("check", project, "--gpu", "8GiB", "--measure", code=2).stderr


def test_the_size_of_a_folder_with_weights_is_that_of_its_config(tmp_path):
    shutil.copy(BASE / "config.json", tmp_path)
    assert find_size(str(tmp_path)) == find_size(str(BASE))
