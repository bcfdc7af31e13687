"""The recipe: every setting, its default and where the default comes from.

*Paper* is "Learning, Fast and Slow" (arXiv 2605.12484). *Ours* marks what it does not publish. A field's docstring
names its default's source in brackets, for `source_of` to read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from dspy_fst.errors import meant
from dspy_fst.lora import LoRA

Method = Literal["fst", "rl", "gepa", "gepa_then_rl", "rl_then_gepa", "distill"]
AUTO_CYCLES = {"light": 2, "medium": 8, "heavy": 34}
"""Cycles of DSPy's three budgets (ours): 12, 48 and 204 updates; the paper's longest stages have 200."""


class FSTConfig(BaseModel):
    """Settings of Fast-Slow Training. Frozen; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    method: Method = "fst"
    """``"fst"``, or a baseline made of the same loop. ``"rl"`` never searches. ``"gepa"`` never updates weights.
    ``"gepa_then_rl"`` spends the whole search budget before the first update, ``"rl_then_gepa"`` after the last.
    ``"distill"`` searches as ``"fst"`` does; its updates use the term of ``seed_kl_coefficient`` alone and no reward
    (paper, section 3)."""
    cycles: int = Field(AUTO_CYCLES["medium"], ge=1)
    """Fast-slow alternations (ours). ``auto`` sets them: light 2, medium 8, heavy 34."""

    steps_per_cycle: int = Field(6, ge=1)
    """T, weight updates a cycle (paper, App. D)."""
    problems_per_step: int = Field(32, ge=1)
    """Problems whose groups make one batch (paper, App. D: 192 lookahead problems / 6)."""
    population_size: int = Field(4, ge=1)
    """K, candidates (paper, App. D and E)."""
    group_size: int = Field(8, ge=2)
    """G, rollouts a problem, G/K for each candidate (paper, second-hand)."""

    anchors: int | None = Field(None, ge=1)
    """Size of a cycle's anchor set; None takes the whole lookahead set (paper: 192)."""
    search_passes: float = Field(5.0, gt=0)
    """Fresh rollouts of a search, in passes over the anchors (paper, App. D)."""
    search_rollouts: int | None = Field(None, ge=1)
    """Fresh rollouts of a search as a plain number; overrides ``search_passes`` (ours)."""
    first_search_share: float | None = Field(None, gt=0, le=1)
    """Share of all searches' rollouts that the first one gets; None shares them evenly (paper)."""
    search_when_flat: float | None = Field(None, ge=0, le=1)
    """Least share of the last step's groups that was flat below ``perfect_score / 2`` for a later cycle to search; None
    always searches (paper)."""
    reflection_minibatch: int = Field(3, ge=1)
    """Problems shown to a reflection (GEPA, section 4.3)."""
    components: Literal["round_robin", "all"] = "round_robin"
    """Whether a proposal changes one text of the program or all (GEPA's default)."""
    tool_descriptions: Literal["fixed", "evolved"] = "fixed"
    """Whether the descriptions of a dspy.ReAct's tools and of their arguments evolve too (ours; DSPy 3.4's GEPA leaves
    them alone)."""
    protected: dict[str, tuple[str, ...]] = {}
    """Component -> lines of the program's own text that every proposal keeps. A proposal that lost a line gets it back
    at its end (ours)."""
    reflection_tokens: int = Field(4000, ge=100)
    """Budget of what a reflection is shown of one rollout, in tokens estimated at four characters each (ours)."""
    perfect_score: float = 1.0
    """Reward from which on a rollout counts as solved and is not reflected on (DSPy's GEPA)."""

    trained: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the predictors whose calls are trained on, as in ``program.named_predictors()``; None is all that hold
    the PolicyLM. The others sample from the run's newest weights too, and their instructions evolve (ours)."""
    adapter: LoRA | None = None
    """A LoRA adapter that is trained in place of all weights, e.g. ``LoRA(rank=16)``, or ``"lora"`` for its defaults.
    It takes a small part of the memory and disk, and about ten times the learning rate (ours). None trains all weights
    (paper)."""
    learning_rate: float = Field(1e-6, gt=0)
    """AdamW's peak learning rate (ours, common for full-weight RL; not published where we could read)."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the two moments (paper, App. D)."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """AdamW's epsilon (ours: the usual one; unstated in the paper)."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay (paper, App. D)."""
    warmup_steps: int = Field(10, ge=0)
    """Updates of the linear warm-up of the learning rate (paper, App. D)."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Gradient norm above which the gradient is clipped; None never clips (ours: none; unstated in the paper)."""
    continue_optimizer: bool = Field(False, strict=True)
    """Whether a run that continues from a compiled program takes over AdamW's moments and number of updates from that
    program's run, so that the warm-up is not repeated (ours; off: both start anew)."""
    importance_cap: float = Field(4.0, gt=0)
    """CISPO's cap on the importance weight itself, not 1 + a clip (paper, App. D; ScaleRL finds 4, 5, 8 alike)."""
    kl_coefficient: float = Field(0.001, ge=0)
    """Weight of KL(theta || start) (paper, App. D; its form is unstated, ours is exact over the vocabulary)."""
    seed_kl_coefficient: float = Field(0.0, ge=0)
    """Weight of KL(theta || start) on the trained predictors' calls of rollouts under the program's own texts (ours;
    off, as in the paper)."""
    seed_kl_teacher: Literal["seed", "population"] = "seed"
    """Which prompt the reference model sees in that KL term. ``"seed"``: the program's own texts, so that what a task
    teaches stays in the evolved texts (ours). ``"population"``: each candidate's texts in turn, which distils them into
    the weights (paper: FST-distill)."""
    seed_kl_rollouts: int = Field(1, ge=1)
    """Rollouts of each problem of a step under the program's own texts, made only if ``seed_kl_coefficient`` is above
    0. They cost as much as others (ours)."""
    baseline: Literal["problem", "candidate"] = "problem"
    """Whose mean reward is the baseline of a rollout: that of its problem under all candidates (paper, Eq. 3), or under
    its own candidate alone."""
    advantage_normalization: Literal["group", "batch"] = "group"
    """Whose standard deviation divides the advantages: that of the group (paper, Eq. 3) or of the batch (ScaleRL)."""
    micro_batch_tokens: int | Literal["auto"] = "auto"
    """Tokens, padding included, of one forward and backward pass (ours; memory and speed only, the gradient is the same
    but for rounding). ``"auto"`` is the largest power of two that fits into the memory that is free at the start, up to
    4096 on a CPU and 16384 on a GPU. A continued run keeps its number."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the trainer's model body, and type of the published weights: ``"auto"`` is bfloat16 on a GPU and
    float32 on a CPU (ours). The weights that AdamW moves are float32 always. The engine has its own:
    ``engine_options={"dtype": ...}`` of the PolicyLM."""

    failure_score: float = 0.0
    """Reward of a rollout that failed because of the policy (DSPy's default)."""
    format_failure_score: float = 0.0
    """Reward of a reply that does not parse (ours; mmGRPO sets it below ``failure_score``)."""
    num_threads: int = Field(64, ge=1)
    """Rollouts in flight (ours)."""
    rollout_timeout_s: float = Field(600.0, gt=0)
    """Seconds after which a rollout is masked (ours)."""
    max_masked_share: float = Field(0.5, ge=0, le=1)
    """Share of a step's rollouts that may be masked. Beyond it the run stops, and can be continued (ours)."""
    parse_warning_share: float = Field(0.1, gt=0, le=1)
    """Share of a step's rollouts that end in an unparsed reply, from which on a warning names the predictors, once a
    cycle (ours)."""
    parse_trial: int = Field(8, ge=0)
    """Rollouts of each form of prompt that the start tries if hardly any of the first replies parse: other adapters,
    demos, a lower temperature; 0 tries none (ours)."""
    validation_samples: int = Field(1, ge=1)
    """Rollouts for each validation problem and candidate, outside the budget (ours)."""
    validate_every: int | Literal["cycle"] | None = None
    """When weights and population are measured on the valset between the start and the end, outside the budget.
    ``"cycle"``: after the updates of every cycle. A whole number: after so many steps. None: never (ours)."""
    patience: int | None = Field(None, ge=1)
    """Validations in a row without a new best score after which the run ends; None, never (ours)."""
    return_best: bool = Field(False, strict=True)
    """Whether ``compile()`` returns the validated state of weights and population with the highest score, the start
    included, instead of the end (ours)."""
    sync_tolerance: float | None = Field(None, gt=0)
    """Largest mean gap in nats a token between the engine's and the trainer's log-probabilities on texts of the run,
    after a publish; None is the measured limit of the precision, see engine/verification.py (ours)."""
    min_effective_share: float = Field(0.5, ge=0, le=1)
    """Effective sample share (see UpdateReport) of a batch's importance weights below which the run stops before it
    learns from them: the engine samples from another distribution than the trainer scores (ours)."""
    max_skipped_updates: int = Field(3, ge=1)
    """Updates in a row that may be skipped because a loss or gradient was not finite. The next one stops the run
    (ours)."""
    max_unmoved_steps: int | None = Field(12, ge=1)
    """Steps in a row without a gradient that stop the run, which can be continued with a higher number; None never
    stops (ours: two of the paper's cycles, so that a search came between). If an earlier step moved the weights, or
    every problem is solved, the run ends and returns its program; else it is an error. Under ``method="rl_then_gepa"``
    nothing ends a run before its search."""
    recorded_samples: int = Field(4, ge=0)
    """Rollouts of each step and search whose replies are kept in the run's events, for ``dspy-fst show --samples`` and
    the report: the best and the worst of a group, one of each kind of failure, then random ones; 0 keeps none (ours).
    """
    checkpoint_every: int = Field(1, ge=1)
    """Steps between two states from which a killed run can continue (ours). A state is also written before every search
    and at the end. Steps after the last state are made again."""
    keep_states: int = Field(2, ge=1)
    """Resumable states kept in the run directory; the newest counts (ours)."""
    keep_weights: int = Field(2, ge=1)
    """Newest weight versions kept in the run directory, beside the first and the one with the best reward (ours)."""
    seed: int = 0
    """Seed of every random draw (ours)."""

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("True and False are no numbers")
        return value

    @field_validator("adapter", mode="before")
    @classmethod
    def _a_lora_adapter(cls, value: Any) -> Any:
        if value == "lora":
            return LoRA()
        if value is None or isinstance(value, LoRA | Mapping):
            return value
        raise ValueError(
            "use LoRA(rank=...), 'lora' for its defaults, or None (null in a project file) to train all weights; a "
            "chat adapter is set with dspy.configure(adapter=...)"
        )

    @field_validator("micro_batch_tokens", mode="before")
    @classmethod
    def _tokens_or_auto(cls, value: Any) -> Any:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if value == "auto" or (whole and value >= 1):
            return value
        raise ValueError("Input should be greater than or equal to 1, a whole number of tokens; or 'auto'")

    @field_validator("validate_every", mode="before")
    @classmethod
    def _an_interval_of_validations(cls, value: Any) -> Any:
        if value in (None, "cycle") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError("use 'cycle', a whole number of steps, or None (null in a project file) for never")

    @field_validator("trained")
    @classmethod
    def _order_and_repetition_mean_nothing(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if names is None else tuple(sorted(set(names)))

    @model_validator(mode="after")
    def _group_is_shared_evenly(self) -> "FSTConfig":
        if self.group_size % self.population_size:
            below = self.group_size - self.group_size % self.population_size
            raise ValueError(
                f"group_size={self.group_size} is not a multiple of population_size={self.population_size}: each "
                f"candidate gets G/K rollouts of a problem; use group_size={below or self.population_size} "
                f"or {below + self.population_size}"
            )
        return self

    @model_validator(mode="after")
    def _a_candidate_s_own_baseline_needs_two(self) -> "FSTConfig":
        if self.baseline == "candidate" and self.group_size < 2 * self.population_size:
            raise ValueError(
                f"baseline='candidate' compares a candidate's rollouts of a problem with each other, and group_size="
                f"{self.group_size} gives each of {self.population_size} only one; use group_size="
                f"{2 * self.population_size}, or baseline='problem'"
            )
        return self

    @model_validator(mode="after")
    def _patience_counts_validations(self) -> "FSTConfig":
        if self.patience is not None and self.validate_every is None:
            raise ValueError(
                f"patience={self.patience} counts validations, and validate_every=None makes none between the start "
                "and the end; set validate_every='cycle' or a number of steps"
            )
        return self

    @model_validator(mode="after")
    def _distilling_has_a_teacher(self) -> "FSTConfig":
        if self.method == "distill" and (self.seed_kl_coefficient == 0 or self.seed_kl_teacher == "seed"):
            raise ValueError(
                "method='distill' learns from the KL under the program's own texts alone: set seed_kl_coefficient=1.0 "
                "and seed_kl_teacher='population'"
            )
        if self.seed_kl_teacher == "population" and self.seed_kl_coefficient == 0:
            raise ValueError(
                "seed_kl_teacher='population' does nothing at seed_kl_coefficient=0; set it to 0.1 or so, or leave the "
                "teacher out"
            )
        if self.seed_kl_teacher == "population" and self.tool_descriptions == "evolved":
            raise ValueError(
                "seed_kl_teacher='population' distils instructions only, and tool_descriptions='evolved' lets other "
                "texts change too; use tool_descriptions='fixed'"
            )
        return self

    @property
    def rollouts_per_problem(self) -> int:
        """Rollouts of a problem in a step: its group, and those that only hold or distil."""
        group = 0 if self.method == "distill" else self.group_size
        return group + (self.seed_kl_rollouts if self.seed_kl_coefficient > 0 else 0)

    @property
    def distills(self) -> bool:
        """Whether rollouts under the program's own texts are taught by the population's."""
        return self.seed_kl_coefficient > 0 and self.seed_kl_teacher == "population"

    @property
    def lookahead(self) -> int:
        """Problems of a cycle, counted with repetition."""
        return self.steps_per_cycle * self.problems_per_step

    @property
    def anchor_count(self) -> int:
        return min(self.anchors or self.lookahead, self.lookahead)


def source_of(setting: str) -> str:
    """Where a setting's default comes from, in its docstring's words.

    >>> source_of("steps_per_cycle")
    'paper, App. D'
    """
    words = " ".join((FSTConfig.model_fields[setting].description or "").split())
    found = re.search(r"\(((?:paper|ours|GEPA|DSPy)\b[^()]*)\)", words)
    return found[1] if found else "not stated"


def make_config(recipe: dict[str, Any]) -> tuple[FSTConfig | None, list[str]]:
    """The configuration, or the sentences that say what is wrong with it."""
    try:
        return FSTConfig(**recipe), []
    except ValidationError as error:
        return None, [_sentence(fault) for fault in error.errors()]


def unknown_settings(names: Iterable[str], others: Sequence[str] = ()) -> list[str]:
    """A sentence for each name that is neither a setting nor one of the ``others``, with the one that was meant."""
    known = [*FSTConfig.model_fields, *others]
    return [
        f"{name}: there is no such setting{meant(name, known) or '; see dspy_fst.FSTConfig for all of them'}"
        for name in names
        if name not in known
    ]


def _sentence(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return "; ".join(unknown_settings([where]))
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}={fault['input']!r}: {message}" if where else message
