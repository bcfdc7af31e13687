"""The allowed contents of a folder of weights from somebody else: plain files without code and without references."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from dspy_fst.run.manifest import read_document

SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".model"}
"""Weights, configuration, chat templates and vocabularies. Other files, e.g. pickles, can run code when read."""
TEMPLATES = "additional_chat_templates"
"""The one folder allowed among the weights: transformers' place for named chat templates, ``NAME.jinja``."""
NEEDED = ("config.json", "model.safetensors")
ELSEWHERE, CODE = "it can name a file elsewhere", "it can bring code, and trust_remote_code stays off"
FILES = {"adapter_config.json": "it can name another model to load", "model.safetensors.index.json": ELSEWHERE}
KEYS = {
    **dict.fromkeys(("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation"), CODE),
    **dict.fromkeys(("experts_implementation", "_experts_implementation"), CODE),
    **dict.fromkeys(("transformers_weights", "init_inputs", "speculators_config"), ELSEWHERE),
}
"""Keys of the model, generation or tokenizer configuration that lead out of the folder (transformers 5.19)."""


def weights_faults(folder: Path, aside: Collection[str] = ()) -> list[str]:
    """Why a Hugging Face folder must not be loaded, one sentence each; names in ``aside`` are not checked."""
    paths = sorted(path for path in folder.iterdir() if path.name not in aside) if folder.is_dir() else []
    names = {path.name for path in paths}
    faults = [f"{folder.name}/{name} is missing" for name in NEEDED if name not in names]
    for path in paths:
        where = f"{folder.name}/{path.name}"
        if path.name == TEMPLATES and path.is_dir() and not path.is_symlink():
            faults += [
                f"{where}/{inner.name}: only chat templates (NAME.jinja) lie there, no folders and no links"
                for inner in sorted(path.iterdir())
                if inner.suffix != ".jinja" or inner.is_symlink() or not inner.is_file()
            ]
        elif path.suffix not in SUFFIXES or not path.is_file():
            faults.append(f"{where}: only {', '.join(sorted(SUFFIXES))} files are read, as others can run code")
        elif path.name in FILES:
            faults.append(f"{where}: {FILES[path.name]}")
        elif path.name.endswith("config.json"):
            faults += [f"{where} sets {key!r}: {why}" for key, why in _leading_out(read_document(path))]
    return faults


def _leading_out(document: object) -> Iterator[tuple[str, str]]:
    """(key, reason) at any depth for keys that lead out of the folder."""
    left = [document]
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, Mapping):
            left += value.values()
            for key in value:
                why = ELSEWHERE if key.endswith("_file") else KEYS.get(key)
                if why and value[key]:
                    yield key, why
