"""How the three tasks say what was wrong, and a proposer that reads nothing else.

>>> told("desk", "office", "garden", "crowns")
"desk: expected 'office', got 'garden'; the words that mattered: 'crowns'."
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 80
"""Characters of a wrong answer that feedback repeats."""
LONGEST = 5
"""Sentences that a proposed instruction keeps; beyond, the oldest after the first go."""
_FAULT = re.compile(r"(\w+): expected '([^']*)', got '([^']*)'(?:; the words that mattered: '([^']*)')?\.")


def told(field: str, expected: object, got: str, mattered: str | None = None) -> str:
    """One fault: the field, what was expected, what came, and what in the input decided it."""
    shown = " ".join(got.replace("'", "").split())[:SHOWN]
    ending = "" if mattered is None else f"; the words that mattered: '{mattered}'"
    return f"{field}: expected '{expected}', got '{shown}'{ending}."


class EachText:
    """GEPA's ``ProposalFn`` for proposers that write each component's text from its own records."""

    def __call__(
        self,
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: Sequence[str],
    ) -> dict[str, str]:
        """A text for each component to update."""
        return {name: self.propose(candidate[name], reflective_dataset.get(name, ())) for name in components_to_update}

    def propose(self, text: str, records: Sequence[Mapping[str, Any]]) -> str:
        """A text in place of this one, from the reflective records of its component."""
        raise NotImplementedError


class FeedbackProposer(EachText):
    """GEPA's ``ProposalFn`` without a language model: it turns one fault of the feedback into a sentence.

    It reads the current text and the reflective records alone, never a rule or a label that feedback did not show. It
    does not generalise: where feedback names the words that mattered it states a condition, else it shows the pair. So
    it says less than a language model that understood the faults would.

    Draws come from a hash of the seed and of what it reads, so a resumed run proposes the same again.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def propose(self, text: str, records: Sequence[Mapping[str, Any]]) -> str:
        """The text with a sentence from the feedback at its end."""
        news = {sentence for record in records for sentence in sentences(str(record.get("Feedback", "")))}
        lacking = sorted(sentence for sentence in news if sentence not in text)
        if not lacking:
            return text
        rng = random.Random(json.dumps([self.seed, text, lacking]))
        first, *kept = re.split(r"(?<=\.)\s+", text.strip())
        return " ".join([first, *[*kept, rng.choice(lacking)][1 - LONGEST :]])


def sentences(feedback: str) -> list[str]:
    """What each fault that feedback shows comes to as advice.

    >>> sentences("Wrong. who: expected 'Berg', got 'Anna Berg'.")
    ['For who write Berg, not Anna Berg.']
    """
    return [
        f"When it says {mattered}, the {field} is {expected}."
        if mattered
        else f"For {field} write {expected}, not {got}."
        for field, expected, got, mattered in _FAULT.findall(feedback)
    ]
