"""A small invented world: who was born where, works for whom, wrote what. 120 documents, always the same."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypedDict

PEOPLE, TOWNS, COMPANIES, RIVERS, BOOKS = 44, 20, 20, 12, 24
CRAFTS = ("glass", "bells", "saddles", "lace", "clocks", "kites", "cheese", "paper", "violins", "rope", "ink", "tiles")
ADJECTIVES = ("Silent", "Broken", "Amber", "Distant", "Hollow", "Scarlet")
NOUNS = ("Harbour", "Orchard", "Lantern", "Meadow", "Staircase", "Compass", "Winter", "Garden", "Bridge", "Mirror")
TRADES = ("Works", "Press", "Mills", "Traders")
SYLLABLES = (
    "al",
    "bren",
    "dor",
    "esk",
    "fal",
    "gri",
    "hul",
    "iv",
    "jor",
    "kel",
    "lum",
    "mar",
    "nes",
    "ost",
    "pel",
    "rin",
)


class Document(TypedDict):
    """One short article."""

    title: str
    text: str


@dataclass(frozen=True)
class Person:
    name: str
    birthplace: "Town"
    employer: "Company"


@dataclass(frozen=True)
class Town:
    name: str
    river: str
    year: str
    craft: str


@dataclass(frozen=True)
class Company:
    name: str
    seat: Town
    founder: str
    """A person's name."""


@dataclass(frozen=True)
class Book:
    title: str
    author: Person
    publisher: Company


@dataclass(frozen=True)
class World:
    people: tuple[Person, ...]
    towns: tuple[Town, ...]
    companies: tuple[Company, ...]
    rivers: tuple[str, ...]
    books: tuple[Book, ...]


@cache
def world(other: int | None = None) -> World:
    """Draw the world; a fixed name seeds it, so that the documents never change.

    Args:
        other: Number of another world, with the same names of people, towns and rivers and facts of its own.
    """
    rng = random.Random("hover-world")
    names = _names(rng)
    if other is not None:
        rng = random.Random(f"hover-world-{other}")
    rivers = tuple(next(names) for _ in range(RIVERS))
    facts = [(rivers[i % RIVERS], str(1100 + 37 * i), CRAFTS[i % len(CRAFTS)]) for i in range(TOWNS)]
    if other is not None:
        facts = list(zip(*(rng.sample(column, TOWNS) for column in zip(*facts, strict=True)), strict=True))
    towns = tuple(Town(next(names), *fact) for fact in facts)
    people_names = [f"{next(names)} {next(names)}" for _ in range(PEOPLE)]
    founders = rng.sample(people_names, COMPANIES)
    companies = tuple(
        Company(f"{next(names)} {rng.choice(TRADES)}", rng.choice(towns), founder) for founder in founders
    )
    people = tuple(Person(name, rng.choice(towns), rng.choice(companies)) for name in people_names)
    titles = rng.sample([f"The {a} {n}" for a in ADJECTIVES for n in NOUNS], BOOKS)
    books = tuple(
        Book(title, author, rng.choice(companies))
        for title, author in zip(titles, rng.sample(people, BOOKS), strict=True)
    )
    return World(people, towns, companies, rivers, books)


def _names(rng: random.Random) -> Iterator[str]:
    """Invented words of three syllables, no two alike."""
    words = [(a + b + c).capitalize() for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]
    return iter(rng.sample(words, len(words)))


def spelled(text: str) -> str:
    """The text with its invented names in syllables: "Falbrenjor" is "Fal bren jor"."""
    name = re.compile(rf"\b(?:{'|'.join(SYLLABLES)}){{3}}\b", re.IGNORECASE)
    return name.sub(lambda found: " ".join(re.findall("|".join(SYLLABLES), found[0], re.IGNORECASE)), text)


def documents(other: int | None = None) -> list[Document]:
    """The corpus: an article on everything in the world, or in another one."""
    w = world(other)
    texts = {
        **{p.name: f"{p.name} was born in {p.birthplace.name} and works for {p.employer.name}." for p in w.people},
        **{
            t.name: f"{t.name} is a town on the river {t.river}. It was founded in {t.year} and is known for {t.craft}."
            for t in w.towns
        },
        **{
            c.name: f"{c.name} is a company with its seat in {c.seat.name}. Its founder is {c.founder}."
            for c in w.companies
        },
        **{
            river: f"The {river} is a river that runs past {' and '.join(t.name for t in w.towns if t.river == river)}."
            for river in w.rivers
        },
        **{b.title: f"{b.title} is a novel by {b.author.name}, published by {b.publisher.name}." for b in w.books},
    }
    return [Document(title=title, text=text) for title, text in texts.items()]
