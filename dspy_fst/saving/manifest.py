"""What a folder that may come from somebody else can hold: the files of its manifest, and weights without code.

The manifest lists all files of a folder: `seal` writes it, `verify` compares the folder with it. It reveals damage and
foreign files. It does not prove who made the folder: whoever changes a file can change the manifest too, so the readers
of the files check their contents. `weights_faults` does so for a folder of weights: plain files without code and
without references.
"""

import json
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspy_fst.errors import ConfigurationError, RunDirectoryError
from dspy_fst.model_files.lora_folder import CONFIG, INDEX, INSIDE, SETTINGS, TENSORS, lora_parts
from dspy_fst.recipe.declared import sentences
from dspy_fst.run.files import file_facts, flush, sha256_of, write_json

# ---- the manifest --------------------------------------------------------------------------------


T = TypeVar("T")
MANIFEST = "manifest.json"
FORMAT = 2
"""1 had no manifest."""
MAX_JSON_BYTES = 64 * 2**20
"""Bytes of the largest JSON document that is read (ours: ten times a long run's population)."""
MAX_FILES = 1000


class ManifestEntry(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """The contents of manifest.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: int
    package: str
    """Version of dspy_fst that wrote the folder."""
    files: dict[str, ManifestEntry] = Field(max_length=MAX_FILES)
    """Path below the folder, with slashes -> its size and checksum."""


def seal(folder: Path, package: str) -> None:
    """Write the manifest of the folder, and flush all of it to the disk."""
    files = _files_in(folder)
    facts = {name: file_facts(path) for name, path in files.items()}
    write_json(folder / MANIFEST, {"format": FORMAT, "package": package, "files": facts})
    for path in (*folder.rglob("*"), folder):
        flush(path)


def verify(folder: Path, aside: Collection[str] = ()) -> None:
    """Check that the folder holds exactly the files of its manifest, unchanged. Links are not followed.

    Args:
        aside: Files and folders at the top level that nothing here reads; they may be changed, added or missing.

    Raises:
        RunDirectoryError: it does not; the message names the file and says what to do.
    """
    if not folder.is_dir():
        raise RunDirectoryError(f"{folder} is not a folder; name one written by dspy_fst.save")
    present = _files_in(folder)
    if present.pop(MANIFEST, None) is None:
        raise RunDirectoryError(
            f"{folder} has no {MANIFEST}: it was saved by an earlier release, or is no saved program. To save it anew, "
            "compile again with its run_dir, which gives the finished program back"
        )
    listed = _without(aside, _read_manifest(folder / MANIFEST).files)
    present = _without(aside, present)
    if missing := sorted(listed.keys() - present.keys()):
        raise RunDirectoryError(f"{folder}: {', '.join(missing)} is missing; {_COPY_AGAIN}")
    if foreign := sorted(present.keys() - listed.keys()):
        raise RunDirectoryError(
            f"{folder}: {', '.join(foreign)} does not belong to the saved program; remove it if you put it there, else "
            "do not use the folder"
        )
    for name, facts in listed.items():
        if (size := present[name].stat().st_size) != facts.bytes:
            raise RunDirectoryError(f"{folder}: {name} has {size} bytes instead of {facts.bytes}; {_COPY_AGAIN}")
        if sha256_of(present[name]) != facts.sha256:
            raise RunDirectoryError(f"{folder}: {name} was changed: its checksum differs; {_COPY_AGAIN}")


def _without(aside: Collection[str], files: dict[str, T]) -> dict[str, T]:
    return {name: facts for name, facts in files.items() if name.partition("/")[0] not in aside}


_COPY_AGAIN = "copy the folder again from where it was saved, or save the program again"


def read_document(path: Path) -> Any:
    """Read a JSON document.

    Raises:
        RunDirectoryError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} cannot be read: {error}; {_COPY_AGAIN}") from error


def _read_manifest(path: Path) -> Manifest:
    document = read_document(path)
    if isinstance(document, dict) and document.get("format") != FORMAT:
        raise RunDirectoryError(
            f"{path} has format {document.get('format')!r}, this release reads {FORMAT}; load it with dspy_fst "
            f"{document.get('package')!r}"
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        raise RunDirectoryError(f"{path}: {'; '.join(sentences(error))}; {_COPY_AGAIN}") from error


def _files_in(folder: Path) -> dict[str, Path]:
    """Path below the folder -> path, for every file.

    Raises:
        RunDirectoryError: there is a link, a device or the like, or far more files or bytes than a program has.
    """
    files = {}
    for path in folder.rglob("*"):
        kind = path.lstat().st_mode
        name = path.relative_to(folder).as_posix()
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise RunDirectoryError(
                f"{folder}: {name} is a link or no ordinary file, and is not followed; a saved program holds its files "
                "themselves"
            )
        if stat.S_ISREG(kind):
            files[name] = path
            if path.suffix == ".json" and path.stat().st_size > MAX_JSON_BYTES:
                raise RunDirectoryError(f"{folder}: {name} is larger than {MAX_JSON_BYTES} bytes, and is not read")
        if len(files) > MAX_FILES:
            raise RunDirectoryError(f"{folder} holds more than {MAX_FILES} files; a saved program has a few")
    return files


# ---- the weights ---------------------------------------------------------------------------------


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
    """Why a folder of weights must not be loaded, one sentence each; names in ``aside`` are not checked.

    It is a Hugging Face folder, or one of LoRA adapters with their base in it (see `dspy_fst.model_files.lora_folder`).
    """
    if (folder / INDEX).is_file():
        return _adapted_faults(folder)
    paths = sorted(path for path in folder.iterdir() if path.name not in aside) if folder.is_dir() else []
    names = {path.name for path in paths}
    faults = [f"{folder.name}/{name} is missing" for name in NEEDED if name not in names]
    for path in paths:
        where = f"{folder.name}/{path.name}"
        if path.name == TEMPLATES and path.is_dir() and not path.is_symlink():
            faults += [
                f"{where}/{inner.name}: only chat templates (NAME.jinja) belong there, no folders and no links"
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


def _adapted_faults(folder: Path) -> list[str]:
    try:
        parts = lora_parts(folder)
    except ConfigurationError as error:
        return list(error.faults)
    assert parts is not None, "the index is there"
    base, adapters, _ = parts
    faults = [] if base == (folder / INSIDE).resolve() else [f"{folder.name}/{INDEX}: its base lies elsewhere"]
    foreign = sorted({path.name for path in folder.iterdir()} - {INDEX, INSIDE, *adapters})
    faults += [f"{folder.name}/{name} is no part of LoRA adapters and their base" for name in foreign]
    faults += [f"{folder.name}/{fault}" for fault in weights_faults(folder / INSIDE)]
    return faults + [fault for path in adapters.values() for fault in _adapter_faults(path)]


def _adapter_faults(folder: Path) -> Iterator[str]:
    """Faults of one peft folder."""
    where = f"{folder.parent.name}/{folder.name}"
    present = {path.name for path in folder.iterdir() if path.is_file()} if folder.is_dir() else set()
    if present != {CONFIG, TENSORS} or len(list(folder.iterdir())) != len(present):
        yield f"{where}: a LoRA adapter is the files {CONFIG} and {TENSORS} and nothing else"
        return
    settings = read_document(folder / CONFIG)
    if not isinstance(settings, Mapping) or not settings.keys() <= SETTINGS:
        yield f"{where}/{CONFIG} sets more than a LoRA adapter of ours has: {', '.join(sorted(SETTINGS))}"
    elif settings.get("base_model_name_or_path") is not None:
        yield f"{where}/{CONFIG} names another model to load"


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
