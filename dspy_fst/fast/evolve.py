"""The fast phase: texts move, weights do not.

GEPA starts from the whole previous population. It searches on the cycle's anchors, under the current weights, with a
budget of fresh rollouts. The next population is the K complementary candidates of its Pareto frontier.
"""

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import dspy
import gepa
from gepa.core.callbacks import GEPACallback, ValsetEvaluatedEvent
from gepa.core.result import GEPAResult
from gepa.proposer.reflective_mutation.base import ReflectionComponentSelector
from gepa.proposer.reflective_mutation.reflection_lm import ReflectionLM
from gepa.utils.stop_condition import StopperProtocol

from dspy_fst.errors import MeasurementError, ReflectionError
from dspy_fst.fast.demos import DemoDraws, DemoSource, DemosTakeTurns, demos_differ
from dspy_fst.fast.gepa_adapter import BankedAdapter, Feedback, Propose, ProposeCode, Reflection
from dspy_fst.fast.journal_protocol import NoJournal, SearchJournal
from dspy_fst.fast.pareto import mean, top_k
from dspy_fst.fast.reflections import Reflections
from dspy_fst.fast.rollout_bank import Play, RolloutBank
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.fast.seeding import BetterWhereMeasured, Row, SeededPolicy, SeveralAtOnce, write_seeded_state
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.rollout.components import binds
from dspy_fst.rollout.rollouter import Task
from dspy_fst.run.files import writing
from dspy_fst.types import Candidate, Population, Problem, Rollout

logger = logging.getLogger(__name__)
GIVE_UP = 6
"""A search ends after so many failed reflections when none succeeded (ours; gepa tries each twice)."""


@dataclass(frozen=True)
class GEPAOptions:
    """What a user hands to gepa itself: objects, where the settings are plain values."""

    component_selector: ReflectionComponentSelector | None = None
    """Which texts a proposal changes; None: as ``components`` says."""
    callbacks: tuple[GEPACallback, ...] = ()
    """gepa's callbacks. A search that goes on after a kill tells them its first part again."""
    stop_callbacks: tuple[StopperProtocol, ...] = ()
    """gepa's further reasons to end a search."""


@dataclass(frozen=True)
class Search:
    """What a fast phase found, and what it cost."""

    population: Population
    candidates: tuple[Candidate, ...]
    """Every candidate with a measured anchor, the carried population first."""
    scores: tuple[tuple[float, ...], ...]
    """scores[candidate][anchor]. An anchor that was not measured holds the candidate's mean over the others. It is
    counted as ``unmeasured`` and enters no frontier."""
    rollouts: int
    """Fresh runs of the program."""
    sampled_tokens: int
    repeats: int
    counts: Counter[str]
    """``reflections``, ``reflections_failed``, ``lines_restored``, ``texts_mended``, ``texts_refused``, ``accepted``,
    ``demos_accepted`` (of these, candidates whose demos are not their parent's), ``demo_proposals``, ``demos_cut``,
    ``demos_not_written`` (calls with a value that JSON cannot hold), ``unmeasured`` (anchors of candidates without a
    score), what the reflection LM's calls cost (`dspy_fst.fast.reflection_cost.COUNTS`), and failed and masked rollouts
    by `Outcome.label`."""
    warned: tuple[str, ...] = ()
    """What the proposer warned of, e.g. feedback that it could not read."""
    dollars: float | None = None
    """What the reflection LM cost, as far as its prices are known; None: no call had a known one."""
    optimizer: str = "GEPA"
    """Who searched."""
    played: tuple[Rollout, ...] = field(default=(), compare=False)
    """The fresh rollouts, in order. Equality leaves them out: those that a journal gave back have no trace."""
    scoring: tuple[Rollout, ...] = field(default=(), compare=False)
    """Of these the ones that score a candidate; an optimizer may take further samples."""

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
    size: int,
    budget: int,
    seed: int = 0,
    propose: Propose | None = None,
    code_proposer: ProposeCode | None = None,
    demo_source: DemoSource | None = None,
    reflection_lm: dspy.LM | None = None,
    on_candidate: Callable[[Candidate, float], None] = lambda candidate, score: None,
    journal: SearchJournal | None = None,
    options: GEPAOptions | None = None,
) -> Search:
    """Evolve the population's texts on the anchors.

    Args:
        play: Makes rollouts under the current weights.
        feedback: What the metric says of one predictor's part in a rollout.
        settings: Which texts are evolved, and from what; a run hands in its FSTConfig.
        size: K, candidates in the next population.
        budget: Fresh rollouts of the search; scoring the carried population comes on top (paper, App. D).
        seed: Of gepa's draws.
        propose: Proposes new texts without a reflection LM; else ``reflection_lm`` reflects.
        demo_source: Labels, and the tokenizer, where demos evolve.
        code_proposer: Proposes new sources for dspy.Flex modules; else ``reflection_lm`` does.
        on_candidate: Called with each accepted candidate and its mean anchor score.
        journal: Records paid operations; a search that is repeated with it pays only for the rest.
        options: What the user hands to gepa.

    Raises:
        ReflectionError: every reflection failed.
        MeasurementError: nothing is measured any more.
        RunDirectoryError: the journal is of another search, or cannot be written.
    """
    journal = journal or NoJournal()
    bank = RolloutBank(play, program, journal, calls=settings.reuse_rollouts)
    draws = DemoDraws(program, anchors, bank.fresh, settings, demo_source or DemoSource(), seed)
    kept, tokens = settings.protected, settings.reflection_tokens
    reflection = Reflection(feedback, propose, code_proposer, reflection_lm, seed, tokens, kept, draws.drawn)
    adapter = BankedAdapter(program, bank, reflection, journal)
    searching = _Searching(
        program,
        bank,
        adapter,
        draws,
        population.unique(),
        anchors,
        settings,
        size,
        budget,
        seed,
        options or GEPAOptions(),
    )
    seed_scores = score_seeds(bank, searching.seeds, anchors)
    with _removed_if_all_failed(journal):
        result = searching.optimize(seed_scores, on_candidate)
    return searching.search_of(result)


