"""Folders that transformers reads in silence as another model: each is refused before work, or carried whole."""

import json
import shutil
from pathlib import Path

import dspy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dspy_fst
from dspy_fst import PolicyLM
from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.in_process import InProcessEngine
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.errors import EngineError, RunDirectoryError, TrainingError
from dspy_fst.policy_lm import policy_of
from dspy_fst.preflight.model_checks import model_faults
from dspy_fst.rollout.components import carry, read_texts
from dspy_fst.saving.export import export
from dspy_fst.saving.manifest import seal, verify, weights_faults
from dspy_fst.slow.model import Policy
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.training_settings import TrainingSettings
from dspy_fst.types import Population
from programs.lab import BASE
from tests.slow.makers import save_model

SETTINGS = TrainingSettings(learning_rate=1e-3)
PLAIN = "{% for m in messages %}w1 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
WITH_TOOLS = "{% for t in tools %}w9 {{ t['function']['name'] }} {% endfor %}" + PLAIN
TOOL = {"type": "function", "function": {"name": "w7", "description": "", "parameters": {"type": "object"}}}
ASKED = [{"role": "user", "content": "w3 w4"}]


def edited(folder: Path, name: str, **changes) -> Path:
    document = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps({**document, **changes}))
    return folder


def faults_of(folder: Path) -> list[str]:
    return model_faults(PolicyLM(str(folder), engine="in_process", max_tokens=8))


@pytest.fixture
def folder(tmp_path):
    """A plain model with a chat template."""
    made = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(made)
    return made


def test_a_plain_folder_has_no_faults(folder):
    assert faults_of(folder) == []
    assert faults_of(BASE) == []


# ---- adapters -----------------------------------------------------------------------------------


def adapt(folder: Path, target: str = "q_proj") -> tuple:
    """A LoRA whose effect is large, on the folder's model."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=2, target_modules=[target], init_lora_weights=False)), model


def test_merged_weights_beside_their_adapter_are_refused_before_work_by_all(folder, tmp_path):
    adapted, _ = adapt(folder)
    adapted.save_pretrained(tmp_path / "both")
    adapted.merge_and_unload().save_pretrained(tmp_path / "both")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "both")
    (fault,) = faults_of(tmp_path / "both")
    assert "model.safetensors" in fault
    assert "adapter_config.json, adapter_model.safetensors" in fault
    assert "a second time" in fault
    assert "move the adapter's files elsewhere" in fault
    with pytest.raises(TrainingError, match="a second time"):
        Trainer(tmp_path / "both", SETTINGS, device="cpu")
    with pytest.raises(EngineError, match="a second time"):
        InProcessEngine(InProcessSettings()).load(Checkpoint("step-000000", tmp_path / "both"))
    for path in (tmp_path / "both").glob("adapter_*"):
        path.unlink()
    assert faults_of(tmp_path / "both") == []
    merged = load_file(tmp_path / "both" / "model.safetensors")
    trainer = Trainer(tmp_path / "both", SETTINGS, device="cpu")
    assert all(torch.equal(parameter, merged[name]) for name, parameter in trainer.parameters.items())


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_a_model_that_holds_an_adapter_is_no_policy(folder, target):
    adapted, inner = adapt(folder, target)
    for model in (adapted, inner):  # peft wraps the model's layers in place
        with pytest.raises(TrainingError, match=r"holds an adapter.*merge_and_unload"):
            Policy(model)
    Policy(adapted.merge_and_unload())


def test_a_parametrized_head_is_no_policy(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    with pytest.raises(TrainingError, match="parametrization"):
        Policy(model)


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_tensors_of_an_adapter_are_never_published(folder, tmp_path, target):
    """Also when one is put into the trainer's model after the trainer was made."""
    trainer = Trainer(folder, SETTINGS, device="cpu")
    get_peft_model(trainer._policy.model, LoraConfig(r=2, target_modules=[target]))
    with pytest.raises(TrainingError, match="tensor of an adapter"):
        trainer.publish(tmp_path / "v", "v")
    assert not (tmp_path / "v").exists()


# ---- heads and layers ----------------------------------------------------------------------------


def test_a_tied_file_under_an_untied_config_is_refused_before_work_by_all(tmp_path):
    tied = save_model(tmp_path / "tied", tied=True)
    tokenizer = AutoTokenizer.from_pretrained(tied)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(tied)
    assert faults_of(tied) == []
    edited(tied, "config.json", tie_word_embeddings=False)
    (fault,) = faults_of(tied)
    assert "its files lack lm_head.weight" in fault
    assert "tie_word_embeddings" in fault
    with pytest.raises(TrainingError, match=r"lack lm_head\.weight"):
        Trainer(tied, SETTINGS, device="cpu")
    with pytest.raises(EngineError, match=r"lack lm_head\.weight"):
        InProcessEngine(InProcessSettings()).load(Checkpoint("step-000000", tied))


