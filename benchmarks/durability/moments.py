"""When a process dies: at the n-th passage of a place, or by the clock."""

import os
import random
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """The n-th passage of a place, before it, after it, or with half of it done (a file of which half was written)."""

    place: str
    """``"write journal"``, ``"rename state"``, ``"search rollout"``, ``"reflection"``, ..."""
    passage: int
    edge: str
    """``"before"``, ``"half"`` or ``"after"``."""

    def __str__(self) -> str:
        return f"{self.edge} {self.place} {self.passage}"


@dataclass(frozen=True)
class Clock:
    """A share of the undisturbed run's time."""

    share: float

    def __str__(self) -> str:
        return f"at {self.share:.0%} of the time"


Death = Moment | Clock


def draw_moments(counts: Mapping[str, int], number: int, rng: random.Random) -> list[Moment]:
    """Moments that cover the places as evenly as their number allows; passages and edges are drawn."""
    places = sorted(counts)
    rng.shuffle(places)
    drawn = []
    for place in (places[index % len(places)] for index in range(number)):
        edges = ("before", "half", "after") if place.startswith("write") else ("before", "after")
        drawn.append(Moment(place, rng.randint(1, counts[place]), rng.choice(edges)))
    return drawn


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal comes at once; nothing of the run goes on meanwhile
