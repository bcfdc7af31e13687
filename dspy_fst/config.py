"""The recipe: every setting, its default and where the default comes from.

`FSTConfig` is flat for users. The settings of a room are declared in that room (`slow.training_settings`,
`fast.search_settings`, `rollout.rollout_settings`) and inherited here, so a Trainer takes the recipe as it is.

*Paper* is "Learning, Fast and Slow" (arXiv 2605.12484). *Ours* marks what it does not publish. A field's docstring
names its default's source in brackets, for `source_of` to read.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dspy_fst.errors import ConfigurationError
from dspy_fst.fast.search_settings import SearchSettings
from dspy_fst.recipe.declared import ALL_SETTINGS, Settings, no_such_setting
from dspy_fst.recipe.other_names import INSTEAD
from dspy_fst.rollout.rollout_settings import RolloutSettings
from dspy_fst.slow.training_settings import TrainingSettings

Method = Literal["fst", "rl", "gepa", "gepa_then_rl", "rl_then_gepa", "distill"]
AUTO_CYCLES = {"light": 2, "medium": 8, "heavy": 34}
"""Cycles of DSPy's three budgets (ours): 12, 48 and 204 updates; the paper's longest stages have 200."""


class Alternation(Settings):
    """How a run alternates, and what its searches may spend."""

    method: Method = "fst"
    """``"fst"``, or a baseline made of the same loop. ``"rl"`` never searches. ``"gepa"`` never updates weights.
    ``"gepa_then_rl"`` spends the whole search budget before the first update, ``"rl_then_gepa"`` after the last.
    ``"distill"`` searches as ``"fst"`` does; its updates use the term of ``seed_kl_coefficient`` alone and no reward
    (paper, section 3)."""
    cycles: int = Field(default=AUTO_CYCLES["medium"], ge=1)
    """Fast-slow alternations (ours). ``auto`` sets them: light 2, medium 8, heavy 34."""

    steps_per_cycle: int = Field(default=6, ge=1)
    """T, weight updates a cycle (paper, App. D)."""
    problems_per_step: int = Field(default=32, ge=1)
    """Problems whose groups make one batch (paper, App. D: 192 lookahead problems / 6)."""
    population_size: int = Field(default=4, ge=1)
    """K, candidates (paper, App. D and E)."""
    group_size: int = Field(default=8, ge=2)
    """G, rollouts a problem, G/K for each candidate (paper, second-hand)."""
    resample_flat: int = Field(default=0, ge=0)
    """Rounds of a step in which each flat group, whose rollouts all scored alike, is replaced by the group of another
    problem (paper: 0; DAPO, 2503.14476, goes on until the batch is full). The rollouts of both are paid for."""

    retire_solved: float | None = Field(default=None, gt=0, le=1)
    """Pass rate of a problem's newest group from which on the problem is sampled no more for updates, as a share of the
    way from ``failure_score`` to ``perfect_score``; None retires none (paper; ScaleRL, 2510.13786: 0.9)."""

    anchors: int | None = Field(default=None, ge=1)
    """Size of a cycle's anchor set; None takes the whole lookahead set (paper: 192)."""
    search_passes: float = Field(default=5.0, gt=0)
    """Fresh rollouts of a search, in passes over the anchors (paper, App. D)."""
    search_rollouts: int | None = Field(default=None, ge=1)
    """Fresh rollouts of a search as a plain number; overrides ``search_passes`` (ours)."""
    first_search_share: float | None = Field(default=None, gt=0, le=1)
    """Share of all searches' rollouts that the first one gets; None shares them evenly (paper)."""
    search_when_flat: float | None = Field(default=None, ge=0, le=1)
    """Least share of the last step's groups that was flat below ``perfect_score / 2`` for a later cycle to search; None
    always searches (paper)."""

    @model_validator(mode="after")
    def _group_is_shared_evenly(self) -> Self:
        if self.group_size % self.population_size:
            below = self.group_size - self.group_size % self.population_size
            raise ValueError(
                f"group_size={self.group_size} is not a multiple of population_size={self.population_size}: each "
                f"candidate gets G/K rollouts of a problem; use group_size={below or self.population_size} "
                f"or {below + self.population_size}"
            )
        return self


class WarmStart(Settings):
    """Supervised training before the first search; ``compile(teacher=program)`` has one, too."""

    warm_start: Literal["labels"] | None = None
    """What a run learns before its first search, for a model that hardly ever parses or solves anything. ``"labels"``:
    the labels of the trainset, written as replies of the predictors whose outputs they are. None: nothing (paper)."""

    @field_validator("warm_start", mode="before")
    @classmethod
    def _what_is_learnt(cls, value: object) -> object:
        if value in (None, "labels"):
            return value
        raise ValueError(
            "use 'labels', or None (null in a project file) for no warm start; a teacher's traces are learnt with "
            "compile(teacher=program), teacher in a project file"
        )

    warm_start_examples: int | None = Field(default=256, ge=1)
    """Examples of the trainset that a warm start learns from, the first ones; a teacher plays each once. None: all
    (ours)."""
    warm_start_epochs: int = Field(default=3, ge=1)
    """Passes of a warm start over its replies (ours: transformers' default)."""
    warm_start_learning_rate: float | None = Field(default=None, gt=0)
    """AdamW's peak learning rate in a warm start, from which it falls to 0. None is 2e-5 for all weights, as in trl,
    and ten times that for a LoRA adapter (ours)."""
    warm_start_score: float = Field(default=0.9, gt=0, le=1)
    """Least reward of a teacher's rollout that is learnt from, as a share of the way from ``failure_score`` to
    ``perfect_score`` (ours)."""


