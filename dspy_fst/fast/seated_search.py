"""One fast phase with another optimizer than GEPA: texts and demos move, weights do not.

The carried population is scored on the anchors. The optimizer starts from its best member, and its calls of the program
are rollouts within the budget. What it returned, and what it tried, is measured on all anchors as far as the budget
goes. The next population is the K complementary candidates of these and of the carried ones, as after GEPA.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import dspy

from dspy_fst.errors import FastOptimizerError
from dspy_fst.fast.asked_lms import AskedLMs
from dspy_fst.fast.counted_program import CountedRuns, different
from dspy_fst.fast.demos import DemoSource, demos_differ
from dspy_fst.fast.evolve import Search, complementary, evolve, outcome_of, score_seeds
from dspy_fst.fast.fast_optimizer import FastOptimizer, Seat
from dspy_fst.fast.journal_protocol import NoJournal, SearchJournal
from dspy_fst.fast.pareto import mean
from dspy_fst.fast.requested_rollouts import RequestedRollouts
from dspy_fst.fast.rollout_bank import Play, UnorderedBank
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.fast.seeding import Row
from dspy_fst.fast.teleprompter_search import quiet_streams, seated
from dspy_fst.rollout.components import is_demos, is_tool, read_texts
from dspy_fst.rollout.rollouter import Task
from dspy_fst.types import Candidate, Population, Problem

HELD_BACK = 4
"""One part in so many of a search's budget is held back from the optimizer (ours); a pass over the anchors if that is
more, but never more than half. It measures the best of what was tried on all anchors."""
COMPLETED = 2
"""For each member of the population, so many of the programs that were only tried are measured on the anchors that they
lack (ours). One that lacks none costs nothing, and is always taken."""
CALLED_OFF = 1_000_000
"""``max_errors`` of DSPy's evaluations: a rollout that measured nothing does not end them, as the bank knows when
nothing is measured any more."""


def searcher(fast: object, num_threads: int) -> Callable[..., Search]:
    """The search of a run: `evolve`, or `seated_search` with what the user put into GEPA's place."""
    return evolve if fast is None else partial(seated_search, seated(fast), num_threads)