@dataclass(frozen=True)
class _Searching:
    """One search in progress."""

    program: dspy.Module
    bank: RolloutBank
    adapter: BankedAdapter
    draws: DemoDraws
    seeds: Sequence[Candidate]
    """The carried population, without repetition."""
    anchors: Sequence[Problem]
    settings: SearchSettings
    size: int
    """K."""
    budget: int
    """Fresh rollouts, beyond those that score the seeds."""
    seed: int
    options: GEPAOptions

    @property
    def reflections(self) -> Reflections:
        return self.adapter.reflections

    def optimize(self, seed_scores: Sequence[Row], on_candidate: Callable[[Candidate, float], None]) -> GEPAResult:
        """gepa's search from the scored seeds.

        Raises:
            ReflectionError: every reflection failed.
            RunDirectoryError: what stopped the adapter.
        """
        tasks = SeveralAtOnce(self._proposals_at_once())
        with tempfile.TemporaryDirectory() as folder, writing(Path(folder)):
            write_seeded_state(Path(folder), self.seeds, seed_scores)
            result = gepa.optimize(
                seed_candidate=dict(self.seeds[0].texts),
                trainset=list(self.anchors),
                valset=list(self.anchors),
                adapter=self.adapter,
                reflection_minibatch_size=self.settings.reflection_minibatch,
                perfect_score=self.settings.perfect_score,
                module_selector=self._selector,
                cache_evaluation=False,  # the bank answers; gepa's cache would never ask again for a masked rollout
                sampling_strategy=tasks,
                reflection_strategy=cast(ReflectionLM, self.reflections),
                acceptance_criterion=BetterWhereMeasured(),
                val_evaluation_policy=SeededPolicy(),
                stop_callbacks=self._stops(tasks),
                track_best_outputs=False,
                use_cloudpickle=True,
                run_dir=folder,
                callbacks=[cast(GEPACallback, _Watch(on_candidate)), *self.options.callbacks],  # methods are optional
                logger=_Log(),
                seed=self.seed,
            )
        self._refuse_failed_search()
        return result

    @property
    def _selector(self) -> ReflectionComponentSelector | str:
        """Which components the next proposal changes."""
        select = self.options.component_selector or self.settings.components
        return DemosTakeTurns(select, self.draws) if self.settings.demos_evolve else select

    @property
    def _most_proposals(self) -> int:
        """A proposal costs at least a minibatch, unless the bank answers it. Then only this limit ends the search."""
        return self.budget // self.settings.reflection_minibatch

    def _proposals_at_once(self) -> Callable[[int], int]:
        """(proposals so far) -> how many more at once: none that could not be paid for, and none on the same
        minibatch."""
        minibatch, spent_on_seeds = self.settings.reflection_minibatch, len(self.bank.fresh)

        def wanted(so_far: int) -> int:
            left = self.budget - (len(self.bank.fresh) - spent_on_seeds)
            return min(
                self.settings.proposals_at_once,
                math.ceil(left / minibatch),
                self._most_proposals - so_far,
                len(self.anchors) // minibatch,
            )

        return wanted

    def _stops(self, tasks: SeveralAtOnce) -> list[StopperProtocol]:
        """When the search ends; gepa asks before each iteration."""
        spent_on_seeds = len(self.bank.fresh)
        return [
            lambda gepa_state: len(self.bank.fresh) - spent_on_seeds >= self.budget,
            lambda gepa_state: tasks.drawn >= self._most_proposals,
            lambda gepa_state: self.reflections.all_failed and self.reflections.counts["reflections_failed"] >= GIVE_UP,
            lambda gepa_state: self.reflections.stopped_by is not None,
            *self.options.stop_callbacks,
        ]

    def _refuse_failed_search(self) -> None:
        if self.reflections.stopped_by is not None:
            raise self.reflections.stopped_by
        if self.reflections.all_failed:
            raise ReflectionError(
                f"all {self.reflections.counts['reflections_failed']} reflections failed, the last with "
                f"{self.reflections.last_failure}; mend the reflection LM or the proposer and compile again with the "
                "same run_dir to go on"
            )

    def search_of(self, result: GEPAResult) -> Search:
        """The search's outcome; candidates without a measured anchor are left out."""
        everything = [Candidate(dict(texts)) for texts in result.candidates]
        scores = [tuple(row.get(anchor) for anchor in range(len(self.anchors))) for row in result.val_subscores]
        parents = {
            candidate.digest: tuple(everything[index].digest for index in indices if index is not None)
            for candidate, indices in zip(everything, result.parents, strict=True)
        }
        measured = [
            (candidate, row)
            for candidate, row in zip(everything, scores, strict=True)
            if any(score is not None for score in row)
        ]
        by_digest = {candidate.digest: candidate for candidate in everything}
        counts = Counter(
            accepted=len(everything) - len(self.seeds),
            demos_accepted=sum(
                any(demos_differ(new, by_digest[parent]) for parent in parents[new.digest])
                for new in everything[len(self.seeds) :]
            ),
            unmeasured=sum(score is None for row in scores for score in row),
        )
        return outcome_of(
            self.bank,
            measured,
            complementary(self.program, measured, self.size, parents),
            self.reflections.counts + self.draws.counts + counts,
            warned=tuple(sorted(self.reflections.warned)),
            dollars=self.reflections.dollars,
        )


