"""Where a model's shape is known from: a folder, the hub's cache, a list of well-known models, or the hub itself.

If no hub answers, the user learns so within a second, before anything heavy is imported.
"""

import json
from functools import cache
from pathlib import Path

from dspy_fst.model_files.hub import hub_silence, in_cache

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
