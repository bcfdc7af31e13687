"""Whether a hub model, or at least its shape, is available: in huggingface_hub's cache, or because the hub answers.

The shapes of some well-known models are listed here. If no hub answers, the user learns so within a second, before
anything heavy is imported.
"""

import json
from functools import cache
from pathlib import Path
from typing import Literal

from dspy_fst.model_files.folder import WHOLE
from dspy_fst.model_files.reach import ANSWER_S, why_silent

Cached = Literal["whole", "in part", "not"]
ELSEWHERE = (
    "Fetch it where the hub can be reached (hf download {name} --local-dir FOLDER) and give the folder as the model; a "
    "proxy or a mirror is named by HTTPS_PROXY or HF_ENDPOINT"
)


def means_a_path(model: str) -> bool:
    """Whether a model's name must be a path, because it is not of the form ``name`` or ``owner/name``, or exists."""
    return Path(model).exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1


def hub_fault(name: str, seconds: float = ANSWER_S) -> str | None:
    """Why a hub model is not available; None if it is cached whole, or the hub answers within ``seconds``."""
    if (cached := in_cache(name)) == "whole" or (silence := hub_silence(seconds)) is None:
        return None
    part = "; the cache holds a part of it only" if cached == "in part" else ""
    return (
        "there is no such folder, and as a hub model it is not a model that this machine has or can get: "
        f"{silence}{part}. {ELSEWHERE.format(name=name)}"
    )


def hub_warnings(name: str) -> list[str]:
    """A warning if a cached model will be read while the hub is silent: transformers then waits for each file."""
    from huggingface_hub import is_offline_mode

    if Path(name).is_dir() or is_offline_mode() or in_cache(name) != "whole" or (silence := hub_silence()) is None:
        return []
    return [f"model={name!r} is read from the cache, as {silence}; set HF_HUB_OFFLINE=1, so that nothing waits for it"]


def hub_silence(seconds: float = ANSWER_S) -> str | None:
    """Why the hub cannot be reached; None if it answers within ``seconds``.

    HF_ENDPOINT, HF_HUB_OFFLINE and the environment's proxies are respected.
    """
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.utils import get_session

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    silence = why_silent(constants.ENDPOINT, get_session(), seconds)
    return f"{constants.ENDPOINT} cannot be reached ({silence})" if silence else None


def read_from(name: str, seconds: float = ANSWER_S) -> Path:
    """Where a hub model's small files are read from: the cache, if it is whole there and the hub is silent.

    A library that is given the name asks the silent hub for every file that the model lacks, 23 s long for each.
    """
    folder = _cached_folder(name)
    if folder is None or not _is_whole(folder) or hub_silence(seconds) is None:
        return Path(name)
    return folder


def in_cache(name: str) -> Cached:
    """How much of a model huggingface_hub's cache holds: config and all weights, only a part, or nothing."""
    if (folder := _cached_folder(name)) is None:
        return "not"
    return "whole" if _is_whole(folder) else "in part"


def _cached_folder(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() and _has_weights(folder)


def _has_weights(folder: Path) -> bool:
    for name in WHOLE:
        file = folder / name
        if file.is_file() and (not name.endswith(".json") or all((folder / part).is_file() for part in _parts(file))):
            return True
    return False


def _parts(index: Path) -> set[str]:
    """The files that an index of weights names. An unreadable index counts as its own only part; loading reports it."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {index.name}


LIST = Path(__file__).with_name("known_models.json")


@cache
def known_models() -> dict[str, dict[str, object]]:
    """Hub name -> the public values of its config.json that shape the model."""
    known: dict[str, dict[str, object]] = json.loads(LIST.read_text(encoding="utf-8"))
    return known


def unknown_fault(model: str) -> str | None:
    """Why a model's shape cannot be known here, as a sentence; None if it may be known."""
    if Path(model).is_dir():
        if (Path(model) / "config.json").is_file():
            return None
        return f"model={model!r}: the folder holds no config.json; give one that does"
    if model in known_models() or in_cache(model) != "not" or (silence := hub_silence()) is None:
        return None
    return (
        f"model={model!r}: there is no such folder, as a hub model its config is not on this machine, and {silence}; "
        f"give a folder that holds its config.json, or one of {', '.join(known_models())}"
    )
