"""The tokens that end a reply: the union of those that a model's files name, the same for every engine.

A model's files may disagree. A chat fine-tune often names its end of turn only in the tokenizer, or only in
generation_config.json. An engine that reads just one of them samples on to ``max_tokens`` where another engine stops.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dspy import lm15

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_ids(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids of the tokens that end a reply, from generation_config.json, config.json and the tokenizer."""
    ids = [*_ids(getattr(tokenizer, "eos_token_id", None))]
    for name in ("generation_config.json", "config.json"):
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # the file may be missing; the loader reports one that cannot be read
        for holder in (settings, settings.get("text_config")):
            if isinstance(holder, dict):
                ids += _ids(holder.get("eos_token_id"))
    return frozenset(ids)


def with_stop_tokens(request: lm15.Request, ids: frozenset[int]) -> lm15.Request:
    """The request with these ids added to its stop tokens, so that a server ends the reply there."""
    if not ids:
        return request
    extensions = dict(request.config.extensions or {})
    extensions["stop_token_ids"] = sorted({*ids, *extensions.get("stop_token_ids", ())})
    return replace(request, config=replace(request.config, extensions=extensions))


def _ids(value: object) -> Iterator[int]:
    """The ids in an ``eos_token_id``, which may be missing, one id or a list."""
    values: Iterable[object] = value if isinstance(value, list) else [value]
    for item in values:
        if isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            yield item
