"""A run in progress: what the alternation in optimizer.py works with, opened, timed, committed and closed."""

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.engine.base import Checkpoint
from dspy_fst.errors import NotFiniteError
from dspy_fst.fast.evolve import Search, SearchSettings
from dspy_fst.fast.gepa_adapter import Propose, ProposeCode
from dspy_fst.fast.reporting import candidates_told, cycle_report
from dspy_fst.fast.rollout_bank import Play
from dspy_fst.fast.search_warnings import search_warnings
from dspy_fst.monitoring.history import best_versions, is_stuck
from dspy_fst.monitoring.observer import Observer
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.rollout.components import read_texts
from dspy_fst.rollout.rendering import held_under
from dspy_fst.rollout.reward import feedback_by
from dspy_fst.rollout.rollouter import Player, Task
from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.ending import EVENT, StopReason, complete
from dspy_fst.run.journal import Journal
from dspy_fst.run.refusals import refuse_stale, refuse_unmeasured
from dspy_fst.run.validated import Validated, When, best_validated, exhausted, handed_in
from dspy_fst.slow.trainer import Trainer
from dspy_fst.slow.update_metrics import NO_UPDATE
from dspy_fst.training.plan import Cycle, Plan
from dspy_fst.training.publisher import NaturalTexts, Publishing, recoveries
from dspy_fst.training.validating import Validation
from dspy_fst.types import (
    Batch,
    Candidate,
    CycleReport,
    Group,
    HeldRollout,
    Population,
    Problem,
    Rollout,
    StepReport,
    UpdateReport,
    version_of,
)


