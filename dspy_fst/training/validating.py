"""Measures states of a run on the valset: the start, in between where asked for, and the end. Outside of the budget.

Every state is measured on the same terms as any other: the same problems, as many rollouts of each, the same
temperature and adapter, and for the same texts the same random draws (common random numbers). The draws have a name of
their own, so that no draw of the training depends on whether there is a valset. What was measured before under the same
weights and texts is not played again.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import dspy

from dspy_fst.config import FSTConfig
from dspy_fst.outcomes.outcome import OutcomeCounts
from dspy_fst.rollout.rollouter import Task
from dspy_fst.run.directory import RunDirectory
from dspy_fst.run.state import StateFields
from dspy_fst.run.validated import EVENT, Validated, When, decline, validated_in
from dspy_fst.training.plan import Plan
from dspy_fst.types import Candidate, Population, Problem, Rollout, WeightsVersion

DRAW = "validation"
Rewards = tuple[float | None, ...]


class Validation:
    """The validations of one run, those of its earlier processes included.

    Args:
        run: Whose events they are.
        metric: Identity of what gives the rewards.
        valset: The problems; empty for a run that validates nothing.
        samples: Rollouts of each problem and candidate.
        fingerprint: Of the problems, the same in every process.
        take_counts: Failures of the engine that were survived since the last call.
    """

    def __init__(
        self,
        run: RunDirectory,
        metric: str,
        valset: Sequence[dspy.Example],
        samples: int,
        fingerprint: str,
        take_counts: Callable[[], Mapping[str, int]],
    ):
        self._run, self._valset, self._samples = run, valset, samples
        self._take_counts = take_counts
        self.terms = {"problems": fingerprint, "samples": samples, "metric": metric}
        everything = validated_in(run.events())
        self._made = len(everything)
        self.states = [state for state in everything if state.terms == self.terms]
        """On the terms of now; whoever continues a run with another valset or metric has none from before."""
        self.left_out = self._made - len(self.states)

    def __bool__(self) -> bool:
        return bool(self._valset)

    def start_is_due(self, state: StateFields) -> bool:
        """Whether a run that stands at this committed state has its start still before it, and it was not measured."""
        stands_there = not (state.get("step") or state.get("warm_start")) and state.get("searched", -1) < 0
        return bool(self) and stands_there and not any(measured.when == "start" for measured in self.states)

    def measure(
        self,
        when: When,
        play: Callable[[Sequence[Task], str], list[Rollout]],
        *,
        step: int,
        searched: int,
        weights: WeightsVersion,
        population: Population,
        candidates: Sequence[Candidate],
    ) -> Validated:
        """Play the candidates, which are the population's first, under the weights that the engine serves; tell it.

        Args:
            play: Makes a rollout of each task, with the random draws of that name.
        """
        began = time.monotonic()
        known = self._known(weights)
        fresh = [candidate for candidate in candidates if candidate.digest not in known]
        rollouts = self._played(fresh, play)
        rewards = known | {candidate.digest: self._rewards(candidate, rollouts) for candidate in fresh}
        repeats = Counter(repeats=(len(candidates) - len(fresh)) * len(self._valset) * self._samples)
        lost = OutcomeCounts.over(rollout.outcome for rollout in rollouts).labels
        counts = Counter(rollouts=len(rollouts)) + repeats + lost + Counter(self._take_counts())
        state = Validated(
            index=self._made,
            when=when,
            step=step,
            searched=searched,
            weights=weights,
            population=population,
            candidates=tuple(candidate.digest for candidate in candidates),
            rewards=tuple(rewards[candidate.digest] for candidate in candidates),
            terms=self.terms,
            counts={"rollouts": 0, **counts},
            sampled_tokens=sum(rollout.tokens for rollout in rollouts),
            seconds=time.monotonic() - began,
        )
        self._keep(state)
        return state

    def _keep(self, state: Validated) -> None:
        self._made += 1
        self.states.append(state)
        written = {name: getattr(state, name) for name in Validated.__dataclass_fields__}
        self._run.emit(EVENT, report=written, scores=state.scores, score=state.score)
        for text in (*_lost(state), *filter(None, [decline(self.states)])):
            self._run.emit("warning", step=None if state.when == "start" else state.step - 1, text=text)

    def _known(self, weights: WeightsVersion) -> dict[str, Rewards]:
        """Digest -> rewards, of candidates that were measured on every problem under these weights."""
        return {
            digest: row
            for state in self.states
            if state.weights == weights
            for digest, row in zip(state.candidates, state.rewards, strict=True)
            if None not in row
        }

    def _played(
        self, candidates: Sequence[Candidate], play: Callable[[Sequence[Task], str], list[Rollout]]
    ) -> list[Rollout]:
        tasks = [
            Task(Problem(index, example), candidate, sample)
            for candidate in candidates
            for index, example in enumerate(self._valset)
            for sample in range(self._samples)
        ]
        return play(tasks, DRAW) if tasks else []

    def _rewards(self, candidate: Candidate, rollouts: Sequence[Rollout]) -> Rewards:
        """Mean over each problem's measured rollouts."""
        of: dict[int, list[float]] = {}
        for rollout in rollouts:
            if rollout.candidate.digest == candidate.digest and rollout.reward is not None:
                of.setdefault(rollout.problem, []).append(rollout.reward)
        return tuple(sum(of[i]) / len(of[i]) if i in of else None for i in range(len(self._valset)))


