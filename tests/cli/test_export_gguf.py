"""`dspy-fst export --gguf`: the contract with llama.cpp's converter, and the real one where it is at hand."""

import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.constants import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import dspy_fst
from dspy_fst.errors import ConfigurationError, ExportError
from dspy_fst.policy_lm import policy_of
from dspy_fst.saving.export import export
from dspy_fst.saving.gguf_file import SCRIPT, write_gguf
from programs import smollm2
from programs.lab import build
from tests.cli.conftest import invoke
from tests.serve.command import saved_lab

REAL = os.environ.get("LLAMA_CPP")
"""llama.cpp's folder, or its script, where somebody has it."""
CONVERTER = f"""#!{sys.executable}
import json, os, pathlib, sys
folder, _, outfile, _, outtype, _, name = sys.argv[1:]
assert (pathlib.Path(folder) / "model.safetensors").is_file()
assert sys.argv[2::2] == ["--outfile", "--outtype", "--model-name"]
assert os.environ["HF_HUB_OFFLINE"] == "1"
pathlib.Path(outfile).write_text(json.dumps([outtype, name]))
"""


def script(folder: Path, text: str, name: str = SCRIPT) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(stat.S_IRWXU)
    return folder


@pytest.fixture
def without(monkeypatch, tmp_path):
    """A machine without a converter."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_lab(tmp_path_factory.mktemp("saved") / "program")


# ---- the contract ----------------------------------------------------------------------------------


def test_a_type_puts_the_file_into_the_folder_which_is_still_a_program(saved, tmp_path, without, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(script(tmp_path / "llama.cpp", CONVERTER)))
    invoke("export", saved, tmp_path / "mine", "--gguf", "q8_0")
    assert (tmp_path / "mine" / "mine-q8_0.gguf").read_text() == '["q8_0", "mine"]'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama.cpp", "mine"]
    policy_of(dspy_fst.load(tmp_path / "mine", build(train=4, val=0, test=0).program)).release()


@pytest.mark.parametrize(
    ("name", "outtype"), [("model-BF16.gguf", "bf16"), ("model.gguf", "auto"), ("a.f16.gguf", "f16")]
)
def test_a_file_s_name_says_the_type(saved, tmp_path, without, monkeypatch, name, outtype):
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin", CONVERTER)))
    export(saved, tmp_path / "mine", gguf=str(tmp_path / name))
    assert (tmp_path / name).read_text() == f'["{outtype}", "mine"]'
    assert not list((tmp_path / "mine").glob("*.gguf"))


def test_a_package_s_command_is_found_too(saved, tmp_path, without, monkeypatch):
    monkeypatch.setenv("PATH", str(script(tmp_path / "bin", CONVERTER, "convert-hf-to-gguf")))
    export(saved, tmp_path / "mine", gguf="f32")
    assert (tmp_path / "mine" / "mine-f32.gguf").is_file()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import sys; sys.exit('no such architecture')", "failed. It ended with code 1:\nno such architecture"),
        ("import nothing_of_this_name", "lacks a package; install its requirements"),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized')", "does not know this model's tokenizer"),
        ("", "ended without an error and wrote no mine-f16.gguf"),
    ],
    ids=["refused", "package", "tokenizer", "nothing written"],
)
def test_a_converter_that_fails_is_told_in_its_words_and_leaves_nothing(
    saved, tmp_path, without, monkeypatch, text, complaint
):
    monkeypatch.setenv("LLAMA_CPP", str(script(tmp_path / "llama.cpp", text) / SCRIPT))
    assert complaint in invoke("export", saved, tmp_path / "mine", "--gguf", "f16", code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"gguf": "f16"}, "are made by llama.cpp's convert_hf_to_gguf.py, which is not here: clone llama.cpp"),
        ({"gguf": "q4"}, "gguf='q4': use one of f32, f16"),
        ({"gguf": "f16", "lora": True}, "it holds whole weights, and lora=True exports none"),
    ],
    ids=["no converter", "type", "lora"],
)
def test_what_cannot_be_converted_is_refused_before_work(saved, tmp_path, without, arguments, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        export(saved, tmp_path / "mine", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_place_is_refused(saved, tmp_path, without, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"LLAMA_CPP='.*': there is no convert_hf_to_gguf.py"):
        export(saved, tmp_path / "mine", gguf="f16")


# ---- the real converter ----------------------------------------------------------------------------


needs_converter = pytest.mark.skipif(not REAL, reason="LLAMA_CPP does not name llama.cpp's converter")


@needs_converter
def test_llama_cpp_s_own_converter_writes_the_same_numbers(tmp_path):
    """On a small model with a tokenizer that llama.cpp knows."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2.folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    read = GGUFReader(write_gguf(tmp_path / "model", "f32", "small"))
    tensors = {tensor.name: tensor for tensor in read.tensors}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, ours in (
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        assert tensors[name].tensor_type == GGMLQuantizationType.F32
        assert torch.equal(torch.from_numpy(tensors[name].data.copy()), theirs[ours])
    assert read.get_field("general.name").contents() == "small"
    assert read.get_field("tokenizer.chat_template").contents() == tokenizer.chat_template
    assert len(read.get_field("tokenizer.ggml.tokens").data) == len(tokenizer)


@needs_converter
def test_a_tokenizer_that_llama_cpp_does_not_know_is_told(saved, tmp_path):
    with pytest.raises(ExportError, match=r"llama[.]cpp does not know this model's tokenizer"):
        export(saved, tmp_path / "mine", gguf="f32")
