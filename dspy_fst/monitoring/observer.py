"""What a run says of its steps while it goes on: samples of replies, warnings, and that nothing is learnt any more.

All of it is a function of the step reports and of the newest step's rollouts, so a run that is continued says what an
uninterrupted one does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.monitoring.form_advice import Form
from dspy_fst.monitoring.watch import Watch
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.rollout.adapters import adapter_in_force, kept_by
from dspy_fst.rollout.call_recorder import is_recorded
from dspy_fst.rollout.summaries import failed_reply_of, shown, telling
from dspy_fst.run.directory import Event, RunDirectory
from dspy_fst.run.ending import StopReason
from dspy_fst.run.learning import Ending, Standstill, ending, standstill
from dspy_fst.types import Group, Rollout, StepReport

SEARCH_SAMPLES = "search_samples"
"""The event that holds samples of a search; those of a step stand in ``trajectories``."""


class Observer:
    """Watches one run.

    Args:
        run: Keeps what is said.
        program: The copy that is trained.
        policy: What its trained predictors speak with.
        config: The recipe.
        tokenizer: Turns sampled ids into text.
    """

    def __init__(self, run: RunDirectory, program: dspy.Module, policy: PolicyLM, config: FSTConfig, tokenizer: Any):
        self._run, self._program, self._policy, self._config = run, program, policy, config
        self._decode = tokenizer.decode
        self._watch = Watch(self._worst, config.perfect_score, config.parse_warning_share)
        self._reports: list[StepReport] = []
        self._seen = 0
        self._tried: Mapping[str, Any] | None = None

    def recall(self, reports: Sequence[StepReport], events: Sequence[Event]) -> None:
        """Take up the steps of a run that goes on; what they gave rise to was said.

        Args:
            reports: Of these steps.
            events: All of the run's so far.
        """
        for report in reports:
            self._reports.append(report)
            self._watch.see(report)
        self._tried = next((event for event in reversed(events) if event["event"] == "parse_trial"), None)

    @property
    def tried(self) -> Mapping[str, Any] | None:
        """What came of the newest trial of other forms (`preflight.parse_trial`); None when none was made."""
        return self._tried

    def keep_trial(self, record: Mapping[str, Any]) -> None:
        """Keep what came of a trial, for the warnings to come."""
        self._tried = record
        self._run.emit("parse_trial", **record)

    def see(self, report: StepReport, groups: Sequence[Group]) -> None:
        """Keep samples of the step that has ended, and warn of what its report shows."""
        self._reports.append(report)
        self._seen += 1
        if kept := self._config.recorded_samples:
            samples = telling(groups, kept, f"{self._config.seed} samples {report.step}")
            self._run.emit("trajectories", step=report.step, rollouts=[shown(one, self._decode) for one in samples])
        reply = failed_reply_of([rollout for group in groups for rollout in group.rollouts])
        for text in self._watch.see(report, self.form, reply):
            self._run.emit("warning", step=report.step, text=text)

    def see_search(self, cycle: int, played: Sequence[Rollout]) -> None:
        """Keep samples of the search that has ended, as many as of a step.

        A search that was killed and repeated has its rollouts from its journal, without calls: only what that holds is
        kept, so that the events are the same.
        """
        if kept := self._config.recorded_samples:
            by_problem: dict[int, list[Rollout]] = {}
            for rollout in played:
                by_problem.setdefault(rollout.problem, []).append(replace(rollout, calls=(), failed_in=None))
            groups = [Group(problem, tuple(rollouts)) for problem, rollouts in by_problem.items()]
            samples = telling(groups, kept, f"{self._config.seed} samples of search {cycle}")
            told = [{**shown(one), "tokens": None} for one in samples]
            self._run.emit(SEARCH_SAMPLES, cycle=cycle, rollouts=told)

    @property
    def went_on(self) -> bool:
        """Whether a step was made in this process."""
        return self._seen > 0

    # ---- whether anything is learnt ------------------------------------------------------------

    @property
    def ending(self) -> Ending:
        """What the updates came to so far."""
        return ending(self._reports, self._worst, self._config.perfect_score)

    @property
    def standstill(self) -> Standstill | None:
        """The newest steps, where none of them moved the weights."""
        return standstill(self._reports, self._worst, self._config.perfect_score)

    @property
    def reason_to_stop(self) -> StopReason | None:
        """Why no further step is worth its rollouts: ``max_unmoved_steps`` in a row moved nothing; else None."""
        limit, still = self._config.max_unmoved_steps, self.standstill
        if limit is None or still is None or len(still.steps) < limit:
            return None
        return StopReason("nothing_learned", len(self._reports), still.words)

    # ---- how the program asks ------------------------------------------------------------------

    @property
    def form(self) -> Form:
        """How the program asks now, and what is known of other ways."""
        tried = self.tried
        speaking = [of for _, of in self._program.named_predictors() if is_recorded(of.lm or dspy.settings.lm)]
        return Form(
            adapter=type(kept_by(self._program) or adapter_in_force()).__name__,
            demos=any(predictor.demos for predictor in speaking),
            temperature=self._policy.sampling_temperature,
            helped=tried["helped"] if tried else "",
            tried=tried is not None,
        )

    @property
    def _worst(self) -> float:
        return min(self._config.failure_score, self._config.format_failure_score)
