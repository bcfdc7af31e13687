"""The nouns of Fast-Slow Training. All are frozen. What was not measured is None, never 0.

A *candidate* is a text for every component of a DSPy program. K candidates are a *population*. One run of the program
under one candidate on one problem is a *rollout*; it holds the LM *calls* as they were sampled. The G rollouts of a
problem, spread evenly over the population, are its *group*. The credited calls of a step's groups are the *batch* of
one weight update.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import dspy

from dspy_fst.errors import TrainingError
from dspy_fst.formatting.demo_texts import readable
from dspy_fst.formatting.tables import TextTable
from dspy_fst.outcomes.outcome import Outcome

PREDICTOR_TAG = "_fst_predictor_name"
"""Attribute that holds a predictor's name, on a rollout's copy of the program and on copies of that copy."""

WeightsVersion = str
"""Name of one immutable set of policy weights, e.g. ``"step-000012"``; ``"step-000000"`` is the start."""


def version_of(step: int) -> WeightsVersion:
    """Name of the weights after ``step`` updates; names sort in the order of the steps.

    >>> version_of(12)
    'step-000012'
    """
    return f"step-{step:06d}"


WARM_START: WeightsVersion = "step-000000-warm"
"""Name of the weights that a warm start leaves; it sorts between those of no and of one update."""


@dataclass(frozen=True)
class Candidate:
    """The fast weights: one text per component of the program (GEPA's candidate).

    >>> Candidate({"answer.predict": "Sort the list."}).digest
    '17f692373111'
    """

    texts: Mapping[str, str]
    """Component name -> text, e.g. ``{"summarize.predict": "Keep every name."}``."""

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits that identify the texts; equal texts have equal digests."""
        return hashlib.sha256(json.dumps(sorted(self.texts.items())).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Population:
    """K candidates, best first. A frontier of fewer than K is filled up with copies, so members may repeat.

    >>> seed = Candidate({"answer.predict": "Sort the list."})
    >>> len(Population.of_seed(seed, 4).unique())
    1
    """

    members: tuple[Candidate, ...]
    scores: tuple[float | None, ...]
    """Mean anchor score of each member under the weights it was selected with; None when never scored."""
    parents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Digest -> digests of its parents, for every candidate of the search."""

    @property
    def best(self) -> Candidate:
        return self.members[0]

    @classmethod
    def of_seed(cls, seed: Candidate, size: int) -> "Population":
        """The population before any search: ``size`` copies of the program's own texts."""
        return cls(members=(seed,) * size, scores=(None,) * size)

    def __repr__(self) -> str:
        return self._table().text

    def _repr_html_(self) -> str:
        return self._table().html

    def _table(self) -> TextTable:
        """Each member once, best first."""
        score_of = {member.digest: score for member, score in zip(self.members, self.scores, strict=True)}
        copies = Counter(member.digest for member in self.members)
        rows = [
            [
                member.digest,
                "not scored" if (score := score_of[member.digest]) is None else f"{score:.3f}",
                str(copies[member.digest]),
                "\n".join(f"{name}: {readable(name, text)}" for name, text in member.texts.items()),
            ]
            for member in self.unique()
        ]
        title = f"Population of {len(self.members)} candidates, {len(rows)} different, best first"
        return TextTable(title, ("candidate", "score", "copies", "texts"), rows, last_is_words=True)

    def unique(self) -> tuple[Candidate, ...]:
        """Members without repetition, in order."""
        return tuple({member.digest: member for member in self.members}.values())


@dataclass(frozen=True)
class Call:
    """One LM call exactly as it was sampled. Training never renders or tokenizes it again.

    >>> Call("answer.predict", (1, 15, 9), (42, 2), (-0.7, -0.1), "stop", "step-000000").completion_ids
    (42, 2)
    """

    predictor: str
    """Name in ``program.named_predictors()``, e.g. ``"hops[0].query.predict"``."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """Sampled ids, the stop token included when one was sampled."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each completion id under the distribution it was drawn from."""
    finish_reason: str
    """``"stop"``, ``"length"`` or ``"tool_calls"``."""
    weights: WeightsVersion
    temperature: float = 1.0
    """Sampling temperature. Training scores the same distribution. A greedy call (0) cannot be trained."""
    reasoning_tokens: int = 0
    """Completion tokens that are thoughts, which no adapter sees. They are trained like the others."""
    cut_by_context: bool = False
    """Whether the context was full before the reply had ``max_tokens`` tokens."""
    turn: Literal["first", "continued", "rerendered"] = "first"
    """How the prompt relates to an earlier call of the rollout. ``"first"``: to none. ``"continued"``: it begins with
    that call's prompt and reply as sampled. ``"rerendered"``: it holds that reply as other text or other ids."""
    max_tokens: int | None = None
    """The longest reply that was asked for; None: as far as the context goes."""


@dataclass(frozen=True)
class Problem:
    """One example, and its index in the set that it came from.

    >>> Problem(3, dspy.Example(question="2 1", answer="1 2").with_inputs("question")).index
    3
    """

    index: int
    example: dspy.Example


@dataclass(frozen=True)
class Rollout:
    """One run of the program on one problem under one candidate.

    ``reward`` is None exactly when ``outcome`` is masked.

    >>> seed = Candidate({"answer.predict": "Sort the list."})
    >>> Rollout(3, seed, (), 0.0, Outcome("failed", "parse", "Expected to find output field: answer")).failure
    'parse'
    """

    problem: int
    candidate: Candidate
    calls: tuple[Call, ...]
    reward: float | None
    outcome: Outcome = field(default_factory=lambda: Outcome("scored"))
    failed_in: str | None = None
    """The predictor in whose call the rollout failed; None when no call is known."""
    predictor_scores: Mapping[str, float] = field(default_factory=dict)
    """Predictor -> the score that the metric gave it by itself; empty for a rollout that failed or was masked."""
    prediction: Any = None
    """The program's ``dspy.Prediction``; None when the program ended in an exception."""
    trace: tuple[Any, ...] = ()
    """DSPy's trace: ``(predictor, inputs, prediction)`` for every module call."""
    reused: bool = False
    """Whether it is a member of a step's group that the search before the step has made (``reuse_rollouts``)."""
    asked: tuple[Any, ...] = ()
    """Calls that `rollout.rendering` can render again; empty unless ``anew`` of `Rollouter.rollout` asked for them."""

    def __post_init__(self) -> None:
        if (self.reward is None) != (self.outcome.kind == "masked"):
            raise ValueError(f"a rollout has a reward or is masked: reward={self.reward!r}, {self.outcome}")

    @property
    def mask(self) -> str | None:
        """Why nothing was measured, e.g. ``"timeout"``, ``"lm: EngineError"``; else None."""
        return self.outcome.mask

    @property
    def failure(self) -> str | None:
        """What the policy did wrong when it earned a failure score, e.g. ``"parse"``; else None."""
        return self.outcome.failure

    @property
    def feedback(self) -> str:
        """What the metric said, or why the rollout failed or was masked."""
        return self.outcome.detail

    @property
    def tokens(self) -> int:
        """Completion tokens sampled in this rollout."""
        return sum(len(call.completion_ids) for call in self.calls)


@dataclass(frozen=True)
class Group:
    """All G rollouts of one problem, over all candidates, sampled by one weight version.

    >>> seed = Candidate({"answer.predict": "Sort the list."})
    >>> len(Group(3, tuple(Rollout(3, seed, (), reward) for reward in (0.0, 1.0, 1.0, 0.0))).rollouts)
    4
    """

    problem: int
    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        if any(rollout.problem != self.problem for rollout in self.rollouts):
            raise TrainingError(f"group of problem {self.problem} holds a rollout of another problem")
        if len(versions := {call.weights for rollout in self.rollouts for call in rollout.calls}) > 1:
            raise TrainingError(f"group of problem {self.problem} mixes weight versions {sorted(versions)}")

    @property
    def rewards(self) -> list[float]:
        """Of the rollouts that were measured, in order."""
        return [rollout.reward for rollout in self.rollouts if rollout.reward is not None]


@dataclass(frozen=True)
class Row:
    """One call as the trainer sees it.

    >>> Row((1, 15, 9), (42, 2), (-0.7, -0.1), advantage=1.0, token_weight=0.125).advantage
    1.0
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Behaviour log-probabilities, one per completion id."""
    advantage: float
    token_weight: float
    """Factor of each of this row's tokens in the loss, as the loss averages (`slow.losses`)."""
    temperature: float = 1.0
    predictor: str = ""
    problem: int = -1
    rollout: int = -1
    """Index of its rollout among the measured ones of its group."""
    candidate: str = ""
    """Digest of the candidate whose rollouts alone it was compared with (``baseline="candidate"``); else empty."""

    @property
    def compared(self) -> tuple[int, str]:
        """Names the group of rollouts whose scores it was credited from."""
        return self.problem, self.candidate


@dataclass(frozen=True)
class PredictorReport:
    """What one predictor did in the groups of a step, and what it earned."""

    calls: int
    tokens: int
    """Sampled in its calls."""
    truncated: int
    """Calls that were cut off, at ``max_tokens`` or by the end of the context."""
    unparsed: int
    """Rollouts that ended in one of its replies, which did not parse."""
    rows: int
    """Calls that are trained."""
    positive_rows: int
    """Trained calls with an advantage above 0."""
    flat_groups: int
    """Groups with zero variance in the scores that its calls are credited with."""
    advantage: float | None
    """Mean over its rows; None without rows."""
    score: float | None
    """Mean of its own scores, failures included (see `dspy_fst.slow.credit.own_scores`); None without scores."""


@dataclass(frozen=True)
class SeedKLCall:
    """A call with a KL term to the starting weights (``seed_kl_coefficient``)."""

    call: Call
    """Sampled under the program's own texts."""
    start_prompt_ids: tuple[int, ...]
    """What the starting weights read before that completion: its own prompt or other texts' (``seed_kl_teacher``)."""


@dataclass(frozen=True)
class SeedKLRollout:
    """A rollout under the program's own texts, and the prompts that the starting weights read in its calls."""

    rollout: Rollout
    start_prompts: tuple[tuple[int, ...] | None, ...]
    """One for each call; None when it could not be rendered."""


@dataclass(frozen=True)
class Batch:
    """What one weight update learns from, and what was left out of it.

    >>> row = Row((1, 15, 9), (42, 2), (-0.7, -0.1), advantage=1.0, token_weight=0.5)
    >>> Batch((row,), "step-000000", counts=Counter({"groups": 1, "rollouts": 4, "failed: parse": 1})).counts["groups"]
    1
    """

    rows: tuple[Row, ...]
    weights: WeightsVersion
    """The version that sampled every row."""
    seed_kl_calls: tuple[SeedKLCall, ...] = ()
    """Calls under the program's own texts with a KL term to the starting weights; they carry no reward."""
    counts: Counter[str] = field(default_factory=Counter)
    """``groups``, ``flat_groups``, ``rollouts``, ``rows``, ``tokens``, and lost rollouts by `Outcome.label`."""
    predictors: Mapping[str, PredictorReport] = field(default_factory=dict)
    """Every predictor that was called or scored, by name."""
    length_penalty: float | None = None
    """See StepReport."""


@dataclass(frozen=True)
class AdapterReport:
    """What one of several LoRA adapters learnt from in one weight update, before it moved."""

    rows: int
    """Calls that it was trained on. As in the update's ``rows``, seed-KL calls count where the batch held no others."""
    tokens: int
    """Of those calls; the adapters' sum to the update's ``tokens``."""
    grad_norm: float
    """Of its own parameters, before clipping. The clip is by the norm of all adapters together."""
    kl_to_start: float | None
    """As in `UpdateReport`, on its own tokens; None when the KL term was off, and for seed-KL calls alone."""
    entropy: float
    """On its own tokens, or those of its seed-KL calls where it had no others."""
    kl_under_seed: float | None = None
    """As in `UpdateReport`, on its own seed-KL calls; None when it had none."""
    seed_tokens: int = 0
    """Of its seed-KL calls."""

    @property
    def distance(self) -> float | None:
        """The KL to the start that was measured: of what it learnt from, else of its seed-KL calls (distillation)."""
        return self.kl_under_seed if self.kl_to_start is None else self.kl_to_start


@dataclass(frozen=True)
class UpdateReport:
    """Measurements of one weight update, before the weights moved. Means are per token."""

    loss: float
    grad_norm: float
    kl_to_start: float | None
    """Exact KL(theta || start) in nats, weighted as the loss weighs tokens; 0 when no token was trained, None
    when the KL term was off and nothing was measured."""
    entropy: float
    capped_share: float | None
    """Share of tokens whose importance weight the loss clipped: under ``loss="cispo"`` it reached the cap, under a loss
    with a ``clip`` the token had no gradient. None under a loss without importance weights."""
    mean_log_ratio: float
    """Mean of log pi_theta - log pi_behaviour on the sampled tokens: trainer-sampler mismatch, 0 is exact."""
    max_log_ratio: float
    """Largest absolute log-ratio of a token."""
    effective_sample_share: float | None
    """(sum w)^2 / (N sum w^2) over the N tokens' importance weights w (Kong 1992). It is 1 when the sampler is the
    trainer's policy, and near 1/N when a few tokens carry the update. None when no token was trained."""
    learning_rate: float
    tokens: int
    rows: int
    kl_under_seed: float | None = None
    """Exact KL(theta || start) in nats per token on ``Batch.seed_kl_calls``; None when that is empty."""
    sequences: int | None = None
    """Sequences that the model read. Calls share one when each begins with the call before, or when they say the same.
    None when no token was trained."""
    skipped: str | None = None
    """Why the update was not applied; None when it was, or when there was nothing to train."""
    row_tokens: int | None = None
    """Tokens of the rows, prompts and completions. None when no token was trained, and in runs of older versions."""
    tokens_read: int | None = None
    """Tokens read for them, with padding; a common beginning is read once a micro-batch. None as ``row_tokens``."""
    halved_to: int | None = None
    """Tokens of a micro-batch with which the update was made after memory had run out; None when it had not."""
    adapters: Mapping[str, AdapterReport] = field(default_factory=dict)
    """By LoRA adapter, where there are several: those that some row was read with."""
    optimizer_steps: int = 1
    """How often the weights moved: once for each mini-batch (``updates_per_batch``)."""
    later_log_ratio: float | None = None
    """Largest absolute log-ratio of a token in the optimizer steps after the first, whose weights had moved since the
    batch was sampled; None for one optimizer step."""
    seed_tokens: int = 0
    """Tokens of ``Batch.seed_kl_calls``; 0 in runs of older versions, too."""

    @property
    def moved(self) -> bool:
        """Whether the weights changed. Nothing is published after an update that changed nothing."""
        return self.rows > 0 and self.skipped is None