class FSTConfig(RolloutSettings, TrainingSettings, SearchSettings, WarmStart, Alternation):
    """Settings of Fast-Slow Training. Frozen; unknown names are refused."""

    # Pydantic lists the fields of the last base first, then of the one before it, and these at the end.

    @classmethod
    def _unknown(cls, place: tuple[int | str, ...]) -> str:
        if len(place) == 1 and place[0] in INSTEAD:
            return no_such_setting(str(place[0]), (), instead=INSTEAD)
        return super()._unknown(place)

    max_masked_share: float = Field(default=0.5, ge=0, le=1)
    """Share of a step's rollouts that may be masked. Beyond it the run stops, and can be continued (ours)."""
    parse_warning_share: float = Field(default=0.1, gt=0, le=1)
    """Share of a step's rollouts that end in an unparsed reply, from which on a warning names the predictors, once a
    cycle (ours)."""
    parse_trial: int = Field(default=8, ge=0)
    """Rollouts of each form of prompt that the start tries if hardly any of the first replies parse: other adapters,
    demos, a lower temperature; 0 tries none (ours)."""
    validation_samples: int = Field(default=1, ge=1)
    """Rollouts for each validation problem and candidate, outside the budget (ours)."""
    validate_every: int | Literal["cycle"] | None = None
    """When weights and population are measured on the valset between the start and the end, outside the budget.
    ``"cycle"``: after the updates of every cycle. A whole number: after so many steps. None: never (ours)."""
    patience: int | None = Field(default=None, ge=1)
    """Validations in a row without a new best score after which the run ends; None, never (ours)."""
    return_best: bool = Field(default=False, strict=True)
    """Whether ``compile()`` returns the validated state of weights and population with the highest score, the start
    included, instead of the end (ours)."""
    sync_tolerance: float | None = Field(default=None, gt=0)
    """Largest mean gap in nats a token between the engine's and the trainer's log-probabilities on texts of the run,
    after a publish; None is the measured limit of the precision, see engine/verification.py (ours)."""
    max_skipped_updates: int = Field(default=3, ge=1)
    """Updates in a row that may be skipped because a loss or gradient was not finite. The next one stops the run
    (ours)."""
    max_unmoved_steps: int | None = Field(default=12, ge=1)
    """Steps in a row without a gradient that stop the run, which can be continued with a higher number; None never
    stops (ours: two of the paper's cycles, so that a search came between). If an earlier step moved the weights, or
    every problem is solved, the run ends and returns its program; else it is an error. Under ``method="rl_then_gepa"``
    nothing ends a run before its search."""
    recorded_samples: int = Field(default=4, ge=0)
    """Rollouts of each step and search whose replies are kept in the run's events, for ``dspy-fst show --samples`` and
    the report: the best and the worst of a group, one of each kind of failure, then random ones; 0 keeps none (ours).
    """
    checkpoint_every: int = Field(default=1, ge=1)
    """Steps between two states from which a killed run can continue (ours). A state is also written before every search
    and at the end. Steps after the last state are made again."""
    keep_states: int = Field(default=2, ge=1)
    """Resumable states kept in the run directory; the newest counts (ours)."""
    keep_weights: int = Field(default=2, ge=1)
    """Newest weight versions kept in the run directory, beside the first and the one with the best reward (ours)."""
    storage: str | None = Field(default=None, min_length=1)
    """URL of a copy of the run that outlives this machine, by any protocol of fsspec, e.g. ``s3://bucket/run`` or
    ``file:///mnt/share/run``; None: no copy (ours). Every state is copied there with the weights, populations and
    events. A directory that is empty or behind goes on from there."""
    ray: str | None = Field(default=None, min_length=1)
    """Address of a Ray cluster on whose CPUs programs and metrics run, as ``ray.init`` takes it: ``HOST:PORT`` of its
    head, ``"auto"``, or ``"local"`` for one on this machine; None: they run in this process (ours)."""
    ranks: int = Field(default=1, ge=1)
    """Processes that train the weights together: this one, and actors of the cluster that ``ray`` names. 1: this one
    alone, or those that a launcher started (ours)."""
    seed: int = 0
    """Seed of every random draw (ours)."""

    @field_validator("validate_every", mode="before")
    @classmethod
    def _an_interval_of_validations(cls, value: Any) -> Any:
        if value in (None, "cycle") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError("use 'cycle', a whole number of steps, or None (null in a project file) for never")

    @model_validator(mode="after")
    def _a_candidate_s_own_baseline_needs_two(self) -> Self:
        if self.baseline == "candidate" and self.group_size < 2 * self.population_size:
            raise ValueError(
                f"baseline='candidate' compares a candidate's rollouts of a problem with each other, and group_size="
                f"{self.group_size} gives each of {self.population_size} only one; use group_size="
                f"{2 * self.population_size}, or baseline='problem'"
            )
        return self

    @model_validator(mode="after")
    def _an_optimizer_step_has_a_problem(self) -> Self:
        if self.updates_per_batch > 1 and self.method == "distill":
            raise ValueError(
                f"updates_per_batch={self.updates_per_batch} shares out the problems of a batch, and method='distill' "
                "learns from no problem's reward; use updates_per_batch=1 and more steps_per_cycle"
            )
        if self.updates_per_batch > self.problems_per_step:
            raise ValueError(
                f"updates_per_batch={self.updates_per_batch} shares out the problems of a batch, and problems_per_step="
                f"{self.problems_per_step} are fewer; use updates_per_batch={self.problems_per_step} or fewer"
            )
        return self

    @model_validator(mode="after")
    def _proposals_at_once_have_minibatches(self) -> Self:
        most = max(1, self.anchor_count // self.reflection_minibatch)
        if self.proposals_at_once > most:
            raise ValueError(
                f"proposals_at_once={self.proposals_at_once} needs as many minibatches of reflection_minibatch="
                f"{self.reflection_minibatch} problems, and a search has {self.anchor_count} anchors; use "
                f"proposals_at_once={most}, or {self.more_anchors()}"
            )
        return self

    @model_validator(mode="after")
    def _what_changes_rewards_needs_rewards(self) -> Self:
        names = ("resample_flat", "retire_solved", "overlong_penalty", "reuse_rollouts")
        given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name)]
        given += [f"loss={self.loss!r}"] if self.loss != "cispo" else []
        if given and self.method == "distill":
            raise ValueError(
                f"method='distill' learns from no reward, and {' and '.join(given)} would do nothing; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _patience_counts_validations(self) -> Self:
        if self.patience is not None and self.validate_every is None:
            raise ValueError(
                f"patience={self.patience} counts validations, and validate_every=None makes none between the start "
                "and the end; set validate_every='cycle' or a number of steps"
            )
        return self

    @model_validator(mode="after")
    def _distilling_has_a_teacher(self) -> Self:
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
        if self.seed_kl_teacher == "population" and self.demos_evolve:
            raise ValueError(
                "seed_kl_teacher='population' distils instructions only, and max_bootstrapped_demos or "
                "max_labeled_demos lets demos change too; leave the demos out, or use seed_kl_teacher='seed'"
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
    def worst_score(self) -> float:
        """Reward of the worst kind of failure."""
        return min(self.failure_score, self.format_failure_score)

    @property
    def teaching_score(self) -> float:
        """Least reward of a teacher's rollout that a warm start learns from."""
        return self.failure_score + self.warm_start_score * (self.perfect_score - self.failure_score)

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
        """Anchors of a search, at most; a small trainset has fewer."""
        return min(self.anchors or self.lookahead, self.lookahead)

    def more_anchors(self, available: int | None = None) -> str:
        """What gives a search more anchors, in words.

        Args:
            available: Those that it has, where the trainset is known.
        """
        if available is not None and available < self.anchor_count:
            return "more examples in the trainset"
        if self.anchor_count < self.lookahead:
            return f"more anchors (at most {self.lookahead})"
        return f"more problems_per_step or steps_per_cycle: anchors are taken from a cycle's {self.lookahead} problems"


def described(setting: str) -> str:
    """A setting's docstring as one line, with code between single backticks.

    >>> described("format_failure_score")
    'Reward of a reply that does not parse (ours; mmGRPO sets it below `failure_score`).'
    """
    return " ".join((FSTConfig.model_fields[setting].description or "").replace("``", "`").split())


def source_of(setting: str) -> str:
    """Where a setting's default comes from, in its docstring's words.

    >>> source_of("steps_per_cycle")
    'paper, App. D'
    """
    found = re.search(r"\(((?:paper|ours|GEPA|DSPy)\b[^()]*)\)", described(setting))
    return found[1] if found else "not stated"


def make_config(recipe: dict[str, Any]) -> tuple[FSTConfig | None, list[str]]:
    """The configuration, or the sentences that say what is wrong with it."""
    try:
        return FSTConfig.checked(recipe), []
    except ConfigurationError as error:
        return None, list(error.faults)


def unknown_settings(names: Iterable[str], others: Sequence[str] = ()) -> list[str]:
    """A sentence for each name that is neither a setting nor one of the ``others``, with the one that was meant."""
    known = [*FSTConfig.model_fields, *others]
    return [no_such_setting(name, known, ALL_SETTINGS, INSTEAD) for name in names if name not in known]
