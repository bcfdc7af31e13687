"""The manifest of a folder lists all its files: `seal` writes it, `verify` compares the folder with it.

A manifest reveals damage and foreign files. It does not prove who made the folder: whoever changes a file can change
the manifest too, so the readers of the files check their contents.
"""

import json
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dspy_fst.errors import RunDirectoryError
from dspy_fst.run.files import file_facts, flush, sha256_of, write_json

T = TypeVar("T")
MANIFEST = "manifest.json"
FORMAT = 2
"""1 had no manifest."""
MAX_JSON_BYTES = 64 * 2**20
"""Bytes of the largest JSON document that is read (ours: ten times a long run's population)."""
MAX_FILES = 1000


class FileFacts(BaseModel):
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
    files: dict[str, FileFacts] = Field(max_length=MAX_FILES)
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
            raise RunDirectoryError(f"{folder}: {name} was changed: its checksum is another; {_COPY_AGAIN}")


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
        raise RunDirectoryError(f"{path}: {sentences(error)}; {_COPY_AGAIN}") from error


def sentences(error: ValidationError) -> str:
    """What is wrong with a document and where, without its values, which may be secret."""
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}" for fault in error.errors())


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
