"""A run in progress: its methods are the verbs of the alternation in optimizer.py.

`Schedule` decides what is due, `Recorder` keeps what is measured, `Publisher` hands the weights over, `Validation`
measures on the valset, and `Observer` warns. A `Session` holds them, with the program, its rollouter and the trainer.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.engine.base import PromptTokens
from dspy_fst.errors import MeasurementError, NotFiniteError, TrainingError
from dspy_fst.fast.demos import DemoSource
from dspy_fst.fast.evolve import Search
from dspy_fst.fast.search_settings import own_texts
from dspy_fst.fast.seated_search import searcher
from dspy_fst.monitoring.observer import Observer
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.reply_limits import longest_reply
from dspy_fst.rollout.rendering import seed_kl_rollouts
from dspy_fst.rollout.reward import feedback_by
from dspy_fst.rollout.rollouter import Rollouter, Task, require_fresh
from dspy_fst.run.directory import Event, RunDirectory
from dspy_fst.run.ending import EVENT, StopReason
from dspy_fst.run.search_journal import Journal
from dspy_fst.run.state import NONE, Documents
from dspy_fst.run.state_writer import STATE_S
from dspy_fst.run.validated import Validated, When, early_stop, starting_population
from dspy_fst.slow.credit import credit, mini_batches
from dspy_fst.slow.length_penalty import penalty_of
from dspy_fst.slow.losses.by_name import loss_of
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.update_metrics import in_one_report
from dspy_fst.training.plan import Cycle, Plan, Schedule
from dspy_fst.training.publisher import NaturalTexts, Publisher, Publishing, counted_prompts, recoveries
from dspy_fst.training.recorder import Recorder
from dspy_fst.training.request import Proposers
from dspy_fst.training.reuse import Reuse
from dspy_fst.training.skipped import skipped_update
from dspy_fst.training.step_problems import StepProblems, step_problems
from dspy_fst.training.validating import Validation
from dspy_fst.types import Batch, Candidate, Group, Population, Problem, Rollout, SeedKLRollout, UpdateReport


@dataclass
class Session:
    """Everything that one ``compile()`` works with."""

    config: FSTConfig
    plan: Plan
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    program: dspy.Module
    """The copy of the student that is trained; its policy predictors speak with ``policy``."""
    policy: PolicyLM
    trained: frozenset[str]
    """Names of the predictors whose calls the weights learn from; all of them speak with the policy."""
    rollouter: Rollouter
    trainer: Trainer
    run: RunDirectory
    validation: Validation
    population: Population
    proposers: Proposers
    recorder: Recorder = field(init=False)
    schedule: Schedule = field(init=False)
    publisher: Publisher = field(init=False)
    observer: Observer = field(init=False)
    _reuse: Reuse | None = None
    """None unless ``reuse_rollouts`` is set."""
    _demo_source: DemoSource = field(init=False)
    _journal: Journal | None = None
    """Of the search in progress."""
    _seconds: Counter[str] = field(default_factory=Counter)
    """Activity -> seconds that the search or step in progress spent on it."""
    _problems: StepProblems = field(init=False)
    """Of the step in progress, as are the next two."""
    _sampled: Sequence[Rollout] = ()
    _prompts: Callable[[], PromptTokens | None] = field(init=False)
    """Counts the prompts that were sampled for since the step began; None where the engine does not count them."""

    def __post_init__(self) -> None:
        """Take up the reports of a run that goes on."""
        config, plan, judged_by = self.config, self.plan, self.rollouter.reward.identity
        self._penalty, self._loss = penalty_of(config), loss_of(config, longest_reply(self.program, self.trained))
        self._reuse = Reuse(self.run, self.program, judged_by, plan.first_steps) if config.reuse_rollouts else None
        self._demo_source = DemoSource(self.trainset, self.trainer.tokenizer)
        self.recorder = Recorder(self.run, judged_by)
        self.schedule = Schedule(self.plan, self.config, lambda: self.run.state, self.recorder.steps)
        texts = NaturalTexts(self.program, self.trained, self.trainset, self.trainer.tokenizer)
        tolerance, tell = self.config.sync_tolerance, self.recorder.recovery
        serving = Publishing(self.policy.handle, self.trainer, texts, tolerance=tolerance, tell=tell)
        self.publisher = Publisher(self.run, self.trainer, serving, self.config.keep_weights)
        self.observer = Observer(self.run, self.program, self.policy, self.config, self.trainer.tokenizer)
        self.observer.recall(self.recorder.steps, self.run.events())
        self._stop_if_nothing_is_gained()

    # ---- what goes on now ----------------------------------------------------------------------

    def phase(self, phase: str, *, quiet: bool = False) -> None:
        """Say what goes on now; ``quiet`` for a live view alone."""
        self._tell({"event": "phase", "phase": phase, **({"quiet": True} if quiet else {})})

    def _tell_rollout(self, rollout: Rollout) -> None:
        self._tell({"event": "rollout", "reward": rollout.reward})

    def _tell(self, event: Event) -> None:
        """Show an event that is not kept. It holds our own words and numbers, so no secret has to be removed."""
        for listener in self.run.listeners:
            listener(event)

    def _begin(self, phase: str, *, quiet: bool = False) -> None:
        """A search or a step begins: its seconds are counted from here."""
        self._seconds.clear()
        self.phase(phase, quiet=quiet)

    @contextmanager
    def _timed(self, activity: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[activity] += time.monotonic() - started  # type: ignore[assignment]

    # ---- what is due ---------------------------------------------------------------------------

    def cycles(self) -> Iterator[Cycle]:
        return self.schedule.cycles()

    def must_search(self, cycle: Cycle) -> bool:
        return self.schedule.must_search(cycle)

    def steps(self, cycle: Cycle) -> Iterator[int]:
        for step in self.schedule.steps(cycle):
            self.trainer.prepare()  # nothing is loaded inside a step
            self._problems = step_problems(self.plan, step, self.recorder.comparable)
            self._prompts = counted_prompts(self.policy)
            yield step

    def stop(self, reason: StopReason) -> None:
        """Make no further step: the current one is committed, and the alternation is over."""
        self.schedule.stop(reason)

    def _stop_if_nothing_is_gained(self) -> None:
        patience = self.config.patience
        self.schedule.stop_early(self.observer.reason_to_stop or early_stop(self.validation.states, patience))

    def tell_end(self) -> None:
        """Say why the run is over; after the end's validation (see `dspy_fst.run.ending`)."""
        self.run.emit(EVENT, reason=self.schedule.end.as_event)
        self.prune_weights()  # the last state is on the disk now

    # ---- fast ----------------------------------------------------------------------------------

    def search(self, cycle: Cycle, population: Population) -> Search:
        """Evolve the population's texts on the cycle's anchors, under the current weights.

        Raises:
            ReflectionError, MeasurementError, RunDirectoryError: as `evolve` has it, FastOptimizerError in its place.
        """
        self._begin(f"cycle {cycle.index}: evolving instructions")
        self._journal = self.run.open_search(cycle.index, self._reuse.conditions if self._reuse else {})
        self.recorder.search_begins(cycle, self._journal)

        return searcher(self.proposers.fast, self.config.num_threads)(
            population,
            self._examples(self.plan.anchors(cycle.index)),
            self.program,
            play=partial(self._play, draw=f"search-{cycle.index}"),
            feedback=feedback_by(self.rollouter.reward),
            settings=self.config,
            size=self.config.population_size,
            budget=cycle.search_budget,
            seed=random.Random(f"{self.config.seed} search {cycle.index}").getrandbits(31),
            demo_source=self._demo_source,
            on_candidate=self.recorder.candidate,
            journal=self._journal,
            **self.proposers.of_search,
        )

    def commit_search(self, cycle: Cycle, search: Search) -> None:
        """Keep what the fast phase found."""
        self.population = search.population
        self.recorder.search_done(cycle, search, recoveries(self.policy, self.rollouter), self._seconds["sampling"])
        self.observer.see_search(cycle.index, search.played)
        step = self.run.state.get("step", 0)
        reuse = self._reuse if step in cycle.steps else None
        problems = step_problems(self.plan, step, self.recorder.comparable).batch if reuse else ()
        documents = reuse.handed_over(search, step, problems) if reuse else {}
        self._commit(cycle.index, cycle.index, step, search.population, documents)
        if self._journal is not None:
            self._journal.remove()

    # ---- slow ----------------------------------------------------------------------------------

    def sample(self, step: int, population: Population) -> list[Group]:
        """The groups of a step: G rollouts of each of its problems, split evenly over the population.

        With ``resample_flat`` groups of other problems follow them, in place of flat ones.
        """
        self._begin(f"step {step}: rollouts", quiet=True)
        if self.config.method == "distill":
            return []
        known = self._reuse.known(step, population, self.policy.checkpoint.version) if self._reuse else ()
        groups = self._groups(step, population, self._problems.batch, known)
        if self.config.resample_flat:
            groups = self._problems.refilled(groups, self._credited, partial(self._groups, step, population))
        self._sampled = [rollout for group in groups for rollout in group.rollouts]
        self._require_sound(step, self._sampled)
        return groups

    def _groups(
        self, step: int, population: Population, problems: Sequence[int], known: Sequence[Rollout] = ()
    ) -> list[Group]:
        asked, size = self._examples(problems), self.config.group_size
        with self._timed("sampling"):
            return self.rollouter.groups(asked, population, size, f"step-{step}", self._tell_rollout, known)

    def sample_seed(self, step: int, population: Population) -> list[SeedKLRollout]:
        """Rollouts of the step's problems under the program's own texts, for the term of ``seed_kl_coefficient``."""
        if self.config.seed_kl_coefficient == 0:
            return []
        seed, samples = own_texts(self.program, self.config), range(self.config.seed_kl_rollouts)
        tasks = [Task(problem, seed, sample) for problem in self._examples(self._problems.batch) for sample in samples]
        rollouts = self._play(tasks, f"seed-{step}", anew=self.config.distills)
        self._require_sound(step, rollouts)
        if not self.config.distills:
            return [SeedKLRollout(rollout, tuple(call.prompt_ids for call in rollout.calls)) for rollout in rollouts]
        return seed_kl_rollouts(population.members, rollouts, self.trainer.tokenizer)

    def credit(self, groups: Sequence[Group], seed_rollouts: Sequence[SeedKLRollout]) -> Batch:
        """Which calls the update learns from, and how much (`dspy_fst.slow.credit`)."""
        batch = self._credited(groups, seed_rollouts)
        batch = self._reuse.counted(batch, groups) if self._reuse else batch
        return self._problems.counted(batch, groups, self._credited) if self._problems.has_options else batch

    def _credited(self, groups: Sequence[Group], seed_rollouts: Sequence[SeedKLRollout] = ()) -> Batch:
        return credit(
            groups,
            loss=self._loss,
            seed_rollouts=seed_rollouts,
            trained=self.trained,
            baseline=self.config.baseline,
            normalize=self.config.advantage_normalization,
            seed_kl_alone=self.config.method == "distill",
            penalty=self._penalty,
        )

    def update(self, batch: Batch) -> UpdateReport:
        """One weight update, of ``updates_per_batch`` optimizer steps.

        A batch without a live group leaves the weights as they are. So does a loss or gradient that is not finite: the
        mini-batch is kept for inspection.

        Raises:
            NotFiniteError: it was so in ``max_skipped_updates`` steps before this one.
            MismatchError: the batch was sampled from another distribution than the trainer's.
        """
        self.phase("weight update", quiet=True)
        step = len(self.recorder.steps)
        draw = random.Random(f"{self.config.seed} mini-batches {step}")
        parts = mini_batches(batch, self.config.updates_per_batch, draw, self._loss)
        if not self.publisher.written.wait(STATE_S):
            raise TrainingError(f"step {step}: the state before it is not on the disk after {STATE_S:g} s")
        with self.policy.handle.asleep() if batch.rows or batch.seed_kl_calls else nullcontext():
            before = self.trainer.updates
            reports = [self._optimizer_step(part, step, place, before) for place, part in enumerate(parts)]
        applied = [report for report in reports if report.skipped is None]
        for skipped in [report.skipped for report in reports if report.skipped is not None] if applied else []:
            self.run.emit("warning", step=step, text=f"one of {len(parts)} optimizer steps was skipped: {skipped}")
        return in_one_report(applied or reports[:1])

    def _optimizer_step(self, batch: Batch, step: int, place: int, before: int) -> UpdateReport:
        try:
            with self._timed("update"):
                return self.trainer.step(batch, moved=self.trainer.updates > before)
        except NotFiniteError as error:
            name = f"step-{step:06d}" + (f"-{place + 1}" if place else "")
            return skipped_update(self.run, self.recorder.steps, self.config.max_skipped_updates, batch, error, name)

    def publish(self, step: int) -> None:
        """Hand the weights that the ``step``-th update moved last to the engine and prove that it serves them.

        Raises:
            SyncError, DiskError, EngineError: as `Publishing.serve` has it.
        """
        with self._timed("publish"):
            self.publisher.publish(step, self._sampled)

    def commit_step(
        self,
        step: int,
        cycle: Cycle,
        groups: Sequence[Group],
        batch: Batch,
        update: UpdateReport,
        population: Population,
    ) -> None:
        """Keep what the slow step measured, and where one is due the state to go on from."""
        published, seconds = self.publisher.moved_to, dict(self._seconds)
        recovered = recoveries(self.policy, self.rollouter)
        report = self.recorder.step_done(
            step, cycle, groups, batch, update, recovered, published, seconds, self._prompts()
        )
        self.observer.see(report, groups)
        if self.validation and self.plan.validates_after(step):
            self._measure("between", population, population.unique())
        self._stop_if_nothing_is_gained()
        self.prune_weights()  # only now is known how good the weights were that sampled this step
        if self.schedule.state_is_due(step, cycle):  # written while the next step is sampled
            self._commit(cycle.index, self.run.state.get("searched", -1), step + 1, population, wait=False)

    def _examples(self, problems: Sequence[int]) -> list[Problem]:
        return [Problem(index, self.trainset[index]) for index in problems]

    def _play(self, tasks: Sequence[Task], draw: str, *, anew: bool = False) -> list[Rollout]:
        with self._timed("sampling"):
            return self.rollouter.rollout(tasks, draw, self._tell_rollout, anew=anew)

    def _require_sound(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """
        Raises:
            TrainingError: calls were sampled by other weights than the published ones.
            MeasurementError: more than ``max_masked_share`` of the rollouts were not measured.
        """
        require_fresh(f"step {step}", rollouts, self.policy.checkpoint.version)
        rollouts = [rollout for rollout in rollouts if not rollout.reused]  # those were measured by the search
        masked = Counter(rollout.mask for rollout in rollouts if rollout.mask is not None)
        if masked.total() > (limit := self.config.max_masked_share) * len(rollouts):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in masked.most_common())
            raise MeasurementError(
                f"step {step}: {masked.total()} of {len(rollouts)} rollouts measured nothing ({reasons}), more than "
                f"max_masked_share={limit:g}. Nothing was learnt from them; mend the cause and compile again with "
                f"run_dir={str(self.run.path)!r} to go on"
            )

    # ---- what is kept ---------------------------------------------------------------------------

    def prune_weights(self) -> None:
        """Remove what is neither the first, nor the best, nor among the newest weights."""
        self.publisher.prune(self.recorder.steps, self.validation.states)

    def commit_start(self, documents: Documents = NONE) -> None:
        """Keep the state before the first search."""
        self._commit(0, -1, 0, self.population, documents)

    def _commit(
        self, cycle: int, searched: int, step: int, population: Population, files: Documents = NONE, wait: bool = True
    ) -> None:
        """Commit a state to go on from: the cycle in progress, the last one searched, steps made and the population."""
        place = {"cycle": cycle, "searched": searched, "step": step, "population": population}
        self.publisher.commit(files, wait=wait, judged_by=self.rollouter.reward.identity, **place)

    # ---- validation, outside of the budget -------------------------------------------------------

    def validate_start(self) -> None:
        """Measure the student as it was handed in, its own texts under its own weights, where that is still due."""
        if self.validation.start_is_due(self.run.state):
            own = own_texts(self.program, self.config)
            self._measure("start", starting_population(own, self.population), [own])
            self.commit_start()

    def validate_end(self, population: Population) -> Validated | None:
        """Measure the population under the final weights; None without a valset."""
        return self._measure("end", population, population.unique()) if self.validation else None

    def serve_validated(self, state: Validated) -> None:
        """Serve the weights of a validated state, which are kept."""
        if state.weights != self.policy.checkpoint.version:
            self.publisher.serve_again(state.weights)

    def _measure(self, when: When, population: Population, candidates: Sequence[Candidate]) -> Validated:
        def play(tasks: Sequence[Task], draw: str) -> list[Rollout]:
            self.phase(f"validating: {len(tasks)} rollouts")
            rollouts = self.rollouter.rollout(tasks, draw)
            require_fresh("validation", rollouts, self.policy.checkpoint.version)
            return rollouts

        return self.validation.measure(
            when,
            play,
            step=len(self.recorder.steps),
            searched=self.recorder.cycles[-1].cycle if self.recorder.cycles else -1,
            weights=self.policy.checkpoint.version,
            population=population,
            candidates=candidates,
        )
