"""An instruction proposer without a language model, for runs that must be free, fast and repeatable."""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from programs.lab.operations import BY_NAME, OPENERS, REMARKS, Chain, apply, chains, say
from programs.unread import tell_unread

Fits = Callable[[list[int]], bool]
"""Whether an answer is possible, as far as one piece of feedback tells."""

READS = "the laboratory's own sentences alone, such as 'Wrong. Too many values; ... Expected: 9 1 7. Got: 9 1.'"
LONGEST = 5
"""Sentences an instruction keeps; beyond, the oldest go."""


class FeedbackProposer:
    """GEPA's `ProposalFn` as a puzzle solver: it guesses the rule from the feedback and writes it down in words.

    It reads the current text and, of the reflective records, at most `reads` drawn at random: as a hurried reader
    would, it may see only vague ones. It tries every everyday operation and every two in a row (226 chains,
    some of them the same rule) against what it read, draws one of the shortest that fit, and states it in one of
    several wordings, not all of which the base model has met. It never sees a world, its rule or its told instruction.

    How much the feedback gives away: much. In the lab's worlds a record that shows its expected answer leaves 3 of
    the 226 chains on average, a vague one about 110. With four records, half of them vague, two of which are read,
    the first proposal states the right rule 6 to 8 times in 10. What is left to the search is to meet a telling
    record, to get past a wrong guess, and to find the wording that the policy understands best.

    It needs the laboratory's own sentences (`programs.lab.world.describe_fault`). The first feedback that it cannot
    read is warned of (``warnings.warn``), which a run tells among its warnings.

    Draws come from a hash of the seed and the inputs, so a resumed run proposes the same again.
    """

    def __init__(self, seed: int = 0, *, reads: int = 2, rewrite: float = 0.4) -> None:
        """`reads`: records looked at per proposal. `rewrite`: chance to start from nothing, else the text is edited."""
        self.seed = seed
        self.reads = reads
        self.rewrite = rewrite
        self._told = False

    def __call__(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """A new instruction for each component to update."""
        return {name: self._propose(candidate[name], reflective_dataset.get(name, ())) for name in components_to_update}

    def _propose(self, text: str, records: Sequence[Mapping[str, Any]]) -> str:
        rng = random.Random(json.dumps([self.seed, text, [dict(record) for record in records]], default=str))
        read = rng.sample(list(records), min(self.reads, len(records)))
        self._tell_unread(read)
        chain = guess_rule(read, rng)
        news = [rng.choice(REMARKS)] if chain is None else [in_words(chain, rng)]
        if rng.random() < self.rewrite:
            kept = [rng.choice(OPENERS)] if rng.random() < 0.5 else []
        else:
            kept = _sentences(text)
            if chain is not None and rng.random() < 0.7:  # else the old rule stays beside the new one
                kept = [sentence for sentence in kept if not states_rule(sentence)]
        if rng.random() < 0.2:
            news.append(rng.choice(REMARKS))
        return " ".join([*[sentence for sentence in kept if sentence not in news], *news][-LONGEST:])

    def _tell_unread(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Once: every piece of another metric's feedback is worded anew."""
        unread = [str(record.get("Feedback", "")) for record in records if _evidence(record) is None]
        if unread and not self._told:
            self._told = tell_unread("FeedbackProposer", unread[0], READS)


def guess_rule(records: Sequence[Mapping[str, Any]], rng: random.Random) -> Chain | None:
    """One of the shortest chains that fit the records, or None if none fits or the records tell nothing."""
    evidence = [piece for record in records if (piece := _evidence(record)) is not None]
    if not evidence:
        return None
    fitting = [chain for chain in chains() if all(fits(apply(chain, numbers)) for numbers, fits in evidence)]
    shortest = min(map(len, fitting), default=0)
    return rng.choice([chain for chain in fitting if len(chain) == shortest]) if fitting else None


def states_rule(sentence: str) -> bool:
    """Whether a sentence names an operation in words that the proposer knows."""
    lowered = sentence.lower()
    return any(phrase in lowered for op in BY_NAME.values() for phrase in (*op.wordings, op.unheard))


def _evidence(record: Mapping[str, Any]) -> tuple[list[int], Fits] | None:
    """(the problem's numbers, what its answer must be like), or None if the record can't be used."""
    feedback = str(record.get("Feedback", ""))
    numbers, got = _digits(record.get("Inputs")), _digits(record.get("Generated Outputs"))
    if not numbers:
        return None
    if shown := re.search(r"Expected: ([\d ]+)\.", feedback):
        right = [int(digit) for digit in shown[1].split()]
        return numbers, lambda answer: answer == right
    if feedback.startswith("Correct"):
        return numbers, lambda answer: answer == got
    kinds: dict[str, Fits] = {
        "Too many": lambda answer: len(answer) < len(got),
        "Too few": lambda answer: len(answer) > len(got),
        "not in these places": lambda answer: answer != got and sorted(answer) == sorted(got),
        "do not belong": lambda answer: len(answer) == len(got) and sorted(answer) != sorted(got),
    }
    return next(((numbers, fits) for words, fits in kinds.items() if words in feedback), None)


def _digits(fields: Any) -> list[int]:
    text = " ".join(map(str, fields.values())) if isinstance(fields, Mapping) else ""
    return [int(digit) for digit in re.findall(r"\d", text)]


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=\.)\s+", text.strip()) if sentence]


def in_words(chain: Chain, rng: random.Random) -> str:
    """The rule as an instruction, in one of several wordings. Not all of them are ones that the base model has met."""
    wordings = [rng.choice((*BY_NAME[name].wordings, BY_NAME[name].unheard)) for name in chain]
    return say(tuple(wordings), rng)
