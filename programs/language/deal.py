"""Sentences from our own phrases, each dealt once: sets that are dealt one after the other share no sentence."""

import itertools
import random
from collections.abc import Iterator, Sequence


def deal(name: str, template: str, *gaps: Sequence[str]) -> Iterator[str]:
    """Every filling of a template's gaps, each once, in an order that the name decides.

    >>> sorted(deal("greetings", "{}, {}!", ("Hello", "Good day"), ("you", "world")))
    ['Good day, world!', 'Good day, you!', 'Hello, world!', 'Hello, you!']
    """
    sentences = [template.format(*filling) for filling in itertools.product(*gaps)]
    random.Random(name).shuffle(sentences)
    return iter(sentences)
