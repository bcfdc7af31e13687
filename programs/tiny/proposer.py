"""An instruction proposer without a language model, for programs whose predictors have skills (see `skills`)."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from programs.tiny.skills import OPENERS, REMARKS, Skill

Fits = Callable[[str], bool]
"""Whether an output is what the feedback asks for, as far as it tells."""
Reader = Callable[[Mapping[str, Any], str, str], Fits | None]
"""(inputs, output, feedback) of one record -> what it tells of the right output; None when nothing."""


class SkillProposer:
    """GEPA's `ProposalFn`: which skill would have satisfied the feedback? It asks for that one in words.

    It reads at most `reads` records, drawn at random, tries each of the predictor's skills on their inputs, draws one
    of those that fit most of them, and asks for it in one of its wordings. It never sees an example, its answer or the
    program's hidden rule; what the feedback gives away is what the metric says.

    Draws come from a hash of the seed and the inputs, so a resumed run proposes the same again.
    """

    def __init__(
        self, skills: Mapping[str, tuple[Skill, ...]], readers: Mapping[str, Reader], seed: int = 0, *, reads: int = 2
    ) -> None:
        """Args:
        skills: Of each predictor, by its name.
        readers: Of each predictor's feedback.
        """
        self.skills, self.readers, self.seed, self.reads = skills, readers, seed, reads

    def __call__(
        self,
        candidate: dict[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """A new instruction for each component to update."""
        return {
            name: self._propose(name, candidate[name], reflective_dataset.get(name, ()))
            for name in components_to_update
        }

    def _propose(self, name: str, text: str, records: Sequence[Mapping[str, Any]]) -> str:
        rng = random.Random(json.dumps([self.seed, name, text, [dict(record) for record in records]], default=str))
        read = rng.sample(list(records), min(self.reads, len(records)))
        skill = self._guess(name, read, rng)
        if skill is None:
            return " ".join(dict.fromkeys([text, rng.choice(REMARKS)]))
        wording = rng.choice(skill.wordings)
        around = [rng.choice((*OPENERS, *REMARKS))] if rng.random() < 0.3 else []
        return " ".join([*around, f"{wording[0].upper()}{wording[1:]}."])

    def _guess(self, name: str, records: Sequence[Mapping[str, Any]], rng: random.Random) -> Skill | None:
        """One of the skills that fit most of the records; None when none fits any."""
        told = [(record["Inputs"], fits) for record in records if (fits := self._fits(name, record)) is not None]
        counts = [sum(fits(skill.act(inputs).lower()) for inputs, fits in told) for skill in self.skills[name]]
        best = max(counts, default=0)
        fitting = [skill for skill, count in zip(self.skills[name], counts, strict=True) if count == best]
        return rng.choice(fitting) if best else None

    def _fits(self, name: str, record: Mapping[str, Any]) -> Fits | None:
        outputs = record.get("Generated Outputs")
        if not isinstance(outputs, Mapping) or not outputs:  # a reply that did not parse
            return None
        return self.readers[name](record["Inputs"], str(list(outputs.values())[-1]), str(record.get("Feedback", "")))