@dataclass
class Session:
    """Everything one compile() holds. Methods are the verbs of the alternation."""

    config: FSTConfig
    plan: Plan
    trainset: Sequence[dspy.Example]
    valset: Sequence[dspy.Example]
    program: dspy.Module
    """The copy of the student that is trained; its policy predictors speak with ``policy``."""
    policy: PolicyLM
    trained: frozenset[str]
    """Names of the predictors whose calls the weights learn from; all of them speak with the policy."""
    player: Player
    trainer: Trainer
    run: RunDirectory
    validation: Validation
    population: Population
    propose: Propose | None
    code_proposer: ProposeCode | None
    reflection_lm: dspy.LM | None
    cycle_reports: list[CycleReport] = field(default_factory=list)
    step_reports: list[StepReport] = field(default_factory=list)
    calls_per_rollout: float = 0.0
    tokens_per_rollout: float = 0.0
    """Measured on the first examples before the start."""
    stopped: StopReason | None = None
    """Why no further step is made before the plan is done; None as long as it goes on."""
    _seconds: Counter[str] = field(default_factory=Counter)
    observer: Observer = field(init=False)
    _publishing: Publishing = field(init=False)
    _journal: Journal | None = None
    _trainer_moved: bool = True
    """Whether the trainer changed since the last commit."""
    _moved_at: int = 0
    """Steps after which the weights moved last: their version."""

    def __post_init__(self) -> None:
        """Take up the reports of a run that goes on."""
        self.observer = Observer(self.run, self.program, self.policy, self.config, self.trainer.tokenizer)
        texts = NaturalTexts(self.program, self.trained, self.trainset, self.trainer.tokenizer)
        self._publishing = Publishing(
            self.policy.handle, self.trainer, texts, tolerance=self.config.sync_tolerance, tell=self._tell_recovery
        )
        events = self.run.events()
        self.cycle_reports += [CycleReport.from_json(e["report"]) for e in events if e["event"] == "cycle"]
        self.step_reports += [StepReport.from_json(e["report"]) for e in events if e["event"] == "step"]
        self.observer.recall(self.step_reports, events)
        self._stop_if_nothing_is_gained()

    # ---- where the run stands ------------------------------------------------------------------

    def cycles(self) -> Iterator[Cycle]:
        """Cycles that are not finished; none any more once the run was stopped."""
        first = self.run.state.get("cycle", 0)
        return (cycle for cycle in self.plan.cycles if cycle.index >= first and self.stopped is None)

    def must_search(self, cycle: Cycle) -> bool:
        """Whether this cycle has a fast phase that was not committed yet."""
        due = bool(cycle.search_budget) and self.run.state.get("searched", -1) < cycle.index
        if not due or cycle.index == 0 or self.config.search_when_flat is None:
            return due
        before = next(report for report in self.step_reports if report.step == cycle.steps.start - 1)
        return is_stuck(before, self.config.search_when_flat, self.config.perfect_score)

    def steps(self, cycle: Cycle) -> Iterator[int]:
        """Steps of the cycle that were not committed yet; none any more once the run was stopped."""
        first = max(cycle.steps.start, self.run.state.get("step", 0))
        return (step for step in range(first, cycle.steps.stop) if self.stopped is None)

    def stop(self, reason: StopReason) -> None:
        """Make no further step: the step in hand is committed, and the alternation is over."""
        self.stopped = self.stopped or reason

    def _stop_if_nothing_is_gained(self) -> None:
        reason = self.observer.reason_to_stop or exhausted(self.validation.states, self.config.patience)
        if reason and len(self.step_reports) < self.plan.updates and not self.plan.searches_late:
            self.stop(reason)

    def tell_end(self) -> None:
        """Say why the run is over; after the end's validation (see `dspy_fst.run.ending`)."""
        self.run.emit(EVENT, reason=(self.stopped or complete(len(self.step_reports))).told)

    # ---- fast ----------------------------------------------------------------------------------

    def anchors(self, cycle: Cycle) -> list[Problem]:
        return [Problem(index, self.trainset[index]) for index in self.plan.anchors(cycle.index)]

    def search_tools(self, cycle: Cycle) -> dict[str, Any]:
        """The arguments of evolve() that belong to the run: who plays, who reflects, what it may spend."""
        self.run.tell({"event": "phase", "phase": f"cycle {cycle.index}: evolving instructions"})
        self._seconds.clear()
        self._journal = self.run.open_search(cycle.index)
        if self._journal.replayed:
            self.tell_note(f"cycle {cycle.index}: {self._journal.replayed} acts of its search were already paid for")
        return {
            "journal": self._journal,
            "play": self._play_for_search(cycle),
            "feedback": feedback_by(self.player.reward),
            "propose": self.propose,
            "code_proposer": self.code_proposer,
            "reflection_lm": self.reflection_lm,
            "on_candidate": self._tell_candidate,
            "settings": SearchSettings(
                size=self.config.population_size,
                budget=cycle.search_budget,
                minibatch=self.config.reflection_minibatch,
                perfect_score=self.config.perfect_score,
                components=self.config.components,
                seed=random.Random(f"{self.config.seed} search {cycle.index}").getrandbits(31),
                record_tokens=self.config.reflection_tokens,
                protected=self.config.protected,
            ),
        }

    def _play_for_search(self, cycle: Cycle) -> Play:
        def play(wanted: Sequence[tuple[Problem, Candidate]]) -> list[Rollout]:
            tasks = [Task(problem, candidate) for problem, candidate in wanted]
            with self._timed("sampling"):
                return self.player.play(tasks, f"search-{cycle.index}", self._tell_rollout)

        return play

    def commit_search(self, cycle: Cycle, search: Search) -> None:
        """Keep what the fast phase found."""
        report = cycle_report(cycle.index, search, recoveries(self.policy), self._seconds["sampling"])
        self.population = search.population
        self.cycle_reports.append(report)
        self.run.save_population(cycle.index, search.population)
        told = {"candidates": candidates_told(search), "parents": search.population.parents, **search.money}
        self.run.emit("cycle", report=report, **told)
        self.observer.see_search(cycle.index, search.played)
        step = self.run.state.get("step", 0)
        for text in search_warnings(search.counts, cycle.index, search.warned):
            self.run.emit("warning", step=step, text=text)
        self._commit(cycle=cycle.index, searched=cycle.index, step=step, population=search.population)
        if self._journal is not None:
            self._journal.remove()

    # ---- slow ----------------------------------------------------------------------------------

    def play(self, step: int, population: Population) -> list[Group]:
        """The groups of a step: G rollouts of each of its problems, split evenly over the population."""
        self.run.tell({"event": "phase", "phase": f"step {step}: rollouts", "quiet": True})
        self._seconds.clear()
        if self.config.method == "distill":
            return []
        problems = [Problem(index, self.trainset[index]) for index in self.plan.problems(step)]
        with self._timed("sampling"):
            groups = self.player.groups(
                problems, population, self.config.group_size, f"step-{step}", on_rollout=self._tell_rollout
            )
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        self._require_sound(step, rollouts)
        self.see_texts(rollouts)
        return groups

    def play_seed(self, step: int, population: Population) -> list[HeldRollout]:
        """Rollouts of the step's problems under the program's own texts, where the recipe holds the policy to them."""
        if self.config.seed_kl_coefficient == 0:
            return []
        seed = self._own_texts()
        tasks = [
            Task(Problem(index, self.trainset[index]), seed, sample)
            for index in self.plan.problems(step)
            for sample in range(self.config.seed_kl_rollouts)
        ]
        with self._timed("sampling"):
            rollouts = self.player.play(tasks, f"seed-{step}", self._tell_rollout, anew=self.config.distills)
        self._require_sound(step, rollouts)
        if not self.config.distills:
            return [HeldRollout(rollout, tuple(call.prompt_ids for call in rollout.calls)) for rollout in rollouts]
        return held_under(population.members, rollouts, self.trainer.tokenizer)

    def _own_texts(self) -> Candidate:
        return read_texts(self.program, tools=self.config.tool_descriptions == "evolved")

    @property
    def credit_rules(self) -> dict[str, Any]:
        """The arguments of credit() that belong to the recipe."""
        return {
            "baseline": self.config.baseline,
            "normalize": self.config.advantage_normalization,
            "trained": self.trained,
            "held_alone": self.config.method == "distill",
        }

    def _require_sound(self, step: int, rollouts: Sequence[Rollout]) -> None:
        refuse_stale(f"step {step}", rollouts, self.policy.checkpoint.version)
        refuse_unmeasured(step, rollouts, self.config.max_masked_share, self.run.path)

    def update(self, batch: Batch) -> UpdateReport:
        """One weight update; a batch without a live group leaves the weights as they are.

        A loss or gradient that is not finite does too: the batch is kept for inspection.

        Raises:
            NotFiniteError: it was so in ``max_skipped_updates`` steps before this one.
            MismatchError: the batch was sampled from another distribution than the trainer's.
        """
        self.run.tell({"event": "phase", "phase": "weight update", "quiet": True})
        try:
            with self._timed("update"):
                return self.trainer.step(batch)
        except NotFiniteError as error:
            return self._skipped(batch, error)

    def _skipped(self, batch: Batch, error: NotFiniteError) -> UpdateReport:
        path = self.run.save_skipped(self.step_reports[-1].step + 1 if self.step_reports else 0, batch)
        in_a_row = sum(1 for _ in takewhile(lambda report: report.update.skipped, reversed(self.step_reports)))
        if in_a_row >= self.config.max_skipped_updates:
            raise NotFiniteError(
                f"{error}. {in_a_row} updates before this one were skipped for such a cause, so the run "
                f"stops (max_skipped_updates); the batch is in {path}"
            ) from error
        return replace(NO_UPDATE, skipped=f"{error}; the batch is in {path.relative_to(self.run.path)}")

    def publish(self, step: int) -> None:
        """Hand the weights that the ``step``-th update moved last to the engine and prove that it serves them.

        Raises:
            SyncError, DiskError, EngineError: as `Publishing.serve` has it.
        """
        version = version_of(step)
        self._trainer_moved, self._moved_at = True, step
        with self._timed("publish"):
            with self.run.writing():
                checkpoint = self.trainer.publish(self.run.weights_path(version), version)
            self._publishing.serve(checkpoint)

    def see_texts(self, rollouts: Sequence[Rollout]) -> None:
        """Verify later publishes on these prompts and replies, unless some were seen before."""
        self._publishing.texts.see(rollouts)

    def commit_step(
        self,
        step: int,
        cycle: Cycle,
        groups: Sequence[Group],
        batch: Batch,
        update: UpdateReport,
        population: Population,
    ) -> None:
        """Keep what the slow step measured, and where one is due the state to go on from (see `_state_is_due`)."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
        report = StepReport(
            step=step,
            cycle=cycle.index,
            reward=sum(rewards) / len(rewards) if rewards else None,
            counts={**batch.counts, **recoveries(self.policy)},
            update=update,
            sampled_tokens=sum(rollout.tokens for rollout in rollouts) + batch.counts["held_tokens"],
            seconds=dict(self._seconds),
            predictors=batch.predictors,
            weights=self.step_reports[-1].left if self.step_reports else version_of(0),
            published=version_of(self._moved_at),
        )
        self.step_reports.append(report)
        self.run.emit("step", report=report)
        self.observer.see(report, groups)
        if self.validation and self.plan.validates_after(step):
            self._measure("between", population, population.unique())
        self._stop_if_nothing_is_gained()
        if self._state_is_due(step, cycle):
            searched = self.run.state.get("searched", -1)
            self._commit(cycle=cycle.index, searched=searched, step=step + 1, population=population)
        self.prune_weights()  # only now is known how good the weights were that sampled this step

    def _state_is_due(self, step: int, cycle: Cycle) -> bool:
        """Every ``checkpoint_every`` steps, where the run ends or is stopped, and before a search: its journal goes on
        from a state."""
        later = [other for other in self.plan.cycles if other.index > cycle.index]
        ends = step + 1 == cycle.steps.stop
        return (
            self.stopped is not None
            or (step + 1) % self.config.checkpoint_every == 0
            or (ends and not any(other.steps for other in later))
            or (ends and bool(later) and self.must_search(later[0]))
        )

    def prune_weights(self) -> None:
        """Remove what is neither the first, nor the best, nor among the newest weights."""
        with self.run.writing():
            committed = self.run.state.get("step", 0)
            best = best_versions(self.step_reports, committed) | best_validated(self.validation.states, committed)
            self.run.prune_weights(self.config.keep_weights, best)

    def _commit(self, **state: Any) -> None:
        save_trainer = self.trainer.save_state if self._trainer_moved else None
        self.run.commit(save_trainer, judged_by=self.player.reward.identity, moved_at=self._moved_at, **state)
        self._trainer_moved = False

    def commit_start(self) -> None:
        """Keep the state before the first search."""
        self._commit(cycle=0, searched=-1, step=0, population=self.population)

    # ---- validation, outside of the budget -------------------------------------------------------

    def validate_start(self) -> None:
        """Measure the student as it was handed in: its own texts under its own weights."""
        own = self._own_texts()
        self._measure("start", handed_in(own, self.population), [own])
        self.commit_start()

    def validate_end(self, population: Population) -> Validated | None:
        """Measure the population under the final weights; None without a valset."""
        return self._measure("end", population, population.unique()) if self.validation else None

    def serve_validated(self, state: Validated) -> None:
        """Serve the weights of a validated state, which are kept."""
        if state.weights != self.policy.checkpoint.version:
            self._publishing.serve_again(Checkpoint(state.weights, self.run.weights_path(state.weights)))

    def _measure(self, when: When, population: Population, candidates: Sequence[Candidate]) -> Validated:
        return self.validation.measure(
            when,
            step=len(self.step_reports),
            searched=self.cycle_reports[-1].cycle if self.cycle_reports else -1,
            weights=self.policy.checkpoint.version,
            population=population,
            candidates=candidates,
        )

    # ---- watching ------------------------------------------------------------------------------

    def tell_note(self, text: str) -> None:
        """A sentence for whoever watches; it is not kept."""
        self.run.tell({"event": "note", "text": text})

    def _tell_recovery(self, text: str) -> None:
        """From the thread that recovers; the count goes into the step's report, and so into the events."""
        self.tell_note(f"warning: {text}")

    def _tell_rollout(self, rollout: Rollout) -> None:
        self.run.tell({"event": "rollout", "reward": rollout.reward})

    def _tell_candidate(self, candidate: Candidate, score: float) -> None:
        self.run.tell({"event": "candidate", "texts": candidate.texts, "score": score})

    @contextmanager
    def _timed(self, activity: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[activity] += time.monotonic() - started  # type: ignore[assignment]