@pytest.mark.parametrize("change", ["lacks", "shape"])
def test_any_layer_that_the_files_do_not_hold_is_told_before_work(folder, change):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name][:32].contiguous()
    if change == "lacks":
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (fault,) = faults_of(folder)
    assert ("lack model.layers.0.mlp.up_proj.weight" in fault) is (change == "lacks")
    assert "in another shape than its config.json says" in fault or change == "lacks"


def test_a_config_that_no_model_can_be_made_of_is_told_before_work(folder):
    """Its vocabulary is smaller than the padding's id."""
    edited(folder, "config.json", vocab_size=60)
    (fault,) = faults_of(folder)
    assert "transformers cannot make its model (AssertionError" in fault


# ---- two sets of weights, other formats and precisions ------------------------------------------


def shard(folder: Path, seed: int) -> None:
    """Other weights, as the shards that an index names."""
    other = save_model(folder.parent / "other", seed=seed)
    tensors = load_file(other / "model.safetensors")
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_stale_single_file_beside_shards_is_refused(folder):
    shard(folder, seed=7)
    (fault,) = faults_of(folder)
    assert "holds its weights twice" in fault
    (folder / "model.safetensors").unlink()
    assert faults_of(folder) == []
    trainer = Trainer(folder, SETTINGS, device="cpu")
    meant = load_file(folder / "model-00001-of-00001.safetensors")
    assert all(torch.equal(parameter, meant[name]) for name, parameter in trainer.parameters.items())


def test_an_index_of_the_one_file_is_no_second_set(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")})
    )
    assert faults_of(folder) == []


