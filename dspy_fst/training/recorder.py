"""What a run measures, as events and reports: one report a search, one a step, with the seconds of each activity."""

from collections.abc import Iterator, Mapping, Sequence

from dspy_fst.engine.base import PromptTokens
from dspy_fst.fast.evolve import Search
from dspy_fst.fast.reporting import candidates_told, cycle_report
from dspy_fst.fast.search_warnings import search_warnings
from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.phase_reports import CycleReport, StepReport, deciles
from dspy_fst.run.search_journal import Journal
from dspy_fst.run.state import start_version
from dspy_fst.training.plan import Cycle
from dspy_fst.types import (
    Batch,
    Candidate,
    Group,
    UpdateReport,
    WeightsVersion,
)


class Recorder:
    """Tells listeners what goes on, and keeps what the run measured.

    Args:
        run: Where events are kept; the reports of its earlier processes are taken up.
        judged_by: Identity of the metric.
    """

    def __init__(self, run: RunDirectory, judged_by: str):
        self._run, self._judged_by = run, judged_by
        events = run.events()
        self.cycles = [CycleReport.from_json(e["report"]) for e in events if e["event"] == "cycle"]
        """Reports of the searches so far."""
        self.steps = [StepReport.from_json(e["report"]) for e in events if e["event"] == "step"]
        """Reports of the steps so far."""

    @property
    def comparable(self) -> list[StepReport]:
        """Reports of the steps that this metric judged, and those of releases that recorded no metric."""
        return [report for report in self.steps if report.judged_by in (None, self._judged_by)]

    def note(self, text: str) -> None:
        """A sentence for whoever watches; it is not kept."""
        self._run.tell({"event": "note", "text": text})

    def recovery(self, text: str) -> None:
        """A failure of the engine that was survived. Its count goes into the step's report, and so into the events."""
        self.note(f"warning: {text}")

    def candidate(self, candidate: Candidate, score: float) -> None:
        self._run.tell({"event": "candidate", "texts": candidate.texts, "score": score})

    def search_begins(self, cycle: Cycle, journal: Journal) -> None:
        """Say what of the search a killed process has already done."""
        if repeated := journal.replayed:
            self.note(f"cycle {cycle.index}: {repeated} acts of its search were already paid for")
        if journal.replaced:
            text = (
                f"cycle {cycle.index}: its search begins anew, because another metric judged the {journal.replaced} "
                "acts that were paid for, and a step may take over its rollouts (reuse_rollouts)"
            )
            self._run.emit("warning", step=self._run.state.get("step", 0), text=text)

    def search_done(self, cycle: Cycle, search: Search, recovered: Mapping[str, int], sampling_s: float) -> None:
        """Keep what the fast phase found.

        Args:
            recovered: Failures of the engine that were survived, by kind.
            sampling_s: Seconds that its rollouts took.
        """
        report = cycle_report(cycle.index, search, recovered, sampling_s)
        self.cycles.append(report)
        self._run.save_population(cycle.index, search.population)
        told = {"candidates": candidates_told(search), "parents": search.population.parents, **search.money}
        self._run.emit("cycle", report=report, **told)
        for text in search_warnings(search.counts, cycle.index, search.warned, search.optimizer):
            self._run.emit("warning", step=self._run.state.get("step", 0), text=text)

    def step_done(
        self,
        step: int,
        cycle: Cycle,
        groups: Sequence[Group],
        batch: Batch,
        update: UpdateReport,
        recovered: Mapping[str, int],
        published: WeightsVersion,
        seconds: Mapping[str, float],
        prompts: PromptTokens | None,
    ) -> StepReport:
        """Keep what the slow step measured.

        Args:
            published: The weights that the step leaves.
            seconds: Of each activity.
            prompts: Those of its rollouts; None where the engine does not count them.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        rewards = [reward for group in groups for reward in group.rewards]
        report = StepReport(
            step=step,
            cycle=cycle.index,
            reward=sum(rewards) / len(rewards) if rewards else None,
            counts={**batch.counts, **recovered},
            update=update,
            sampled_tokens=sum(each.tokens for each in rollouts if not each.reused) + batch.counts["held_tokens"],
            seconds=seconds,
            predictors=batch.predictors,
            weights=self.steps[-1].left if self.steps else start_version(self._run.state),
            published=published,
            group_rewards=tuple(_group_rewards(groups)),
            length_penalty=batch.length_penalty,
            judged_by=self._judged_by,
            prompt_tokens=prompts.in_calls if prompts else None,
            prompt_tokens_read=prompts.read if prompts else None,
            reply_deciles=deciles([len(call.completion_ids) for rollout in rollouts for call in rollout.calls]),
        )
        self.steps.append(report)
        self._run.emit("step", report=report)
        return report


def _group_rewards(groups: Sequence[Group]) -> Iterator[tuple[int, float]]:
    """Mean reward of each group that was measured."""
    for group in groups:
        if len(rewards := group.rewards) > 1:
            yield group.problem, sum(rewards) / len(rewards)
