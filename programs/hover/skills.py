"""Everyday ways to search, take notes and judge, and the sentences that ask for them."""

import random
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from programs.hover import build
from programs.hover.data import NOT_SUPPORTED, SUPPORTED, claims
from programs.hover.retrieval import Retriever
from programs.hover.world import documents
from programs.tiny.skills import Course, Inputs, Skill

WORLDS = range(40)
"""Other worlds, whose claims the base is taught with: it knows the names, and none of the facts."""
KEPT = 2
PLAYED = 1500
"""Claims that are played by chance skills, for inputs such as predictors meet."""
NO_NOTES = "nothing"


def subject(given: Inputs) -> str:
    """What the claim names: "Ada Bern" of "Ada Bern was born in a town ..."."""
    found = re.match(
        r"(?:the (?:employer|founder|author|publisher) of )?(.+?) (?:was born|has its)", _claim(given), re.I
    )
    return found[1] if found else _claim(given)


def ending(given: Inputs) -> str:
    """The claim's last word: "glass" of "... that is known for glass."."""
    return _claim(given).rstrip(".").rsplit(" ", 1)[-1]


def place(given: Inputs) -> str:
    """The town that the notes name."""
    return _last(r"(?:born in|seat in) (\w+)", given)


def other(given: Inputs) -> str:
    """The employer, founder or author that the notes name."""
    return _last(r"(?:works for|founder is|novel by) (\w+ \w+)", given)


def _claim(given: Inputs) -> str:
    return str(given["claim"])


def _last(pattern: str, given: Inputs) -> str:
    found = re.findall(pattern, str(given["notes"]), re.I)
    return str(found[-1]) if found else subject(given)


def _texts(given: Inputs) -> list[str]:
    """The passages without their titles; GEPA's records hold them as one text."""
    passages = given["passages"]
    if isinstance(passages, str):
        passages = re.findall(r"""['"]([^'"]* \| [^'"]*)['"]""", passages)
    return [passage.split(" | ", 1)[1] for passage in passages]


def _titles(given: Inputs) -> str:
    passages = given["passages"]
    if isinstance(passages, str):
        passages = re.findall(r"""['"]([^'"]* \| [^'"]*)['"]""", passages)
    return ", ".join(passage.split(" | ", 1)[0] for passage in passages) or NO_NOTES


def _first(given: Inputs) -> str:
    return (_texts(given) or [NO_NOTES])[0]


def _added(given: Inputs) -> str:
    return " ".join([str(given["notes"]), *_texts(given)[:1]]).strip() or NO_NOTES


def _compared(given: Inputs) -> str:
    words = re.findall(r"\w+", str(given["notes"]).lower())
    return SUPPORTED if ending(given).lower() in words else NOT_SUPPORTED


FIRST_QUERIES = (
    Skill("subject", subject, ("ask for the name in the claim", "write who or what the claim is about"), guessed=2.0),
    Skill("ending", ending, ("ask for the last word of the claim", "write how the claim ends"), guessed=2.0),
    Skill("town", lambda given: "town", ("ask for a town", "write town"), guessed=2.0),
)
NEXT_QUERIES = (
    Skill("place", place, ("ask for the town in the notes", "write the place that the notes name")),
    Skill("other", other, ("ask for who else is in the notes", "write the second name in the notes")),
    Skill("subject", subject, ("ask for the name in the claim", "write who or what the claim is about")),
    Skill("ending", ending, ("ask for the last word of the claim", "write how the claim ends")),
)
SUMMARIES = (
    Skill("first", _first, ("copy the text of the first passage", "write what the first passage says")),
    Skill("added", _added, ("keep the notes and add the first passage", "write the notes, then the first passage")),
    Skill("titles", _titles, ("list the titles of the passages", "write which passages there are"), guessed=2.0),
    Skill("kept", lambda given: str(given["notes"]) or NO_NOTES, ("keep the notes as they are", "copy the notes")),
)
VERDICTS = (
    Skill("compared", _compared, ("say whether the notes have the last word of the claim", "look for how it ends")),
    Skill("yes", lambda given: SUPPORTED, ("believe the claim", "always say that it is supported")),
    Skill("no", lambda given: NOT_SUPPORTED, ("doubt the claim", "always say that it is not supported")),
)
SKILLS: Mapping[str, tuple[Skill, ...]] = {
    "first_query": FIRST_QUERIES,
    "summarize": SUMMARIES,
    "next_query": NEXT_QUERIES,
    "judge": VERDICTS,
}


@lru_cache(maxsize=1)
def _met() -> dict[str, list[dict[str, Any]]]:
    """Inputs of each predictor, met while claims of other worlds were played by the right skills or others."""
    rng = random.Random("hover-skills")
    engines = [Retriever.over(documents(number)) for number in WORLDS]
    pools = [list(claims(0, (2, 3), number)) for number in WORLDS]
    met: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def play(predictor: str, given: dict[str, Any]) -> str:
        met[predictor].append(given)
        skills = SKILLS[predictor]
        return (skills[0] if rng.random() < 0.7 else rng.choice(skills)).act(given)

    for _ in range(PLAYED):
        number = rng.choice(WORLDS)
        claim, notes = rng.choice(pools[number]).claim, ""
        for hop in range(2):
            query = (
                play("next_query", {"claim": claim, "notes": notes}) if hop else play("first_query", {"claim": claim})
            )
            found = engines[number].search(query, KEPT)
            passages = [f"{document['title']} | {document['text']}" for document in found]
            notes = play("summarize", {"claim": claim, "notes": notes, "passages": passages})
        play("judge", {"claim": claim, "notes": notes})
    return met


def courses() -> list[Course]:
    """What the base is taught of this program."""
    program = build(train=1, val=1, test=1, split="short").program
    shares = {"first_query": (0.08, 5), "summarize": (0.22, 2), "next_query": (0.12, 4), "judge": (0.1, 4)}
    return [
        Course(
            f"hover.{name}",
            getattr(program, name),
            SKILLS[name],
            lambda rng, name=name: rng.choice(_met()[name]),  # type: ignore[misc]
            share,
            problems,
        )
        for name, (share, problems) in shares.items()
    ]
