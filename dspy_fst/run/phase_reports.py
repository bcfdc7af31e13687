"""What a step and a search leave in a run's events: frozen reports, and how they are read from an event again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any, TypeVar

from dspy_fst.types import PredictorReport, UpdateReport, WeightsVersion, version_of

Value = TypeVar("Value")


@dataclass(frozen=True)
class WarmStartReport:
    """The supervised training before the first search."""

    source: str
    """``"labels"`` or ``"teacher"``."""
    examples: int
    """Of the trainset, from which replies could come."""
    pairs: Mapping[str, int]
    """Predictor -> the replies that it was taught."""
    left_out: Mapping[str, int]
    """Reason -> calls, or rollouts of the teacher, that nothing was learnt from."""
    teacher_rollouts: int
    teacher_tokens: int
    """Sampled by a teacher that speaks with a PolicyLM; other LMs do not tell."""
    tokens: int
    """Reply tokens learnt from, counted in each pass."""
    updates: int
    first_loss: float
    """In nats a reply token, of the first optimizer step."""
    last_loss: float
    seconds: float


@dataclass(frozen=True)
class StepReport:
    """One slow step: what was sampled and how the weights were updated."""

    step: int
    cycle: int
    reward: float | None
    """Mean reward of the measured rollouts; None when all were masked."""
    counts: Mapping[str, int]
    update: UpdateReport
    sampled_tokens: int
    """Of the rollouts that the step made; those of its search are in the search's report (``reuse_rollouts``)."""
    seconds: Mapping[str, float]
    """Wall time by activity: ``sampling``, ``update``, ``publish``."""
    predictors: Mapping[str, PredictorReport] = field(default_factory=dict)
    """By name; see Batch."""
    weights: WeightsVersion | None = None
    """The version that sampled the step; None in the events of releases that published one a step."""
    published: WeightsVersion | None = None
    """The version after the step: a new one when the update changed the weights."""
    group_rewards: tuple[tuple[int, float], ...] = ()
    """``(problem, mean reward)`` of each group with at least two measured rollouts."""
    length_penalty: float | None = None
    """Mean over the measured rollouts of what was taken off the reward for long replies (``overlong_penalty``), which
    ``reward`` leaves out; None when the penalty is off."""
    judged_by: str | None = None
    """Identity of the metric that gave the rewards; None in the events of releases that recorded none."""
    prompt_tokens: int | None = None
    """Tokens of the prompts of all calls of the step's rollouts, as the engine in process counted them; None with
    another engine, and in the events of older releases."""
    prompt_tokens_read: int | None = None
    """Those that the model read, padding included: what the prompts of a batch have in common at their beginning is
    read once. None where ``prompt_tokens`` is."""
    reply_deciles: tuple[float, ...] | None = None
    """Tokens of the replies to its rollouts' calls: shortest, nine deciles, longest; `dspy-fst plan --like` reads them.
    None without a call, and in the events of older releases."""

    @property
    def sampled_by(self) -> WeightsVersion:
        """``weights``; in an older run's events, the version that the step number names."""
        return self.weights or version_of(self.step)

    @property
    def left(self) -> WeightsVersion:
        """``published``; in an older run's events, the version that the step number names."""
        return self.published or version_of(self.step + 1)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StepReport":
        """The report that a run's event holds."""
        predictors = {name: PredictorReport(**report) for name, report in data.get("predictors", {}).items()}
        rewards = tuple((problem, reward) for problem, reward in data.get("group_rewards", ()))
        update = UpdateReport(**data["update"])
        told = data.get("reply_deciles")
        replies = {"reply_deciles": None if told is None else tuple(told)}
        return cls(**{**data, "update": update, "predictors": predictors, "group_rewards": rewards, **replies})


def deciles(values: Sequence[float]) -> tuple[float, ...] | None:
    """The smallest of the values, their nine deciles and the largest; None without a value.

    >>> deciles(range(11)) == tuple(range(11)), deciles([5]) == (5,) * 11
    (True, True)
    """
    if not values:
        return None
    if len(values) == 1:
        return (float(values[0]),) * 11
    between = (round(value, 1) for value in quantiles(values, n=10, method="inclusive"))
    return (float(min(values)), *between, float(max(values)))


@dataclass(frozen=True)
class CycleReport:
    """One fast phase: what the search used and found."""

    cycle: int
    scores: tuple[float | None, ...]
    population: tuple[str, ...]
    """Digests of the members, best first."""
    rollouts: int
    """Fresh rollouts, those that scored the carried population included."""
    repeats: int
    """Evaluations asked for again, and answered from rollouts already made under the same weights."""
    reflections: int
    proposals_accepted: int
    sampled_tokens: int
    counts: Mapping[str, int]
    seconds: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "CycleReport":
        """The report that a run's event holds."""
        data = renamed(data)
        return cls(**{**data, "scores": tuple(data["scores"]), "population": tuple(data["population"])})


def renamed(cycle: Mapping[str, Value]) -> dict[str, Value]:
    """The report of a search under today's names: older runs called repeats ``reused``."""
    return {"repeats" if name == "reused" else name: value for name, value in cycle.items()}
