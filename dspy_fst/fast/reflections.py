"""The reflections of a search, all of one iteration in flight together: gepa's ReflectionLM over DSPy's proposers.

gepa hands over the jobs of an iteration at once and takes their texts in the same order. The journal records results in
the order of the jobs too, each as soon as those before it are known. So neither the search nor its record depends on
which answer comes first, and a kill costs no more than the answers that overtook an earlier one.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from typing import TypedDict

from gepa.proposer.reflective_mutation.reflection_lm import ReflectionProposal

from dspy_fst.fast.journal_protocol import SearchJournal, operation_key
from dspy_fst.fast.latex_repair import acceptable_texts
from dspy_fst.fast.proposer_warnings import collected_warnings
from dspy_fst.fast.reflection_cost import CostMeter, counted_in
from dspy_fst.fast.reflective_dataset import Record
from dspy_fst.formatting.demo_texts import is_demos
from dspy_fst.rollout.components import lost_lines
from dspy_fst.rollout.worker_pool import run_all

Texts = dict[str, str]
"""Component -> text."""
ReflectiveDataset = dict[str, list[Record]]
"""Component -> what a reflection is shown of the runs in which it had a part."""
DrawDemos = Callable[[str, str, str], str | None]
"""(component, its text, the reflection's key) -> other demos; None: no others."""
Proposer = Callable[[Texts, ReflectiveDataset, list[str]], Texts]
TRIES = 2
"""How often a reflection is asked for before it counts as lost (gepa's number)."""
REFLECTION_S = 1800.0
"""Seconds after which one of several reflections in flight counts as failed: reasoning models take minutes, and DSPy's
LM has time limits and retries of its own below that (ours)."""


class ReflectionResult(TypedDict, total=False):
    """What one reflection gave, as the journal keeps it: ``texts`` or ``failed``, ``warned`` and ``spent``."""

    texts: Texts
    failed: str
    """The exception, as text."""
    warned: list[str]
    """What the proposer has warned of so far in this round of reflections."""
    spent: dict[str, float]
    """What the reflection LM's calls cost since the result before it in this round, see `CostMeter`. Absent where it
    was not called, and in the journals of older releases."""


@dataclass(frozen=True)
class _Job:
    """One reflection to make."""

    key: str
    candidate: Texts
    dataset: ReflectiveDataset
    components: list[str]

    @property
    def reflected(self) -> list[str]:
        """The components that a reflection is asked for."""
        return [name for name in self.components if name in self.dataset and not is_demos(name)]


class Reflections:
    """Asks for reflections, each once, and again for those that failed.

    Args:
        propose: New texts from (candidate, reflective dataset, components); called by several threads at once where
            gepa hands over several jobs.
        protected: Component -> lines of its text that every proposal keeps.
        draw_demos: Proposes demos, which no reflection is asked for.
        flex_paths: Components that are sources of dspy.Flex modules.
        meter: Of the reflection LM.
        collects_warnings: Whether warnings are the proposer's own, and so the run's.
    """

    def __init__(
        self,
        propose: Proposer,
        journal: SearchJournal,
        protected: Mapping[str, Sequence[str]],
        draw_demos: DrawDemos,
        flex_paths: Collection[str],
        meter: CostMeter,
        *,
        collects_warnings: bool,
    ):
        self._propose, self._journal, self._meter = propose, journal, meter
        self._draw_demos = draw_demos
        self._protected, self._flex_paths, self._collects_warnings = protected, flex_paths, collects_warnings
        self._expected: list[str] = []
        """Keys of the reflective sets that gepa has been given since it last asked for reflections."""
        self.sets = 0
        """Reflective sets so far, empty ones included."""
        self.counts: Counter[str] = Counter()
        self.dollars: float | None = None
        """What the reflection LM cost, as far as its prices are known; None: no call had a known one."""
        self.last_failure = ""
        """The exception of the newest reflection that failed."""
        self.warned: dict[str, None] = {}
        """What the proposer warned of, each text once."""
        self.stopped_by: Exception | None = None
        """What ends the search, e.g. a journal of another one. gepa logs whatever a reflection raises and goes on."""

    @property
    def all_failed(self) -> bool:
        """Whether reflections failed and none succeeded."""
        return bool(self.counts["reflections_failed"]) and not self.counts["reflections"]

    # ---- reflective sets -------------------------------------------------------------------------

    def next_key(self, candidate: Mapping[str, str], components: list[str]) -> str:
        """Names the reflection on the next set. An empty set is followed by none and leaves no record, so the key holds
        the set's number."""
        self.sets += 1
        return operation_key([self.sets, sorted(candidate.items()), components])

    def is_on_record(self, key: str) -> bool:
        """Whether all tries at this reflection were made by a killed process, so that its set is not read."""
        results: list[ReflectionResult] = self._journal.ahead("reflection", key)
        return len(results) >= TRIES or any("texts" in result for result in results)

    def expect(self, key: str) -> None:
        """gepa has been given the set of this key: the next jobs hold one for it, in the order of the sets."""
        self._expected.append(key)

    # ---- gepa's BatchReflectionLM ----------------------------------------------------------------

    def reflect(
        self, candidate: Texts, reflective_dataset: ReflectiveDataset, components_to_update: list[str]
    ) -> tuple[ReflectionProposal, "Reflections"]:
        """gepa asks here again, job by job, for what `reflect_many` raised at."""
        if self.stopped_by is not None:
            raise self.stopped_by
        return self.reflect_many([(candidate, reflective_dataset, components_to_update)])[0]

    def reflect_many(
        self, jobs: Sequence[tuple[Texts, ReflectiveDataset, list[str]]]
    ) -> list[tuple[ReflectionProposal, "Reflections"]]:
        """New texts for each job, in order; none for one whose reflection failed."""
        keys, self._expected = self._expected, []
        try:
            named = [_Job(key, *job) for key, job in zip(keys, jobs, strict=True)]
            texts = self._texts(named)
        except Exception as error:
            self.stopped_by = error
            raise
        return [(ReflectionProposal(texts.get(job.key, {})), self) for job in named]

    def _texts(self, jobs: Sequence[_Job]) -> dict[str, Texts]:
        """Key -> texts, of the jobs that gave any."""
        results: dict[str, ReflectionResult] = {}
        for _ in range(TRIES):
            due = [job for job in jobs if job.reflected and "texts" not in results.get(job.key, {})]
            results |= {job.key: result for job, result in zip(due, self._one_try(due), strict=True)}
        found = {}
        for job in jobs:
            if "texts" in (result := results.get(job.key, {"texts": {}})):
                written = {name: text for name, text in result["texts"].items() if not is_demos(name)}
                texts = acceptable_texts(written, job.candidate, self._flex_paths, self.counts)
                found[job.key] = {name: self._with_protected(name, text) for name, text in texts.items()}
                found[job.key] |= self._drawn(job)
        return found

    def _drawn(self, job: _Job) -> Texts:
        """New demos, where the job's components hold some."""
        drawn = {
            name: self._draw_demos(name, job.candidate[name], job.key) for name in job.components if is_demos(name)
        }
        return {name: text for name, text in drawn.items() if text is not None}

    def _with_protected(self, component: str, text: str) -> str:
        """The text, with the protected lines that it lost appended."""
        lost = lost_lines(text, self._protected.get(component, ()))
        self.counts["lines_restored"] += len(lost)
        return "\n".join([text, *lost])

    def _one_try(self, jobs: Sequence[_Job]) -> list[ReflectionResult]:
        """What each reflection gives: recalled as far as the journal goes, then asked for."""
        results: list[ReflectionResult] = []
        for job in jobs:
            recalled: ReflectionResult | None = self._journal.recall("reflection", job.key)
            if recalled is None:
                break
            results.append(recalled)
        results += self._asked(jobs[len(results) :])
        for result in results:
            self.warned |= dict.fromkeys(result.get("warned", ()))
            self.counts["reflections_failed" if "failed" in result else "reflections"] += 1
            self.last_failure = result.get("failed", self.last_failure)
            self.dollars = counted_in(self.counts, self.dollars, result.get("spent", {}))
        return results

    def _asked(self, jobs: Sequence[_Job]) -> list[ReflectionResult]:
        """Ask for all of them together; each result is recorded once those before it are."""
        results: list[ReflectionResult] = []
        ahead: dict[int, ReflectionResult] = {}
        self._meter.take()  # of calls that were no reflections: a metric may ask the same LM

        def take(answer: tuple[int, ReflectionResult]) -> None:
            ahead.update([answer])
            while (place := len(results)) in ahead:
                given: ReflectionResult = {**ahead.pop(place), "warned": list(warned)}
                if spent := self._meter.take():
                    given["spent"] = spent
                results.append(self._journal.record("reflection", jobs[place].key, given))

        collecting: AbstractContextManager[list[str]] = (
            collected_warnings() if self._collects_warnings else nullcontext([])
        )
        with collecting as warned:
            if len(jobs) == 1:  # in the caller's thread, as the proposer may be bound to it
                take((0, self._reflected(jobs[0])))
            elif jobs:
                self._in_flight_together(jobs, take)
        return results

    def _in_flight_together(self, jobs: Sequence[_Job], take: Callable[[tuple[int, ReflectionResult]], None]) -> None:
        def job(index: int) -> Callable[[], tuple[int, ReflectionResult]]:
            context = copy_context()  # the caller's dspy.context applies in the threads
            return lambda: (index, context.run(self._reflected, jobs[index]))

        late: ReflectionResult = {"failed": f"TimeoutError('no answer within {REFLECTION_S:g} s')"}
        run_all(
            [job(index) for index in range(len(jobs))],
            threads=len(jobs),
            timeout_s=REFLECTION_S,
            on_timeout=lambda index: (index, late),
            on_result=take,
        )

    def _reflected(self, job: _Job) -> ReflectionResult:
        try:
            dataset = {name: records for name, records in job.dataset.items() if not is_demos(name)}
            texts = self._propose(job.candidate, dataset, job.reflected)
            if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
                raise TypeError(f"the proposer gave no text for {', '.join(map(str, wrong))}")
            return {"texts": texts}
        except Exception as error:
            return {"failed": repr(error)}
