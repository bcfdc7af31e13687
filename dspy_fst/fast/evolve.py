"""The fast phase: text moves, weights do not.

GEPA searches from the whole previous population on the cycle's anchors, under the current weights and a
budget of fresh rollouts, and the K complementary candidates of its Pareto frontier are the next population.
"""

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy
import gepa

from dspy_fst.errors import MeasurementError, ReflectionError
from dspy_fst.fast.gepa_adapter import (
    BankedAdapter,
    Feedback,
    Journal,
    NoJournal,
    Play,
    Propose,
    ProposeCode,
    RolloutBank,
)
from dspy_fst.fast.money import Meter
from dspy_fst.fast.pareto import mean, top_k
from dspy_fst.fast.seeding import BetterWhereMeasured, SeededPolicy, write_seeded_state
from dspy_fst.outcomes.counts import OutcomeCounts
from dspy_fst.rollout.components import binds
from dspy_fst.run.files import writing
from dspy_fst.types import Candidate, Population, Problem, Rollout

logger = logging.getLogger(__name__)
GIVE_UP = 6
"""Failed reflections, none having succeeded, after which a search ends (gepa tries each twice)."""


@dataclass(frozen=True)
class SearchSettings:
    """How a fast phase searches."""

    size: int
    """K, candidates in the population."""
    budget: int
    """Fresh rollouts of the search; scoring the carried population comes on top (paper, App. D)."""
    minibatch: int = 3
    """Problems shown to a reflection (GEPA, section 4.3)."""
    perfect_score: float = 1.0
    """A minibatch on which every rollout earns this teaches nothing and is skipped."""
    components: str = "round_robin"
    """Which texts a proposal changes: ``"round_robin"`` one at a time, ``"all"`` together."""
    seed: int = 0
    record_tokens: int = 4000
    """Tokens, estimated, of what a reflection is shown of one run."""
    protected: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Component -> lines of its text that every proposal keeps."""


@dataclass(frozen=True)
class Search:
    """What a fast phase found, and what it cost."""

    population: Population
    candidates: tuple[Candidate, ...]
    """Every candidate that was scored on the anchors, the carried population first; without those of which nothing was
    measured."""
    scores: tuple[tuple[float, ...], ...]
    """scores[candidate][anchor]. An anchor that was never measured shows the candidate's mean over the others, and is
    counted as ``unmeasured``; no frontier is made of it."""
    rollouts: int
    """Fresh runs of the program."""
    sampled_tokens: int
    reused: int
    counts: Counter[str]
    """``reflections``, ``reflections_failed``, ``lines_restored``, ``texts_mended``, ``texts_refused``, ``accepted``,
    ``unmeasured`` (anchors of candidates without a score), and failed and masked rollouts by `Outcome.label`."""
    warned: tuple[str, ...] = ()
    """What the proposer warned of, e.g. feedback that it could not read."""
    dollars: float | None = None
    """What the reflection LM cost in this process, as far as its price is known."""
    played: tuple[Rollout, ...] = ()
    """The fresh runs, in order."""

    @property
    def money(self) -> dict[str, float]:
        """``dollars``, where they are known."""
        return {} if self.dollars is None else {"dollars": self.dollars}


def evolve(
    population: Population,
    anchors: Sequence[Problem],
    program: dspy.Module,
    *,
    play: Play,
    feedback: Feedback,
    settings: SearchSettings,
    propose: Propose | None = None,
    code_proposer: ProposeCode | None = None,
    reflection_lm: dspy.LM | None = None,
    on_candidate: Callable[[Candidate, float], None] = lambda candidate, score: None,
    journal: Journal | None = None,
) -> Search:
    """Evolve the population's texts on the anchors.

    Args:
        play: Makes rollouts under the current weights.
        feedback: What the metric says of one predictor's part in a rollout.
        propose: Proposes new texts without a reflection LM; else ``reflection_lm`` reflects.
        code_proposer: Proposes new sources for dspy.Flex modules; else ``reflection_lm`` does.
        on_candidate: Told of each candidate that was accepted, and its mean anchor score.
        journal: Keeps what was paid for; a search that is repeated with it pays only for the rest.

    Raises:
        ReflectionError: every reflection failed.
        MeasurementError: nothing is measured any more.
        RunDirectoryError: the journal is of another search, or cannot be written.
    """
    journal, meter = journal or NoJournal(), Meter(reflection_lm)
    bank = RolloutBank(play, program, journal)
    adapter = BankedAdapter(
        program,
        bank,
        feedback,
        propose,
        reflection_lm,
        settings.seed,
        settings.minibatch,
        journal,
        code_proposer,
        settings.record_tokens,
        settings.protected,
    )
    seeds = population.unique()
    scored = bank.get([(problem, seed) for seed in seeds for problem in anchors])
    rows = [scored[i : i + len(anchors)] for i in range(0, len(scored), len(anchors))]
    _refuse_unmeasured(scored)
    spent_on_seeds = len(bank.fresh)
    watch = _Watch(on_candidate)
    # Each iteration costs a minibatch at least, unless it is answered from the bank: then only this cap ends it.
    iterations = settings.budget // settings.minibatch

    with _forgotten_if_failed(journal), tempfile.TemporaryDirectory() as folder, writing(Path(folder)):
        write_seeded_state(Path(folder), seeds, [[r.reward for r in row] for row in rows])
        result = gepa.optimize(
            seed_candidate=dict(seeds[0].texts),
            trainset=list(anchors),
            valset=list(anchors),
            adapter=adapter,
            reflection_minibatch_size=settings.minibatch,
            perfect_score=settings.perfect_score,
            module_selector=settings.components,
            cache_evaluation=False,  # the bank answers; gepa's own cache would never ask again for a masked rollout
            acceptance_criterion=BetterWhereMeasured(),
            val_evaluation_policy=SeededPolicy(),
            stop_callbacks=[
                lambda state: len(bank.fresh) - spent_on_seeds >= settings.budget,
                lambda state: state.i + 1 >= iterations,
                lambda state: adapter.counts["reflections_failed"] >= GIVE_UP and not adapter.counts["reflections"],
                lambda state: adapter.stopped_by is not None,
            ],
            track_best_outputs=False,
            use_cloudpickle=True,
            run_dir=folder,
            callbacks=[watch],
            logger=_Log(),
            seed=settings.seed,
        )
        if adapter.stopped_by is not None:
            raise adapter.stopped_by
        if adapter.counts["reflections_failed"] and not adapter.counts["reflections"]:
            raise ReflectionError(
                f"all {adapter.counts['reflections_failed']} reflections failed, the last with {adapter.last_failure}; "
                "mend the reflection LM or the proposer and compile again with the same run_dir to go on"
            ) from None
    candidates = tuple(Candidate(dict(texts)) for texts in result.candidates)
    scores = tuple(tuple(row.get(a) for a in range(len(anchors))) for row in result.val_subscores)
    unmeasured = sum(score is None for row in scores for score in row)
    parents = {
        candidate.digest: tuple(candidates[p].digest for p in of if p is not None)
        for candidate, of in zip(candidates, result.parents, strict=True)
    }
    known = [i for i, row in enumerate(scores) if any(score is not None for score in row)]
    return Search(
        population=_population(program, [candidates[i] for i in known], [scores[i] for i in known], parents, settings),
        candidates=tuple(candidates[i] for i in known),
        scores=tuple(_filled(scores[i]) for i in known),
        rollouts=len(bank.fresh),
        sampled_tokens=bank.sampled_tokens,
        reused=bank.reused,
        counts=adapter.counts
        + Counter(accepted=len(candidates) - len(seeds), unmeasured=unmeasured)
        + OutcomeCounts.over(rollout.outcome for rollout in bank.fresh).labels,
        warned=tuple(adapter.warned),
        dollars=meter.dollars,
        played=tuple(bank.fresh),
    )


def _refuse_unmeasured(scored: Sequence[Rollout]) -> None:
    """
    Raises:
        MeasurementError: no anchor was measured under any candidate, so there is nothing to start from.
    """
    if all(rollout.reward is None for rollout in scored):
        reasons = ", ".join(sorted({str(rollout.mask) for rollout in scored}))
        raise MeasurementError(
            f"none of the {len(scored)} rollouts that a search starts from measured anything ({reasons}); mend the "
            "cause and compile again with the same run_dir to go on"
        )


@contextmanager
def _forgotten_if_failed(journal: Journal) -> Iterator[None]:
    """Failed reflections are on record, and repeated from it the search would fail again after the cause was mended."""
    try:
        yield
    except ReflectionError:
        journal.remove()
        raise


def _filled(row: Sequence[float | None]) -> tuple[float, ...]:
    """The row with its own mean where nothing was measured."""
    return tuple(mean(row) if score is None else score for score in row)


def _population(
    program: dspy.Module,
    candidates: Sequence[Candidate],
    scores: Sequence[Sequence[float | None]],
    parents: Mapping[str, tuple[str, ...]],
    settings: SearchSettings,
) -> Population:
    bound = [i for i, candidate in enumerate(candidates) if binds(program, candidate)]
    chosen = [bound[i] for i in top_k([scores[i] for i in bound], settings.size)]
    return Population(
        members=tuple(candidates[i] for i in chosen),
        scores=tuple(mean(scores[i]) for i in chosen),
        parents={candidate.digest: parents[candidate.digest] for candidate in candidates},
    )


class _Watch:
    """gepa's callback protocol: tells of accepted candidates."""

    def __init__(self, on_candidate: Callable[[Candidate, float], None]):
        self._on_candidate = on_candidate

    def on_valset_evaluated(self, event: dict[str, Any]) -> None:
        if math.isfinite(event["average_score"]):  # else none of its anchors was measured
            self._on_candidate(Candidate(dict(event["candidate"])), event["average_score"])


class _Log:
    """gepa's running commentary, at debug level."""

    def log(self, message: str) -> None:
        logger.debug(message)
