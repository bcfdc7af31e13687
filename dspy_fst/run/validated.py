"""What a run's validations measured: validated states, their order, and what follows from it. Pure functions.

A run writes one event for each validation (made by `dspy_fst.training.validating`):

    {"event": "validation", "report": {"index": 0, "when": "start", "step": 0, ...}, "scores": {...}, "score": 0.25}

Validations are comparable only with the same problems, rollouts per problem and metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from dspy_fst.formatting.numbers import counted
from dspy_fst.run.directory import Event
from dspy_fst.run.ending import StopReason
from dspy_fst.run.files import population_from_json
from dspy_fst.run.paired import Difference, difference
from dspy_fst.types import Candidate, Population, WeightsVersion

EVENT = "validation"
When = Literal["start", "between", "end"]
DECLINE_ADVICE = (
    "Lower learning_rate or raise kl_coefficient. return_best=True returns the best validated state, also when it is "
    "set after the end and the program is compiled again with this run_dir"
)

MORE_PATIENCE = "To go on, raise patience or leave it out, and compile again with the same run_dir"


@dataclass(frozen=True)
class Validated:
    """One state of a run (weights and population), measured on the valset."""

    index: int
    """Index among the run's validations, from 0."""
    when: When
    step: int
    """Updates before this validation."""
    searched: int
    """The last cycle that had searched; -1 before any."""
    weights: WeightsVersion
    population: Population
    """The population that was or will be trained with. At the start the program's own texts come first."""
    candidates: tuple[str, ...]
    """Digests of the measured members; at the start only the program's own texts."""
    rewards: tuple[tuple[float | None, ...], ...]
    """rewards[candidate][problem]: mean over the problem's rollouts; None when no rollout was measured."""
    terms: Mapping[str, object]
    """What must be equal for a comparison: the problems, the rollouts of each, the metric."""
    counts: Mapping[str, int]
    """``rollouts`` (fresh ones), ``repeats`` (measured before under the same weights), ``engine: <what>``, and
    failed and masked rollouts by `Outcome.label`."""
    sampled_tokens: int
    seconds: float

    @classmethod
    def from_event(cls, event: Event) -> "Validated":
        """The state in a run's event."""
        report = event["report"]
        kept = {name: report[name] for name in cls.__dataclass_fields__}
        rewards = tuple(tuple(row) for row in report["rewards"])
        population = population_from_json(report["population"])
        return cls(**{**kept, "population": population, "candidates": tuple(report["candidates"]), "rewards": rewards})

    @cached_property
    def scores(self) -> Mapping[str, float]:
        """Digest -> mean over its measured problems. Candidates without a measured problem are left out."""
        means = {digest: _mean(row) for digest, row in zip(self.candidates, self.rewards, strict=True)}
        return {digest: mean for digest, mean in means.items() if mean is not None}

    @property
    def score(self) -> float | None:
        """The best candidate's score; None when nothing was measured."""
        return max(self.scores.values(), default=None)

    @property
    def best_rewards(self) -> tuple[float | None, ...]:
        """The best candidate's score on each problem; the first of equally good candidates."""
        return max(self.rewards, key=_sortable)

    @property
    def where(self) -> str:
        """E.g. ``"after step 5"``; steps are counted from 0, as in the reports."""
        if self.when == "start":
            return "at the start"
        return "at the end" if self.when == "end" else f"after step {self.step - 1}"

    @property
    def in_words(self) -> str:
        """E.g. ``"the state after step 5 (validation 0.430)"``."""
        score = "nothing was measured" if self.score is None else f"validation {self.score:.3f}"
        return f"the {'end' if self.when == 'end' else 'state ' + self.where} ({score})"

    def same_as(self, other: "Validated") -> bool:
        """Whether both are the same state: the last one before the end may be measured again at the end."""
        return self.weights == other.weights and self.population.members == other.population.members

    @property
    def ranked(self) -> Population:
        """The population, best score first; members without a score come last."""
        digests = [member.digest for member in self.population.unique()][: len(self.candidates)]
        scores = {  # by position: a text from which secrets were removed has another digest
            digest: mean for digest, row in zip(digests, self.rewards, strict=False) if (mean := _mean(row)) is not None
        }
        return ranked_by(self.population, scores)