def _lost(state: Validated) -> Iterator[str]:
    """What a validation did not measure."""
    counts = state.counts
    if masked := OutcomeCounts.of(counts).masked:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in masked.items())
        lost = f"{masked.total()} of {counts['rollouts']} rollouts measured nothing ({reasons})"
        yield f"validation: {lost}, {state.where}"
    if not state.scores and state.when == "end":
        yield "validation: nothing was measured, so the scores on the anchors choose the best candidate"
    elif not state.scores:
        yield f"validation: nothing was measured {state.where}"
    elif unmeasured := [digest for digest in state.candidates if digest not in state.scores]:
        yield f"validation: no rollout of {', '.join(unmeasured)} was measured; such candidates rank last"


def valset_faults(config: FSTConfig | None, valset: object) -> Iterator[str]:
    """Settings that can do nothing without a valset."""
    if config is None or not (valset is None or (isinstance(valset, Sequence) and not valset)):
        return
    advice = "pass valset=[...], examples that the trainset does not hold, or leave the setting out"
    if config.return_best:
        yield f"return_best=True: there is no valset to choose by; {advice}"
    if config.validate_every is not None:
        yield f"validate_every={config.validate_every!r}: there is no valset to measure on; {advice}"


def patience_warnings(config: FSTConfig) -> Iterator[str]:
    """A patience that cannot end the run: too few validations come before its end."""
    if config.patience is None:
        return
    plan = Plan(config, config.problems_per_step)
    before_the_end = plan.updates - bool(plan.cycles[-1].steps)  # a search may come after the last step
    between = sum(plan.validates_after(step) for step in range(before_the_end))
    if between < config.patience:
        yield (
            f"patience={config.patience} cannot end this run early: of its {plan.updates} steps validate_every="
            f"{config.validate_every!r} measures after {between} that something follows; "
            "lower validate_every or patience, or leave patience out"
        )


RISES = 4
"""Problems that must turn from wrong to right, and none the other way, before the paired interval excludes 0: with
three it contains 0 however many problems stay as they are (`dspy_fst.run.paired`)."""
TOLD_GAIN = 1 / 8
"""The gain that a valset should be able to tell (ours): 32 problems can."""


def valset_warnings(valset: Sequence[object] | None) -> Iterator[str]:
    """A valset on which the interval between start and end would hardly exclude 0."""
    size, enough = len(valset or ()), math.ceil(RISES / TOLD_GAIN)
    if 0 < size < enough:
        least = f"a gain of {RISES / size:.3f}" if size > RISES else "more than this valset has"
        yield (
            f"valset: of its {size} problems {RISES} must turn from wrong to right, and none the other way, before the "
            f"interval between start and end excludes 0, which is {least}; {enough} problems would tell a gain of "
            f"{TOLD_GAIN:.3f}"
        )


NO_VALSET = (
    "no valset: the start is not compared with the end, and the scores on the anchors, which are problems of the "
    "trainset, choose the best candidate; pass valset=[...] for both"
)
CHANGED = (
    "the valset, validation_samples or the metric changed since the run began: its {count} validations from before are "
    "not compared with what comes now"
)
