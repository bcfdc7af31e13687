"""A model's config and tokenizer: read once for each content of config.json, and each reader has his own."""

import json
import os
import shutil

import pytest
import transformers

from dspy_fst.model_files.architectures import load_model
from dspy_fst.model_files.reading import read_config, read_tokenizer
from programs.lab import BASE


@pytest.fixture
def folder(tmp_path):
    """The laboratory's base in a folder of its own, which nobody has read yet."""
    return shutil.copytree(BASE, tmp_path / "model")


@pytest.fixture
def readings(monkeypatch):
    """The folders whose config transformers was asked for."""
    read, found = transformers.AutoConfig.from_pretrained, []
    monkeypatch.setattr(
        transformers.AutoConfig,
        "from_pretrained",
        lambda path, **options: (found.append(str(path)), read(path, **options))[1],
    )
    return found


def rewrite(folder, **changes):
    """Change the config. Neither the file's size nor its time tell it."""
    path = folder / "config.json"
    before = path.stat()
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}).ljust(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_config_is_read_once_for_the_weights_and_every_tokenizer(folder, readings):
    for _ in range(2):
        read_tokenizer(folder)
        load_model(folder, dtype="float32")
        assert read_config(folder).model_type == "qwen3"
    assert readings == [str(folder)]


def test_a_config_that_changed_is_read_again(folder):
    layers = read_config(folder).num_hidden_layers
    rewrite(folder, num_hidden_layers=layers + 1, layer_types=None)
    assert read_config(folder).num_hidden_layers == layers + 1


def test_who_changes_a_config_changes_nobody_else_s(folder):
    before = read_config(folder)
    read_config(folder).vocab_size = 7
    load_model(folder, dtype="float32").config.vocab_size = 7
    assert read_config(folder).vocab_size == before.vocab_size != 7
    assert read_config(folder).to_dict() == before.to_dict()
    assert read_config(folder).name_or_path == str(folder)


def test_a_config_that_names_other_files_is_not_remembered(folder, readings):
    rewrite(folder, configuration_files=["config.json"])
    read_config(folder)
    read_config(folder)
    assert readings == [str(folder)] * 2


@pytest.mark.parametrize("config", [None, '{"model_type": "none"}'])
def test_without_a_config_that_can_be_read_a_tokenizer_is_found_all_the_same(folder, config):
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert read_tokenizer(folder).vocab_size == read_tokenizer(BASE).vocab_size
    with pytest.raises((OSError, ValueError)):
        read_config(folder)
