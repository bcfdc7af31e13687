"""What is recorded about a run's steps while it goes on: sampled replies, warnings, and whether anything is learnt.

Everything is a function of the step reports and of the newest step's rollouts, so a continued run records the same as
an uninterrupted one. It shows its earlier reports to a new `Watch` and drops the warnings for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.engine.chat import decoded
from dspy_fst.monitoring.rules import ROLLOUT_RULES, UPDATE_RULES, Form, History
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.rollout.call_recorder import is_recorded
from dspy_fst.rollout.chat_adapters import adapter_in_force, kept_by
from dspy_fst.rollout.summaries import failed_reply_of, summarize, telling
from dspy_fst.run.directory import Event, RunDirectory
from dspy_fst.run.ending import StopReason
from dspy_fst.run.learning import Standstill, UpdateSummary, standstill, update_summary
from dspy_fst.run.phase_reports import StepReport
from dspy_fst.types import Group, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CALM = 5
"""After this many steps without a problem it counts as gone, and is warned of again when it returns (ours)."""


class Watch:
    """Warns of each kind of problem once an episode.

    Args:
        worst: Reward of a failed rollout.
        best: Reward of a perfect rollout.
        parse_share: ``FSTConfig.parse_warning_share``.
        loss: ``FSTConfig.loss``.
        fresh: Whether every optimizer step learns from rollouts of its own weights (``updates_per_batch=1``).
    """

    def __init__(
        self,
        worst: float = 0.0,
        best: float = 1.0,
        parse_share: float = 0.1,
        loss: str = "cispo",
        fresh: bool = True,
    ):
        self._worst, self._best, self._parse_share = worst, best, parse_share
        self._loss, self._fresh = loss, fresh
        self._reports: list[StepReport] = []
        self._last_seen: dict[str, int] = {}

    def see(self, report: StepReport, form: Form | None = None, reply: str = "") -> list[str]:
        """The warnings that follow from this report: what was seen, over how many steps, and what to do.

        Args:
            report: The report of the newest step.
            form: The form of the program's prompts now. Advice leaves out what it does already.
            reply: A failed reply of the step and its reason, for warnings about failed replies.
        """
        self._reports.append(report)
        now = len(self._reports)
        scores = (self._worst, self._best, self._parse_share)
        history = History(self._reports, *scores, form or Form(), reply, self._loss, self._fresh)
        warnings = []
        for finding in filter(None, (rule(history) for rule in (*ROLLOUT_RULES, *UPDATE_RULES))):
            if finding.kind not in self._last_seen or now - self._last_seen[finding.kind] > CALM:
                warnings.append(str(finding))
            self._last_seen[finding.kind] = now
        return warnings


SEARCH_SAMPLES = "search_samples"
"""Kind of the event with samples of a search. Samples of a step are in events of kind ``trajectories``."""


class Observer:
    """Watches one run.

    Args:
        run: Where samples and warnings are written.
        program: The copy of the program that is trained.
        policy: The LM of its trained predictors.
        config: The recipe.
        tokenizer: Decodes sampled token ids.
    """

    def __init__(
        self,
        run: RunDirectory,
        program: dspy.Module,
        policy: PolicyLM,
        config: FSTConfig,
        tokenizer: "PreTrainedTokenizerBase",
    ):
        self._run, self._program, self._policy, self._config = run, program, policy, config
        self._decode = partial(decoded, tokenizer)
        fresh = config.updates_per_batch == 1
        self._watch = Watch(config.worst_score, config.perfect_score, config.parse_warning_share, config.loss, fresh)
        self._reports: list[StepReport] = []
        self._seen = 0
        self._tried: Event | None = None

    def recall(self, reports: Sequence[StepReport], events: Sequence[Event]) -> None:
        """Take in the earlier steps of a continued run. Their warnings were given before.

        Args:
            reports: The reports of these steps.
            events: All events of the run so far.
        """
        for report in reports:
            self._reports.append(report)
            self._watch.see(report)
        self._tried = next((event for event in reversed(events) if event["event"] == "parse_trial"), None)

    @property
    def tried(self) -> Event | None:
        """Result of the newest trial of other prompt forms (`training.parse_trial`); None when none was made."""
        return self._tried

    def keep_trial(self, record: Mapping[str, object]) -> None:
        """Record the result of a trial. Later warnings use it."""
        self._tried = record
        self._run.emit("parse_trial", **record)

    def see(self, report: StepReport, groups: Sequence[Group]) -> None:
        """Record samples of the step that has ended, and the warnings that follow from its report."""
        self._reports.append(report)
        self._seen += 1
        if kept := self._config.recorded_samples:
            samples = telling(groups, kept, f"{self._config.seed} samples {report.step}")
            self._run.emit(
                "trajectories", step=report.step, rollouts=[summarize(sample, self._decode) for sample in samples]
            )
        reply = failed_reply_of([rollout for group in groups for rollout in group.rollouts])
        for text in self._watch.see(report, self.form, reply):
            self._run.emit("warning", step=report.step, text=text)

    def see_search(self, cycle: int, rollouts: Sequence[Rollout]) -> None:
        """Record samples of the search that has ended, as many as for a step.

        A search that is repeated after a kill reads its rollouts from its journal, which holds no calls. So calls are
        left out of every search's samples, and the events are the same.
        """
        if kept := self._config.recorded_samples:
            by_problem: dict[int, list[Rollout]] = {}
            for rollout in rollouts:
                by_problem.setdefault(rollout.problem, []).append(replace(rollout, calls=(), failed_in=None))
            groups = [Group(problem, tuple(members)) for problem, members in by_problem.items()]
            samples = telling(groups, kept, f"{self._config.seed} samples of search {cycle}")
            records = [{**summarize(sample), "tokens": None} for sample in samples]
            self._run.emit(SEARCH_SAMPLES, cycle=cycle, rollouts=records)

    @property
    def went_on(self) -> bool:
        """Whether this process has made a step."""
        return self._seen > 0

    # ---- whether anything is learnt ------------------------------------------------------------

    @property
    def ending(self) -> UpdateSummary:
        """What the updates have changed so far."""
        return update_summary(self._reports, self._config.worst_score, self._config.perfect_score)

    @property
    def standstill(self) -> Standstill | None:
        """The newest steps, if none of them moved the weights; else None."""
        return standstill(self._reports, self._config.worst_score, self._config.perfect_score)

    @property
    def reason_to_stop(self) -> StopReason | None:
        """The reason to stop when ``max_unmoved_steps`` steps in a row moved nothing; else None."""
        limit, still = self._config.max_unmoved_steps, self.standstill
        if limit is None or still is None or len(still.steps) < limit:
            return None
        return StopReason("nothing_learned", len(self._reports), still.words)

    # ---- the form of the prompts ---------------------------------------------------------------

    @property
    def form(self) -> Form:
        """The form of the program's prompts now, and what is known of other forms."""
        tried = self.tried
        predictors = [predictor for _, predictor in self._program.named_predictors()]
        trained = [predictor for predictor in predictors if is_recorded(predictor.lm or dspy.settings.lm)]
        return Form(
            adapter=type(kept_by(self._program) or adapter_in_force()).__name__,
            demos=any(predictor.demos for predictor in trained),
            temperature=self._policy.sampling_temperature,
            helped=tried["helped"] if tried else "",
            tried=tried is not None,
        )
