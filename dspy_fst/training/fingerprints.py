"""What a run is recognised by: short digests of its program, its problems and its model's files."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import dspy

from dspy_fst.model_files.lora_folder import model_files_in
from dspy_fst.saving.program_state import without_lms


def program_fingerprint(program: dspy.Module) -> str:
    """Of DSPy's own state of a program: signatures, instructions and demos; LMs and code are no part of it."""
    return fingerprint(without_lms(program).dump_state())


def fingerprint(data: object) -> str:
    """16 hexadecimal digits of plain data, the same in every process."""
    return hashlib.sha256(_same_in_every_process(data).encode("utf-8", "replace")).hexdigest()[:16]


def _same_in_every_process(data: object) -> str:
    """``repr`` without what differs from process to process: the order of sets, and addresses."""
    if isinstance(data, Mapping):
        return f"{{{', '.join(f'{key!r}: {_same_in_every_process(value)}' for key, value in data.items())}}}"
    if isinstance(data, set | frozenset):
        return f"{{{', '.join(sorted(map(_same_in_every_process, data)))}}}"
    if isinstance(data, list | tuple):
        return f"[{', '.join(map(_same_in_every_process, data))}]"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(data))


BLOCK, BLOCKS = 65_536, 64
"""How much of a model's file is read to recognise it: reading tens of gigabytes would take longer than to notice."""


def files_fingerprint(folder: Path) -> str | None:
    """Names, sizes and evenly spaced blocks of a model's weights and configuration; None for a hub name."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in (path for part in model_files_in(folder) for path in _files_of(part)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(BLOCK, size // BLOCKS)):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def _files_of(folder: Path) -> list[Path]:
    weights = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    return sorted([*weights, *folder.glob("config.json"), *folder.glob("adapter_config.json")])
