"""A scripted expert at claims that need two documents: what a small base is taught of this program."""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from programs.hover.data import NOT_SUPPORTED, SUPPORTED, claims
from programs.hover.retrieval import Retriever
from programs.hover.world import documents

WORLDS = range(40)
"""Other worlds, in which the expert works: the base comes to know the names, and none of the facts."""
KEPT, HOPS = 2, 2
PLAYED = 3000
"""Claims that the expert is watched at."""


def subject(given: Mapping[str, Any]) -> str:
    """What the claim names: "Ada Bern" of "Ada Bern was born in a town ..."."""
    return str(given["claim"]).split(" was born", maxsplit=1)[0].split(" has its seat", maxsplit=1)[0]


def town(given: Mapping[str, Any]) -> str:
    """The town that the notes name; the subject when they name none."""
    found = re.findall(r"(?:born in|seat in) (\w+)", given["notes"])
    return str(found[-1]) if found else subject(given)


def first_passage(given: Mapping[str, Any]) -> str:
    """The text of the best passage, without its title."""
    return str(given["passages"][0]).split(" | ", 1)[1] if given["passages"] else "nothing"


def verdict(given: Mapping[str, Any]) -> str:
    """Supported when the notes hold the claim's last word."""
    last = str(given["claim"]).rstrip(".").rsplit(" ", 1)[-1]
    return SUPPORTED if last in re.findall(r"\w+", given["notes"]) else NOT_SUPPORTED


EXPERT: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "first_query": subject,
    "summarize": first_passage,
    "next_query": town,
    "judge": verdict,
}


def watched() -> dict[str, list[dict[str, Any]]]:
    """Inputs of each predictor, met while the expert worked, with what it answered as ``output``."""
    rng = random.Random("hover-expert")
    engines = [Retriever.over(documents(number)) for number in WORLDS]
    pools = [list(claims(0, (2,), number)) for number in WORLDS]
    met: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def answer(predictor: str, **given: Any) -> str:
        said = EXPERT[predictor](given)
        met[predictor].append({**given, "output": said})
        return said

    for _ in range(PLAYED):
        number = rng.choice(WORLDS)
        claim, notes = rng.choice(pools[number]).claim, ""
        for hop in range(HOPS):
            query = answer("next_query", claim=claim, notes=notes) if hop else answer("first_query", claim=claim)
            found = engines[number].search(query, KEPT)
            passages = [f"{document['title']} | {document['text']}" for document in found]
            notes = answer("summarize", claim=claim, notes=notes, passages=passages)
        answer("judge", claim=claim, notes=notes)
    return met
