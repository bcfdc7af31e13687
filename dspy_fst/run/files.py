"""Files that are complete or absent, JSON of our types, and disk errors as advice."""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError

from dspy_fst.errors import DiskError
from dspy_fst.types import Candidate, Population

DCP_METADATA = ".metadata"
"""A file of a state in parts: its name is torch.distributed.checkpoint's."""
_ADVICE = {
    errno.ENOSPC: "the disk is full; free space",
    errno.EDQUOT: "the disk quota is used up; free space",
    errno.EFBIG: "a file grew beyond what is allowed (ulimit -f, or the file system's limit); raise the limit",
    errno.EROFS: "the file system is read-only; mount it for writing",
    errno.EACCES: "writing there is not permitted; change the permissions",
    errno.EPERM: "writing there is not permitted; change the permissions",
    errno.EEXIST: "a file lies where a folder belongs; move it away",
    errno.EISDIR: "a folder lies where a file belongs; move it away",
    errno.ENOTDIR: "a file lies where a folder belongs; move it away",
    errno.EIO: "the disk fails; move the directory to another",
}


class FileFacts(TypedDict):
    """A file's size and checksum, e.g. ``{"bytes": 1024, "sha256": "9f86d0..."}``."""

    bytes: int
    sha256: str


class PopulationJson(TypedDict):
    """A population as JSON."""

    members: list[dict[str, str]]
    """The texts of each."""
    scores: list[float | None]
    parents: dict[str, list[str]]
    """Digest -> digests."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes below ``path``.

    Raises:
        DiskError: the disk refused to write. Everything committed before is complete.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _errno_in(str(error))
        if number not in _ADVICE:
            raise  # not an error of the disk: a listener's broken pipe, a file that a program removed
        advice = _ADVICE[number]
        raise DiskError(
            f"{path} cannot be written: {error}: {advice}, then go on with the same run_dir. What was committed is "
            "whole"
        ) from error


def _errno_in(message: str) -> int | None:
    """The errno that safetensors quotes as ``(os error 28)``; None without one."""
    _, _, rest = message.partition("(os error ")
    digits = rest.partition(")")[0]
    return int(digits) if digits.isdigit() else None


def write_json(path: Path, data: object, *, finite: bool = True, indent: int | None = 2) -> None:
    """Replace a document: a reader finds the old one or the new one, never a part."""
    partial = path.with_name(path.name + ".new")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(to_jsonable(data, finite=finite), file, indent=indent, allow_nan=not finite)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    flush(path.parent)


def read_json(path: Path) -> Any:
    """The document; None when it is absent or cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, to be filled and renamed to it; what is left of it at the end is removed."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp lets only its owner in; an engine may run as another user
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def probe_for(run_dir: Path) -> Iterator[Path]:
    """A file with random content in the nearest folder that exists, at or above ``run_dir``: who reads the same there
    sees the same folder. It is removed after the block."""
    folder = next(parent for parent in (run_dir, *run_dir.parents) if parent.is_dir())
    probe = folder / f".dspy-fst-probe-{uuid.uuid4().hex}"
    try:
        probe.write_text(uuid.uuid4().hex, encoding="utf-8")
        yield probe
    finally:
        probe.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if it exists. The target of a link stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_facts(path: Path) -> FileFacts:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def to_jsonable(value: object, *, finite: bool = True) -> Any:
    """The value in JSON's types. JSON has no NaN: it becomes None unless ``finite`` is False."""
    if isinstance(value, Population):
        return population_to_json(value)
    if is_dataclass(value) and not isinstance(value, type):
        return to_jsonable(asdict(value), finite=finite)
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item, finite=finite) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [to_jsonable(item, finite=finite) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)


def population_to_json(population: Population) -> PopulationJson:
    """A population as JSON; `population_from_json` is the inverse."""
    return {
        "members": [dict(member.texts) for member in population.members],
        "scores": list(population.scores),
        "parents": {digest: list(parents) for digest, parents in population.parents.items()},
    }


def population_from_json(data: PopulationJson) -> Population:
    return Population(
        members=tuple(Candidate(texts) for texts in data["members"]),
        scores=tuple(data["scores"]),
        parents={digest: tuple(parents) for digest, parents in data["parents"].items()},
    )