def ranked_by(population: Population, scores: Mapping[str, float]) -> Population:
    """The population with the best score first; members whose digest has no score come last, with None."""
    members = sorted(population.members, key=lambda member: scores.get(member.digest, float("-inf")), reverse=True)
    return replace(population, members=tuple(members), scores=tuple(scores.get(member.digest) for member in members))


def _sortable(row: Sequence[float | None]) -> float:
    """The mean of a row; minus infinity without a measured problem."""
    mean = _mean(row)
    return float("-inf") if mean is None else mean


def _mean(row: Sequence[float | None]) -> float | None:
    measured = [reward for reward in row if reward is not None]
    return sum(measured) / len(measured) if measured else None


def validated_in(events: Sequence[Event]) -> list[Validated]:
    """Every validation in the events, in order."""
    return [Validated.from_event(event) for event in events if event.get("event") == EVENT]


def starting_population(seed: Candidate, population: Population) -> Population:
    """The population that a student carries, with the texts that its program speaks first."""
    members = sorted(population.members, key=lambda member: member.digest != seed.digest)
    if members[0].digest != seed.digest:  # the program was edited after it was compiled
        members = [seed, *members[:-1]]
    return replace(population, members=tuple(members), scores=(None,) * len(members))


def best_of(states: Sequence[Validated]) -> Validated | None:
    """The state with the highest score; the earliest of equal ones. None when nothing was measured."""
    measured = [state for state in states if state.score is not None]
    return max(measured, key=lambda state: state.score or 0.0, default=None)


def best_validated(states: Sequence[Validated], committed: int) -> set[WeightsVersion]:
    """Weights of the best state of all, and of the best up to the committed step, where a killed run resumes."""
    bests = (best_of(states), best_of([state for state in states if state.step <= committed]))
    return {state.weights for state in bests if state is not None}


def gain(before: Validated, after: Validated) -> Difference | None:
    """By how much the best candidate of one state scores more than that of another, paired by problem.

    None when their terms differ or they share no measured problem.
    """
    if before.terms != after.terms or before.score is None or after.score is None:
        return None
    return difference(before.best_rewards, after.best_rewards)


def decline(states: Sequence[Validated]) -> str | None:
    """A warning when the newest state is worse than the start or the best state, beyond the interval.

    It is given once an episode, and not again while the score stays low.
    """
    fallen = _fallen(states)
    if not fallen or _fallen(states[:-1]):
        return None
    now, (before, by) = states[-1], fallen[0]
    return (
        f"validation {now.where}: {now.score:.3f}, below the {before.score:.3f} {before.where} by {-by.mean:.3f} "
        f"({by.turned.words}). {DECLINE_ADVICE}"
    )


def _fallen(states: Sequence[Validated]) -> list[tuple[Validated, Difference]]:
    """(reference, difference) for the start and the best earlier state, if the newest state fell below them."""
    if not states:
        return []
    *earlier, now = states
    best = best_of(earlier)
    references = [state for state in earlier if state.when == "start" or state is best]
    differences = [(state, gain(state, now)) for state in references]
    return [(state, by) for state, by in differences if by is not None and by.falls]


def early_stop(states: Sequence[Validated], patience: int | None) -> StopReason | None:
    """The stop reason when ``patience`` validations in a row brought no new best; else None.

    Validations that measured nothing do not count.
    """
    best = best_of(states)
    if patience is None or best is None:
        return None
    since = sum(state.score is not None and state.index > best.index for state in states)
    if since < patience:
        return None
    text = (
        f"{counted(since, 'validation')} in a row brought no new best (patience={patience}): "
        f"the best is {best.score:.3f} {best.where}"
    )
    return StopReason("early_stopping", states[-1].step, text, MORE_PATIENCE)
