"""Whole weights as one GGUF file, by llama.cpp's own converter, for llama.cpp, Ollama and LM Studio.

The converter is a script of llama.cpp's repository, ``convert_hf_to_gguf.py``. It is no dependency: it is looked for
where LLAMA_CPP says (the repository's folder, or the script), and on PATH, and runs as a process of its own.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dspy_fst.errors import ConfigurationError, ExportError

TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")
"""Values of the converter's ``--outtype``."""
SUFFIX = ".gguf"
WHERE = "LLAMA_CPP"
SCRIPT = "convert_hf_to_gguf.py"
NAMES = (SCRIPT, "convert-hf-to-gguf")
"""The script's name in llama.cpp, and the command of packages that hold it."""
INSTALL = (
    "GGUF files are made by llama.cpp's convert_hf_to_gguf.py, which is not here: clone llama.cpp, install its "
    "requirements/requirements-convert_hf_to_gguf.txt, and set LLAMA_CPP to its folder; or have the script on PATH"
)
UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"
LAST_WORDS = 1500
"""Characters of the converter's output that an error shows."""
LIMIT_S = 6 * 3600
"""Longest conversion: hours for hundreds of GB on a slow disk (ours)."""


def gguf_faults(wanted: str, *, lora: bool = False) -> list[str]:
    """Why no GGUF file can be made as ``wanted`` says, before any work.

    Args:
        wanted: One of `TYPES`, or a file's name that ends with ``.gguf``.
        lora: Whether LoRA adapters are exported without their base.
    """
    faults = ["gguf: it holds whole weights, and lora=True exports none; leave one of them out"] if lora else []
    if wanted not in TYPES and not wanted.endswith(SUFFIX):
        faults.append(f"gguf={wanted!r}: use one of {', '.join(TYPES)}, or a file's name that ends with {SUFFIX}")
    elif wanted.endswith(SUFFIX) and Path(wanted).exists():
        faults.append(f"gguf={wanted!r}: the file exists; name a new one")
    try:
        if _converter() is None:
            faults.append(INSTALL)
    except ConfigurationError as error:
        faults += error.faults
    return faults


def write_gguf(folder: Path, wanted: str, name: str) -> Path:
    """Convert a folder of whole weights.

    Args:
        folder: A Hugging Face folder.
        wanted: See `gguf_faults`. A type puts the file into the folder, as ``NAME-TYPE.gguf``. A file's name chooses
            the type by its end, e.g. ``mine-q8_0.gguf``; else it is the converter's ``auto``.
        name: The model's name in the file.

    Raises:
        ConfigurationError: there is no converter.
        ExportError: it failed, in its own words.
    """
    if (command := _converter()) is None:
        raise ConfigurationError([INSTALL])
    if wanted.endswith(SUFFIX):
        out = Path(wanted).resolve()
        kind = next((kind for kind in sorted(TYPES, key=len)[::-1] if out.stem.lower().endswith(kind)), "auto")
    else:
        out, kind = folder / f"{name}-{wanted}{SUFFIX}", wanted
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        made = Path(scratch) / out.name
        _run([*command, str(folder), "--outfile", str(made), "--outtype", kind, "--model-name", name])
        if not made.is_file():
            raise ExportError(f"{command[0]} ended without an error and wrote no {made.name}")
        made.rename(out)
    return out


def _run(command: list[str]) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # all that it needs is in the folder
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False
        )
    except OSError as error:
        raise ExportError(f"{command[0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"{command[0]} did not end within {LIMIT_S} s") from error
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip()
        raise ExportError(f"{_meaning(said)}It ended with code {ended.returncode}:\n{said[-LAST_WORDS:]}")


def _meaning(said: str) -> str:
    if UNKNOWN_TOKENIZER in said:
        return "llama.cpp does not know this model's tokenizer, so it cannot convert the weights. "
    if "ModuleNotFoundError" in said:
        return f"The converter of llama.cpp lacks a package; install its requirements for {sys.executable}. "
    return "The converter of llama.cpp failed. "


def _converter() -> list[str] | None:
    """The command's beginning; None where there is no converter.

    Raises:
        ConfigurationError: LLAMA_CPP names no converter.
    """
    if set_to := os.environ.get(WHERE):
        place = Path(set_to).expanduser()
        script = place / SCRIPT if place.is_dir() else place
        if not script.is_file():
            raise ConfigurationError([f"{WHERE}={set_to!r}: there is no {SCRIPT}; name llama.cpp's folder"])
        return [sys.executable, str(script)]
    beside = str(Path(sys.executable).parent)
    for name in NAMES:
        if found := shutil.which(name) or shutil.which(name, path=beside):
            return [sys.executable, found] if found.endswith(".py") else [found]
    return None