def seated_search(
    optimizer: FastOptimizer,
    num_threads: int,
    population: Population,
    anchors: Sequence[Problem],
    program: dspy.Module,
    *,
    play: Play,
    settings: SearchSettings,
    size: int,
    budget: int,
    seed: int = 0,
    demo_source: DemoSource | None = None,
    reflection_lm: dspy.LM | None = None,
    on_candidate: Callable[[Candidate, float], None] = lambda candidate, score: None,
    journal: SearchJournal | None = None,
    **of_gepa: object,
) -> Search:
    """Let another optimizer than GEPA search. What is not named here is as in `dspy_fst.fast.evolve.evolve`.

    Args:
        optimizer: Searches.
        num_threads: Rollouts in flight.
        of_gepa: What `evolve` takes besides; nobody asks for it here.

    Raises:
        FastOptimizerError: the optimizer failed, or returned something else than programs like the run's.
        MeasurementError: nothing is measured any more.
        RunDirectoryError: the journal cannot be written.
    """
    journal = journal or NoJournal()
    bank = UnorderedBank(play, program, journal, calls=settings.reuse_rollouts)
    seeds, given, anchors = population.unique(), len(anchors), different(anchors)
    measured = list(zip(seeds, score_seeds(bank, seeds, anchors), strict=True))
    best_first = [candidate for candidate, _ in sorted(measured, key=lambda each: -mean(each[1]))]
    for_optimizer = budget - min(max(budget // HELD_BACK, len(anchors)), budget // 2)
    requested = RequestedRollouts(bank, for_optimizer, num_threads)
    runs = CountedRuns(program, anchors, best_first[0], settings, requested, demo_source or DemoSource())
    incumbents = tuple(map(runs.under, best_first))
    examples = [problem.example for problem in anchors]
    seat = Seat(
        incumbents[0],
        incumbents,
        examples,
        runs.metric,
        for_optimizer,
        seed,
        num_threads,
        settings.max_bootstrapped_demos,
        settings.max_labeled_demos,
        reflection_lm,
    )
    asked = AskedLMs(journal)
    found = _same_form(optimizer.name, _returned(optimizer, seat, requested, asked), best_first[0])
    start = max((row for _, row in measured), key=mean)
    tried = [*map(runs.candidate_of, found), *_by_gain(requested.seen.values(), bank, anchors, start)]
    carried = {seed.digest for seed in seeds}
    new = list({each.digest: each for each in tried if each.digest not in carried}.values())
    measuring = _Measuring(bank, anchors, requested.left + budget - for_optimizer, len(found) + COMPLETED * size)
    for candidate in new:
        if (row := measuring.row(candidate)) is not None:
            measured.append((candidate, row))
            on_candidate(candidate, mean(row))
    counts = Counter(accepted=len(measured) - len(seeds), searches_cut=int(requested.cut)) + measuring.counts
    counts["anchors_repeated"] = given - len(anchors)
    counts["demos_accepted"] = sum(demos_differ(each, best_first[0]) for each, _ in measured[len(seeds) :])
    parents = {each.digest: () if each.digest in carried else (best_first[0].digest,) for each, _ in measured}
    chosen = complementary(program, measured, size, parents)
    return _outcome(bank, measured, chosen, runs.counts + counts, asked, optimizer.name)


def _returned(optimizer: FastOptimizer, seat: Seat, requested: RequestedRollouts, asked: AskedLMs) -> object:
    """What the optimizer returned, of whatever form; an empty list if the budget ended it.

    Raises:
        FastOptimizerError: it failed.
    """
    returned: list[object] = []
    lm = seat.reflection_lm or dspy.settings.lm

    def search() -> None:
        listeners = [*dspy.settings.callbacks, asked]
        with dspy.context(lm=lm, trace=[], num_threads=seat.num_threads, max_errors=CALLED_OFF, callbacks=listeners):
            returned.append(optimizer.search(seat))

    with quiet_streams():
        error = requested.serve(search, after=asked.record)
    asked.record()
    if error is not None:
        raise FastOptimizerError(
            f"fast: {optimizer.name} failed with {type(error).__name__}: {error}. Its rollouts are kept; mend the "
            "cause and compile again with the same run_dir to go on"
        ) from error
    return returned[0] if returned else []


def _same_form(name: str, returned: object, seed: Candidate) -> list[dspy.Module]:
    """The returned programs. A program of another form would be scored as the run's own, which has no such texts.

    Raises:
        FastOptimizerError: they are no programs, or not of the seed's components.
    """
    again = "Return copies of seat.program with other instructions or demos; its rollouts are kept"
    if isinstance(returned, dspy.Module) or not isinstance(returned, Iterable):
        raise FastOptimizerError(f"fast: {name} returned {type(returned).__name__}, no list of programs. {again}")
    programs = list(returned)
    for program in programs:
        if not isinstance(program, dspy.Module):
            raise FastOptimizerError(f"fast: {name} returned {type(program).__name__} as a program. {again}")
        # Tools and demos are parts of predictors; an instruction that no longer names a tool takes it along.
        own = sorted(part for part in seed.texts if not is_tool(part) and not is_demos(part))
        others = sorted(read_texts(program).texts)
        if own != others:
            raise FastOptimizerError(
                f"fast: {name} returned a program with the texts {', '.join(others) or 'of nothing'}, and the run's "
                f"has {', '.join(own)}. {again}"
            )
    return programs


def _by_gain(
    tried: Iterable[Candidate], bank: UnorderedBank, anchors: Sequence[Problem], start: Row
) -> list[Candidate]:
    """Candidates in the order of what they gained over the best carried one, summed over the anchors that both
    measured: a candidate that was tried on few anchors has gained little."""

    def gain(candidate: Candidate) -> float:
        known = bank.known(candidate, anchors)
        return sum(new - old for new, old in zip(known, start, strict=True) if new is not None and old is not None)

    return sorted(tried, key=gain, reverse=True)


@dataclass
class _Measuring:
    """Measures candidates on all anchors, as long as the budget lasts."""

    bank: UnorderedBank
    anchors: Sequence[Problem]
    left: int
    """Rollouts that may be made."""
    to_complete: int
    """Candidates that rollouts may be made for."""
    counts: Counter[str] = field(default_factory=Counter)
    """``partly_measured`` (candidates with anchors that they lack), ``unmeasured`` (scores of those that measured
    nothing at all)."""

    def row(self, candidate: Candidate) -> Row | None:
        """The candidate's score on each anchor; None if it lacks more than may be made, or measured nothing."""
        wanted = [Task(problem, candidate) for problem in self.anchors]
        if lacking := len(self.bank.lacks(wanted)):
            if lacking > self.left or not self.to_complete:
                self.counts["partly_measured"] += 1
                return None
            self.to_complete -= 1
        before = len(self.bank.fresh)
        row = [rollout.reward for rollout in self.bank.get(wanted)]
        self.left -= len(self.bank.fresh) - before
        if all(reward is None for reward in row):
            self.counts["unmeasured"] += len(row)
            return None
        return row


def _outcome(
    bank: UnorderedBank,
    measured: Sequence[tuple[Candidate, Row]],
    population: Population,
    counts: Counter[str],
    asked: AskedLMs,
    optimizer: str,
) -> Search:
    """The search's outcome, with what a killed process paid for and this one did not need."""
    unused, unused_tokens = bank.left_over()
    unmeasured = sum(score is None for _, row in measured for score in row)
    counts = counts + Counter(unmeasured=unmeasured, rollouts_unused=unused) + asked.counts
    search = outcome_of(bank, measured, population, counts, dollars=asked.dollars, optimizer=optimizer)
    return replace(search, rollouts=search.rollouts + unused, sampled_tokens=search.sampled_tokens + unused_tokens)
