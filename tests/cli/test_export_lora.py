"""`dspy-fst export` of programs with LoRA adapters: the adapters alone, or merged weights, one folder a predictor."""

import json
import shutil

import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dspy_fst
from dspy_fst import ConfigurationError, LoRA
from dspy_fst.errors import RunDirectoryError
from dspy_fst.model_files.weights_digest import weights_digest
from dspy_fst.policy_lm import policy_of
from dspy_fst.saving.export import export
from programs.lab import BASE
from tests.cli.conftest import invoke
from tests.relay import Relay, relay
from tests.test_compile import compile_relay

SEQUENCE = [5, 6, 7, 8, 9, 11, 3, 2, 40, 17, 8]
SHORT = {"cycles": 1, "steps_per_cycle": 2, "learning_rate": 5e-3, "warmup_steps": 0, "method": "rl"}
ADAPTER = LoRA(rank=4, alpha=16)
OF = {"first": "for-first", "last": "for-last"}


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A run with an adapter for each predictor: its directory, and adapter -> scores of the engine that it ran on."""
    run_dir = tmp_path_factory.mktemp("apart") / "run"
    compiled = compile_relay(run_dir, adapter=ADAPTER, adapters="per_predictor", **SHORT)
    engine = policy_of(compiled).handle.ready()
    scores = {name: torch.tensor(engine.score([SEQUENCE], adapter=name)[0]) for name in OF.values()}
    policy_of(compiled).release()
    return run_dir, scores


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The same with one adapter for all."""
    run_dir = tmp_path_factory.mktemp("shared") / "run"
    compiled = compile_relay(run_dir, adapter=LoRA(rank=4, rslora=True, target=("q_proj", "down_proj")), **SHORT)
    scores = torch.tensor(policy_of(compiled).handle.ready().score([SEQUENCE])[0])
    policy_of(compiled).release()
    return run_dir, scores


def base_model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@torch.no_grad()
def scores_of(model):
    ids = torch.tensor([SEQUENCE])
    return model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def card_in(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def code_in(card, word):
    """The Python block of a card that holds a word."""
    blocks = [block.partition("```")[0] for block in card.split("```python\n")[1:]]
    return next(block for block in blocks if word in block)


# ---- the adapters alone ----------------------------------------------------------------------------


def test_each_adapter_of_a_program_is_a_peft_folder(apart, tmp_path):
    run_dir, scores = apart
    outcome = json.loads(invoke("export", run_dir, tmp_path / "out", "--lora", "--json").stdout)
    assert outcome["files"] == ["README.md", "for-first", "for-last", "population.json", "program.json"]
    for name in OF.values():
        folder = tmp_path / "out" / name
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert PeftConfig.from_pretrained(folder).base_model_name_or_path == str(BASE)
        loaded = PeftModel.from_pretrained(base_model(), folder)
        assert torch.allclose(scores_of(loaded), scores[name], atol=1e-4)
    assert not torch.allclose(scores["for-first"], scores["for-last"], atol=1e-3)


def test_one_adapter_is_the_folder_itself(shared, tmp_path):
    run_dir, scores = shared
    out = export(run_dir, tmp_path / "out", lora=True)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in out.iterdir()}
    assert torch.allclose(scores_of(PeftModel.from_pretrained(base_model(), out)), scores, atol=1e-4)
    by_its_name = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)  # finds the base that the file names
    assert torch.allclose(scores_of(by_its_name), scores, atol=1e-4)


def test_the_card_s_own_lines_load_every_adapter(apart, tmp_path):
    run_dir, scores = apart
    out = export(run_dir, tmp_path / "out", lora=True)
    _, card = card_in(out)
    for library in ("peft", "load_adapter"):
        code = code_in(card, library).replace("FOLDER", str(out)).replace('"BASE"', repr(str(BASE)))
        names = {}
        exec(code, names)
        assert torch.allclose(scores_of(names["model"]), scores["for-first"], atol=1e-4)
    code = code_in(card, "program.load").replace("FOLDER", str(out)).replace("program = ...", "pass")
    names = {"program": Relay()}
    exec(code.replace("dspy.configure", "dict"), names)
    spoken = {name: predictor.lm for name, predictor in names["program"].named_predictors()}
    assert {name: lm.model for name, lm in spoken.items()} == {"first": "openai/for-first", "last": "openai/for-last"}
    assert {lm.kwargs["temperature"] for lm in spoken.values()} == {1.5}
    assert "--lora-modules for-first=FOLDER/for-first for-last=FOLDER/for-last" in card
    assert "--enable-lora --max-lora-rank 8 --max-loras 2" in card


def test_the_card_names_base_predictors_and_texts(apart, tmp_path):
    run_dir, _ = apart
    head, card = card_in(export(run_dir, tmp_path / "out", lora=True))
    assert head["library_name"] == "peft"
    assert head["base_model_relation"] == "adapter"
    assert "base_model" not in head, "others do not have a folder of this machine"
    assert str(BASE.parent) not in card
    assert {"lora", "dspy"} <= set(head["tags"])
    assert "| for-first | first | 4 | 16 | 28 |" in card
    assert f"`{weights_digest(BASE)}`" in card
    assert "Reverse the list." in card


