"""Claims: about the invented world, true and false ones in equal parts, or those of HoVer."""

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dspy

from programs.common import PublicSet
from programs.hover.world import Town, world

PUBLIC = PublicSet("hover-nlp/hover", revision="refs/convert/parquet")
"""HoVer (arXiv 2011.03088), licence CC BY-SA 4.0. Unpinned: the hub's own conversion of a data set that has only a
loading script. That branch's commit could not be looked up when this was written; put it here for a run that counts."""

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"

ENDINGS = {
    "river": "on the river {}",
    "year": "that was founded in {}",
    "craft": "that is known for {}",
}
"""Fields of a Town and how a claim says them."""


@dataclass(frozen=True)
class Chain:
    """What leads from the things that a claim names to a town that it does not name."""

    words: str
    """E.g. "The author of The Amber Garden was born in a town"."""
    titles: tuple[str, ...]
    """The documents that have to be read, in this order; the last is the town's."""
    town: Town


def chains(other: int | None = None) -> list[Chain]:
    """All chains of two and three documents, in the world or in another one."""
    w = world(other)
    person = {p.name: p for p in w.people}
    found = [Chain(f"{p.name} was born in a town", (p.name,), p.birthplace) for p in w.people]
    found += [Chain(f"{c.name} has its seat in a town", (c.name,), c.seat) for c in w.companies]
    for p in w.people:
        words = f"The employer of {p.name} has its seat in a town"
        found.append(Chain(words, (p.name, p.employer.name), p.employer.seat))
    for c in w.companies:
        words = f"The founder of {c.name} was born in a town"
        found.append(Chain(words, (c.name, c.founder), person[c.founder].birthplace))
    for b in w.books:
        words = f"The author of {b.title} was born in a town"
        found.append(Chain(words, (b.title, b.author.name), b.author.birthplace))
        words = f"The publisher of {b.title} has its seat in a town"
        found.append(Chain(words, (b.title, b.publisher.name), b.publisher.seat))
    return [Chain(chain.words, (*chain.titles, chain.town.name), chain.town) for chain in found]


def claims(seed: int, hops: Collection[int], other: int | None = None) -> Iterator[dspy.Example]:
    """Every chain of so many documents with every ending, once, each second one false, in random order.

    One claim of a pair only: its negation in another set would give the answer away.
    """
    rng = random.Random(f"hover-{seed}")
    pairs = [(chain, ending) for chain in chains(other) if len(chain.titles) in hops for ending in ENDINGS]
    rng.shuffle(pairs)
    for index, (chain, field) in enumerate(pairs):
        right = getattr(chain.town, field)
        others = sorted({getattr(town, field) for town in world(other).towns} - {right})
        value = right if index % 2 == 0 else rng.choice(others)
        claim = f"{chain.words} {ENDINGS[field].format(value)}."
        yield _example(claim, list(chain.titles), value == right)


def public_example(row: Mapping[str, Any], least: int) -> dspy.Example | None:
    """A claim of at least `least` hops; None for any other row."""
    if row["num_hops"] < least:
        return None
    titles = list(dict.fromkeys(fact["key"] for fact in row["supporting_facts"]))
    return _example(row["claim"], titles, row["label"] == 1)


def _example(claim: str, titles: list[str], true: bool) -> dspy.Example:
    label = SUPPORTED if true else NOT_SUPPORTED
    return dspy.Example(claim=claim, titles=titles, label=label).with_inputs("claim")