def test_pickled_weights_alone_are_trained_as_they_are_and_recognised_when_they_change(folder, tmp_path):
    from dspy_fst.training.fingerprints import files_fingerprint

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert faults_of(folder) == []
    trainer = Trainer(folder, SETTINGS, device="cpu")
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in trainer.parameters.items())
    assert load_file(trainer.publish(tmp_path / "v", "v").path / "model.safetensors").keys() == tensors.keys()
    before = files_fingerprint(folder)
    tensors["model.norm.weight"] += 1
    torch.save(tensors, folder / "pytorch_model.bin")
    assert files_fingerprint(folder) != before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_trained_and_published_as_the_trainer_s_own_precision(folder, tmp_path, dtype):
    weights = {name: t.to(getattr(torch, dtype)) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edited(folder, "config.json", dtype=dtype, torch_dtype=dtype)
    assert faults_of(folder) == []
    trainer = Trainer(folder, SETTINGS, device="cpu")
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}
    path = trainer.publish(tmp_path / "v", "v").path
    published = load_file(path / "model.safetensors")
    assert all(torch.equal(published[name], tensor.float()) for name, tensor in weights.items())
    assert json.loads((path / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype == torch.float32


def test_quantized_weights_are_refused(folder):
    edited(folder, "config.json", quantization_config={"quant_method": "fp8"})
    assert any("quantized (fp8)" in fault for fault in faults_of(folder))


# ---- what the config asks for ---------------------------------------------------------------------


def test_dropout_in_the_config_stays_off(folder):
    wanted = Trainer(folder, SETTINGS, device="cpu").score([[1, 2, 3, 4]])
    edited(folder, "config.json", attention_dropout=0.9)
    dropping = Trainer(folder, SETTINGS, device="cpu")
    assert dropping.score([[1, 2, 3, 4]]) == dropping.score([[1, 2, 3, 4]]) == wanted


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_is_not_everywhere_is_refused_and_a_plain_one_is_not(folder, key):
    edited(folder, "config.json", **{key: "flash_attention_2"})
    (fault,) = [fault for fault in faults_of(folder) if "asks for" in fault]
    assert f"{key}='flash_attention_2'" in fault
    edited(folder, "config.json", **{key: "eager"})
    assert faults_of(folder) == []


# ---- what shapes a prompt -------------------------------------------------------------------------


def with_named_templates(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": PLAIN, "tool_use": WITH_TOOLS}
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    return folder


def as_a_list(folder: Path) -> Path:
    """Both templates in tokenizer_config.json, as older releases wrote them."""
    for name in ("chat_template.jinja",):
        (folder / name).unlink(missing_ok=True)
    templates = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": WITH_TOOLS}]
    return edited(folder, "tokenizer_config.json", chat_template=templates)


def ids(folder: Path, tools=None) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = tokenizer.apply_chat_template(ASKED, tools=tools, add_generation_prompt=True, return_dict=True)
    return list(made["input_ids"])


@pytest.mark.parametrize("form", [with_named_templates, as_a_list])
def test_named_templates_are_published_so_tools_are_shown_to_every_version(folder, tmp_path, form):
    form(folder)
    assert ids(folder, [TOOL]) == [9, 7, 1, 3, 4, 2]
    assert faults_of(folder) == []
    path = Trainer(folder, SETTINGS, device="cpu").publish(tmp_path / "v", "v").path
    assert ids(path, [TOOL]) == ids(folder, [TOOL])
    assert ids(path) == ids(folder) == [1, 3, 4, 2]
    assert weights_faults(path) == []
    seal(path, "1")
    verify(path)


def test_a_processor_s_files_are_published_as_they_are(folder, tmp_path):
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text('{"size": 224}')
    path = Trainer(folder, SETTINGS, device="cpu").publish(tmp_path / "v", "v").path
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        assert (path / name).read_bytes() == (folder / name).read_bytes()


def test_added_and_special_tokens_are_published(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(folder)
    path = Trainer(folder, SETTINGS, device="cpu").publish(tmp_path / "v", "v").path
    published = AutoTokenizer.from_pretrained(path)
    assert published("w3 <think> <tool>").input_ids == tokenizer("w3 <think> <tool>").input_ids
    assert published.all_special_ids == tokenizer.all_special_ids


def test_files_that_render_another_prompt_stop_the_run_with_both_lengths(folder, tmp_path, monkeypatch):
    """As if a release of transformers left the named templates out again."""
    with_named_templates(folder)
    save = type(AutoTokenizer.from_pretrained(folder)).save_pretrained

    def losing(self, directory, *args, **kwargs):
        saved = save(self, directory, *args, **kwargs)
        shutil.rmtree(Path(directory) / "additional_chat_templates")
        return saved

    trainer = Trainer(folder, SETTINGS, device="cpu")
    monkeypatch.setattr(type(trainer.tokenizer), "save_pretrained", losing)
    with pytest.raises(TrainingError, match=r"another prompt of one turn with tools.*\d+ tokens instead of \d+ tokens"):
        trainer.publish(tmp_path / "v", "v")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    "name", ["additional_chat_templates/x.py", "additional_chat_templates/deep/x.jinja", "other/x.jinja"]
)
def test_no_other_folder_and_no_other_file_is_read_among_saved_weights(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text("x")
    assert len(weights_faults(folder)) == 1


def test_a_link_among_the_templates_is_refused(folder, tmp_path):
    with_named_templates(folder)
    (tmp_path / "secret.jinja").write_text("x")
    (folder / "additional_chat_templates" / "y.jinja").symlink_to(tmp_path / "secret.jinja")
    (fault,) = weights_faults(folder)
    assert "no links" in fault


def test_named_templates_come_back_from_a_saved_program_and_an_export(folder, tmp_path):
    """Through compile's own publisher, dspy_fst.save, dspy_fst.load and dspy-fst export."""
    with_named_templates(folder)
    policy = PolicyLM(str(folder), engine="in_process", max_tokens=4)
    path = (
        Trainer(folder, SETTINGS, device="cpu")
        .publish(tmp_path / "run" / "weights" / "step-000000", "step-000000")
        .path
    )
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(policy)
    policy.handle.checkpoint = Checkpoint("step-000000", path)
    carry(program, Population.of_seed(read_texts(program), 2))
    saved = dspy_fst.save(program, tmp_path / "compiled")
    loaded = dspy_fst.load(saved, dspy.ChainOfThought("question -> answer"), engine="in_process")
    assert ids(policy_of(loaded).checkpoint.path, [TOOL]) == ids(folder, [TOOL])
    out = export(tmp_path / "compiled", tmp_path / "out")
    assert (out / "additional_chat_templates").stat().st_mode & 0o777 == 0o755
    assert ids(out, [TOOL]) == ids(folder, [TOOL])
    again = dspy_fst.load(out, dspy.ChainOfThought("question -> answer"), engine="in_process")
    assert ids(policy_of(again).checkpoint.path, [TOOL]) == ids(folder, [TOOL])
    (out / "additional_chat_templates" / "tool_use.jinja").write_text("changed")
    with pytest.raises(RunDirectoryError, match=r"additional_chat_templates/tool_use\.jinja"):
        dspy_fst.load(out, dspy.ChainOfThought("question -> answer"), engine="in_process")