def test_the_base_is_named_as_others_know_it(apart, tmp_path):
    run_dir, _ = apart
    invoke("export", run_dir, tmp_path / "hub", "--lora", "--base", "some/model")
    head, card = card_in(tmp_path / "hub")
    assert head["base_model"] == "some/model"
    assert 'AutoModelForCausalLM.from_pretrained("some/model")' in card
    assert "vllm serve some/model " in card
    config = json.loads((tmp_path / "hub" / "for-last" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"


def test_a_base_with_other_numbers_is_refused(apart, tmp_path):
    run_dir, _ = apart
    other = shutil.copytree(BASE, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = torch.nextafter(tensors["model.norm.weight"], torch.tensor(9.0))
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    text = invoke("export", run_dir, tmp_path / "out", "--lora", "--base", other, code=2).stderr
    assert "it holds other weights than the LoRA adapters were trained on" in text
    copied = shutil.copytree(BASE, tmp_path / "copied")
    out = export(run_dir, tmp_path / "out", lora=True, base=str(copied))
    assert PeftConfig.from_pretrained(out / "for-first").base_model_name_or_path == str(copied)


def test_a_program_away_from_its_run_names_its_own_copy_of_the_base(apart, tmp_path):
    run_dir, scores = apart
    alone = shutil.copytree(run_dir / "compiled", tmp_path / "alone")
    out = export(alone, tmp_path / "out", lora=True)
    name = PeftConfig.from_pretrained(out / "for-last").base_model_name_or_path
    assert name == str(alone / "weights" / "base")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), out / "for-last")
    assert torch.allclose(scores_of(loaded), scores["for-last"], atol=1e-4)


def test_a_digest_does_not_depend_on_files_and_names(tmp_path):
    model = base_model()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="2MB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert weights_digest(tmp_path / "sharded") == weights_digest(BASE)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    assert weights_digest(tmp_path / "rounded") != weights_digest(BASE)
    with pytest.raises(ValueError, match="holds no safetensors files"):
        weights_digest(tmp_path)


# ---- merged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predictor", OF)
def test_one_predictor_s_weights_are_merged(apart, tmp_path, predictor):
    run_dir, scores = apart
    invoke("export", run_dir, tmp_path / "out", "--predictor", predictor)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(scores_of(merged), scores[OF[predictor]], atol=1e-4)
    _, card = card_in(tmp_path / "out")
    (other,) = OF.keys() - {predictor}
    assert f"These are the weights of the predictors `{predictor}`. `{other}` of this program speak with" in card
    assert f"program.{predictor}.lm = lm.copy" in card
    assert f"program.{other}.lm" not in card
    assert "dspy_fst.load" not in card


def test_several_adapters_are_not_merged_into_one(apart, tmp_path):
    run_dir, _ = apart
    text = invoke("export", run_dir, tmp_path / "out", code=2).stderr
    assert "speaks through 2 LoRA adapters (first through for-first; last through for-last)" in text
    assert "--lora" in text
    assert "--predictor NAME" in text
    assert not (tmp_path / "out").exists()


def test_a_shared_adapter_is_merged_for_any_predictor(shared, tmp_path):
    run_dir, scores = shared
    out = export(run_dir, tmp_path / "out", predictor="last")
    assert torch.allclose(scores_of(AutoModelForCausalLM.from_pretrained(out)), scores, atol=1e-4)
    loaded = dspy_fst.load(out, relay(), engine="in_process")
    policy_of(loaded).release()


@pytest.mark.parametrize("part", [{"lora": True}, {"predictor": "first"}], ids=["adapters", "one predictor"])
def test_a_part_of_a_program_is_not_loaded_as_one(apart, tmp_path, part):
    run_dir, _ = apart
    out = export(run_dir, tmp_path / "out", **part)
    with pytest.raises(RunDirectoryError, match="holds a part of a program's weights: LoRA adapters without"):
        dspy_fst.load(out, relay())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"lora": True, "predictor": "first"}, "names merged weights, and lora=True exports all adapters"),
        ({"predictor": "frist"}, "the program has no such predictor; there are first, last"),
        ({"predictor": "first", "base": "some/model"}, "whole weights need no base"),
    ],
    ids=["both", "unknown", "base"],
)
def test_what_cannot_be_exported_is_refused(apart, tmp_path, arguments, complaint):
    run_dir, _ = apart
    with pytest.raises(ConfigurationError, match=complaint):
        export(run_dir, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_whole_weights_have_no_adapter_to_export(finished, tmp_path):
    text = invoke("export", finished, tmp_path / "out", "--lora", code=2).stderr
    assert "lora: the program's weights are whole ones, without a LoRA adapter" in text


# ---- what else reads such a run ----------------------------------------------------------------------


def measured(target, folder, *flags):
    """The rows of `dspy-fst eval` on two problems."""
    (folder / "test.jsonl").write_text('{"numbers": "1 2 3 4"}\n{"numbers": "5 6 7 8 9"}\n')
    names = ("--program", "tests.relay:relay", "--metric", "tests.relay:any_answer", "--input", "numbers")
    told = invoke("eval", target, *names, "--split", folder / "test.jsonl", "--k", "2", "--json", *flags).stdout
    return json.loads(told)["results"]


@pytest.mark.parametrize("place", ["run", "saved"])
def test_a_program_with_several_adapters_is_evaluated(apart, tmp_path, place):
    copied = shutil.copytree(apart[0] if place == "run" else apart[0] / "compiled", tmp_path / place)
    (row,) = measured(copied, tmp_path)
    assert row["problems"] == 2
    assert 0 < row["mean"] <= 1


def test_both_halves_of_a_program_with_several_adapters_are_compared(apart, tmp_path):
    (table,) = measured(shutil.copytree(apart[0], tmp_path / "run"), tmp_path, "--two-by-two")
    assert len(table["cells"]) == 4