def outcome_of(
    bank: RolloutBank,
    measured: Sequence[tuple[Candidate, Row]],
    population: Population,
    counts: Counter[str],
    *,
    dollars: float | None,
    warned: tuple[str, ...] = (),
    optimizer: str = "GEPA",
) -> Search:
    """A search's outcome, of the rollouts that its bank holds. The arguments are as in `Search`."""
    return Search(
        population=population,
        candidates=tuple(candidate for candidate, _ in measured),
        scores=tuple(_filled(row) for _, row in measured),
        rollouts=len(bank.fresh),
        sampled_tokens=bank.sampled_tokens,
        repeats=bank.repeats,
        counts=counts + OutcomeCounts.over(rollout.outcome for rollout in bank.fresh).labels,
        warned=warned,
        dollars=dollars,
        optimizer=optimizer,
        played=tuple(bank.fresh),
        scoring=tuple(bank.scoring),
    )


def score_seeds(bank: RolloutBank, seeds: Sequence[Candidate], anchors: Sequence[Problem]) -> list[Row]:
    """Each carried candidate's score on each anchor.

    Raises:
        MeasurementError: no anchor was measured under any of them, so there is nothing to start from.
    """
    rollouts = bank.get([Task(problem, seed) for seed in seeds for problem in anchors])
    rewards = [rollout.reward for rollout in rollouts]
    if all(reward is None for reward in rewards):
        reasons = ", ".join(sorted(OutcomeCounts.over(rollout.outcome for rollout in rollouts).masked))
        raise MeasurementError(
            f"none of the {len(rollouts)} rollouts that a search starts from measured anything ({reasons}); mend "
            "the cause and compile again with the same run_dir to go on"
        )
    return [rewards[i : i + len(anchors)] for i in range(0, len(rewards), len(anchors))]


def complementary(
    program: dspy.Module,
    measured: Sequence[tuple[Candidate, Row]],
    size: int,
    parents: Mapping[str, tuple[str, ...]],
) -> Population:
    """The K candidates that a program can be made of and that complement each other best."""
    bound = [(candidate, row) for candidate, row in measured if binds(program, candidate)]
    chosen = [bound[i] for i in top_k([row for _, row in bound], size)]
    return Population(
        members=tuple(candidate for candidate, _ in chosen),
        scores=tuple(mean(row) for _, row in chosen),
        parents={candidate.digest: parents[candidate.digest] for candidate, _ in measured},
    )


@contextmanager
def _removed_if_all_failed(journal: SearchJournal) -> Iterator[None]:
    """Remove the journal of a search whose reflections all failed: repeated from it, the search would fail again."""
    try:
        yield
    except ReflectionError:
        journal.remove()
        raise


def _filled(row: Row) -> tuple[float, ...]:
    """The row with its own mean where nothing was measured."""
    return tuple(mean(row) if score is None else score for score in row)


class _Watch:
    """gepa's callback that passes accepted candidates on."""

    def __init__(self, on_candidate: Callable[[Candidate, float], None]):
        self._on_candidate = on_candidate

    def on_valset_evaluated(self, event: ValsetEvaluatedEvent) -> None:
        if math.isfinite(event["average_score"]):  # else none of its anchors was measured
            self._on_candidate(Candidate(dict(event["candidate"])), event["average_score"])


class _Log:
    """gepa's logger: everything at debug level."""

    def log(self, message: str) -> None:
        logger.debug(message)
