"""The tokens that end a reply: the union of all that a model's files name, for every engine alike.

Files disagree: a chat fine-tune often names its end of turn in the tokenizer only, or in generation_config.json only.
An engine that reads one of them runs on to ``max_tokens`` where another stops.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dspy import lm15


def stop_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Ids at which a reply ends: those of generation_config.json, config.json and the tokenizer."""
    found = [*_ids(getattr(tokenizer, "eos_token_id", None))]
    for name in ("generation_config.json", "config.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the file may be missing; one that cannot be read is told by the loader
        for holder in (settings, settings.get("text_config")):
            if isinstance(holder, dict):
                found += _ids(holder.get("eos_token_id"))
    return frozenset(found)


def with_stop_tokens(request: lm15.Request, ids: frozenset[int]) -> lm15.Request:
    """The request as it tells a server at which tokens to end, beside those that it names itself."""
    if not ids:
        return request
    asked = dict(request.config.extensions or {})
    asked["stop_token_ids"] = sorted({*ids, *asked.get("stop_token_ids", ())})
    return replace(request, config=replace(request.config, extensions=asked))


def _ids(value: Any) -> Iterator[int]:
    """What stands as ``eos_token_id``: nothing, one id or a list."""
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, int) and not isinstance(one, bool) and one >= 0:
            yield one
