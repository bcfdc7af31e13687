"""How weights are trained. Every default says where it comes from; *paper* is arXiv 2605.12484."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dspy_fst.recipe.declared import Settings
from dspy_fst.recipe.lora_settings import LONGEST, Grouping, LoRA

GROUP = rf"(?!base$)[A-Za-z0-9_][A-Za-z0-9_-]{{0,{LONGEST - 1}}}"
"""Name of a group of predictors with a LoRA adapter of its own. It names a folder, and the base lies in ``base``."""
CLIPPED = ("grpo", "dapo", "dr_grpo", "gspo")
"""Values of ``loss`` under which an importance weight outside a band takes a token's gradient."""


class TrainingSettings(Settings):
    """What a slow step learns from, and how it moves the weights."""

    trained: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the predictors whose calls are trained on, as in ``program.named_predictors()``; None is all that hold
    the PolicyLM. The others sample from the run's newest weights too, and their instructions evolve (ours)."""
    adapter: LoRA | None = None
    """A LoRA adapter that is trained in place of all weights, e.g. ``LoRA(rank=16)``, or ``"lora"`` for its defaults.
    It takes a small part of the memory and disk, and a larger learning rate: twice that of all weights in the
    laboratory, up to ten times elsewhere (ours). None trains all weights (paper)."""
    adapters: Grouping = "shared"
    """Which trained predictors share a LoRA adapter: ``"shared"``, all of them (paper: one set of weights);
    ``"per_predictor"``, none, so that each learns apart on one base in memory; or groups, adapter -> predictors, e.g.
    ``{"search": ("hops[0].query", "hops[1].query")}`` (ours). Predictors that are
    not trained speak with the base, or through the only adapter where there is one."""
    quantized_base: Literal["nf4", "int8"] | None = None
    """How the linear layers below a LoRA adapter are rounded for the whole run (QLoRA): ``"nf4"`` takes 0.56 bytes a
    number, ``"int8"`` about 1 (ours). The rounded numbers are what is trained on, published and exported. None: not."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """``"adamw"`` keeps two moments in float32, 8 bytes for each trained number (paper: AdamW). ``"adamw_8bit"`` keeps
    them in 8 bits, about 2 bytes; it is bitsandbytes' and rounds them (ours)."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """AdamW's peak learning rate (ours, common for full-weight RL; not published where we could read)."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the two moments (paper, App. D)."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon (ours: the usual one; unstated in the paper)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay (paper, App. D)."""
    warmup_steps: int = Field(default=10, ge=0)
    """Updates of the linear warm-up of the learning rate (paper, App. D)."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradient norm above which the gradient is clipped; None never clips (ours: none; unstated in the paper)."""
    continue_optimizer: bool = Field(default=False, strict=True)
    """Whether a run that continues from a compiled program takes over AdamW's moments and number of updates from that
    program's run, so that the warm-up is not repeated (ours; off: both start anew)."""
    loss: Literal["cispo", "grpo", "dapo", "dr_grpo", "gspo", "rloo", "rft"] = "cispo"
    """What an update minimises (paper, section 3: CISPO). The name decides how tokens are clipped, how a score becomes
    an advantage, and how tokens are averaged; docs/losses.md compares them. ``"rft"`` is rejection-sampling
    fine-tuning: supervised learning on the best rollouts of each problem."""
    importance_cap: float = Field(default=4.0, gt=0)
    """CISPO's cap on the importance weight itself, not 1 + a clip (paper, App. D; ScaleRL finds 4, 5, 8 alike)."""
    clip: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0)]] | None = None
    """How far below and above 1 an importance weight may be under a clipped loss, e.g. ``(0.2, 0.28)``. None: grpo and
    dr_grpo take 0.2 and 0.2, dapo 0.2 and 0.28, gspo 3e-4 and 4e-4 (ours: those of their papers)."""
    kl_coefficient: float = Field(default=0.001, ge=0)
    """Weight of KL(theta || start) (paper, App. D; its form is unstated, ours is exact over the vocabulary)."""
    seed_kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of KL(theta || start) on the trained predictors' calls of rollouts under the program's own texts (ours;
    off, as in the paper)."""
    seed_kl_teacher: Literal["seed", "population"] = "seed"
    """Which prompt the reference model sees in that KL term. ``"seed"``: the program's own texts, so that what a task
    teaches stays in the evolved texts (ours). ``"population"``: each candidate's texts in turn, which distils them into
    the weights (paper: FST-distill)."""
    seed_kl_rollouts: int = Field(default=1, ge=1)
    """Rollouts of each problem of a step under the program's own texts, made only if ``seed_kl_coefficient`` is above
    0. They cost as much as others (ours)."""
    baseline: Literal["problem", "candidate"] = "problem"
    """Whose mean reward is the baseline of a rollout: that of its problem under all candidates (paper, Eq. 3), or under
    its own candidate alone."""
    advantage_normalization: Literal["group", "batch"] = "group"
    """Whose standard deviation divides the advantages: that of the group (paper, Eq. 3) or of the batch (ScaleRL).
    dr_grpo, rloo and rft divide by none."""
    overlong_penalty: float = Field(default=0.0, ge=0)
    """Most that is taken off a rollout's reward for a reply that nears ``max_tokens``, before advantages are computed
    (paper: 0; DAPO, 2503.14476, Eq. 13: 1, where a wrong answer has -1 and a right one 1)."""
    overlong_share: float = Field(default=0.2, gt=0, le=1)
    """The last part of ``max_tokens``, over which ``overlong_penalty`` grows from 0 to its full size (ours: DAPO's 4096
    of 20480 tokens)."""
    updates_per_batch: int = Field(default=1, ge=1)
    """Optimizer steps for each batch of rollouts, each on its own share of the problems (paper: 1; DAPO, 2503.14476,
    takes 16). The importance weights correct for the weights that have moved since the batch was sampled."""
    micro_batch_tokens: int | Literal["auto"] = "auto"
    """Tokens, padding included, of one forward and backward pass (ours; memory and speed only, the gradient is the same
    but for rounding). ``"auto"`` is the largest power of two that fits into the memory that is free at the start, up to
    4096 on a CPU and 16384 on a GPU. A continued run keeps its number."""
    gradient_checkpointing: Literal[True, False, "auto"] = "auto"
    """Whether the backward pass keeps the inputs of each layer alone and computes the rest again (ours; memory and
    speed only, the gradient is the same bit for bit). ``"auto"`` turns it on where an update would not fit otherwise.
    A continued run keeps what was chosen."""
    sharding: Literal["fsdp"] | None = None
    """How several processes (`torchrun`, or ``ranks``) hold the weights. None: each holds all. ``"fsdp"``: each holds a
    part of the weights, gradients, moments and reference, by torch's FSDP2 (ours; memory and speed only, the gradient
    is the same but for rounding). A process alone holds all in either case."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the trainer's model body, and type of the published weights: ``"auto"`` is bfloat16 on a GPU and
    float32 on a CPU (ours). The weights that AdamW moves are float32 always. The engine has its own:
    ``engine_options={"dtype": ...}`` of the PolicyLM."""
    min_effective_share: float = Field(default=0.5, ge=0, le=1)
    """Effective sample share (see UpdateReport) of a batch's importance weights below which the run stops before it
    learns from them: the engine samples from another distribution than the trainer scores (ours)."""

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

    @field_validator("adapters", mode="before")
    @classmethod
    def _groups_of_predictors(cls, value: Any) -> Any:
        if value in ("shared", "per_predictor"):
            return value
        if not isinstance(value, Mapping) or not value:
            raise ValueError("use 'shared', 'per_predictor', or groups: a name for each adapter and its predictors")
        groups = {str(name): members for name, members in value.items()}
        if faults := [*_group_faults(groups)]:
            raise ValueError("; ".join(faults))
        return {name: tuple(sorted({str(one) for one in members})) for name, members in sorted(groups.items())}

    @field_validator("clip", mode="before")
    @classmethod
    def _below_and_above(cls, value: object) -> object:
        if value is None or (isinstance(value, list | tuple) and len(value) == 2):
            return value
        raise ValueError("use how far below and above 1, e.g. [0.2, 0.28], or None for the loss's own")

    @field_validator("micro_batch_tokens", mode="before")
    @classmethod
    def _tokens_or_auto(cls, value: Any) -> Any:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if value == "auto" or (whole and value >= 1):
            return value
        raise ValueError("Input should be greater than or equal to 1, a whole number of tokens; or 'auto'")

    @field_validator("trained")
    @classmethod
    def _order_and_repetition_mean_nothing(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if names is None else tuple(sorted(set(names)))

    @model_validator(mode="after")
    def _a_clip_has_a_loss_that_clips(self) -> Self:
        if self.clip is None or self.loss in CLIPPED:
            return self
        instead = "importance_cap bounds its importance weights" if self.loss == "cispo" else "it clips nothing"
        raise ValueError(
            f"clip={self.clip} does nothing under loss={self.loss!r}: {instead}. Leave it out, or set a loss with a "
            f"clip: {', '.join(CLIPPED)}"
        )

    @model_validator(mode="after")
    def _a_quantized_base_is_below_an_adapter(self) -> Self:
        if self.quantized_base is not None and self.adapter is None:
            raise ValueError(
                f"quantized_base={self.quantized_base!r} freezes the weights, and adapter=None trains all of them; set "
                "adapter='lora' or LoRA(rank=...)"
            )
        return self

    @model_validator(mode="after")
    def _parts_are_of_plain_numbers(self) -> Self:
        if self.sharding is None:
            return self
        if self.quantized_base is not None:
            raise ValueError(
                f"sharding={self.sharding!r} shares out parameters, and quantized_base={self.quantized_base!r} makes a "
                "base of codes that are none: every rank would hold all of it. Set one of them to None"
            )
        if self.optimizer == "adamw_8bit":
            raise ValueError(
                f"sharding={self.sharding!r} shares out moments, and optimizer='adamw_8bit' keeps them in blocks that "
                "a part would cut in two; use optimizer='adamw'"
            )
        return self

    @model_validator(mode="after")
    def _adapters_share_out_an_adapter(self) -> Self:
        if self.adapters != "shared" and self.adapter is None:
            raise ValueError(
                f"adapters={self.adapters!r} gives predictors LoRA adapters of their own, and adapter=None trains all "
                "weights; set adapter='lora' or LoRA(rank=...)"
            )
        return self


def _group_faults(groups: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with groups of predictors by themselves, one clause each."""
    if bad := [repr(name) for name in groups if not re.fullmatch(GROUP, name)]:
        yield (
            f"{', '.join(bad)}: a group's name has 1 to {LONGEST} letters of a to z, digits, - and _, does not begin "
            "with -, and is not 'base'"
        )
    folded = Counter(name.casefold() for name in groups)
    if alike := [repr(name) for name in groups if folded[name.casefold()] > 1]:
        yield f"{', '.join(alike)} differ in case alone, and each names a folder"
    members = {
        name: list(dict.fromkeys(map(str, given)))
        for name, given in groups.items()
        if isinstance(given, list | tuple | set | frozenset)
    }
    if wrong := [repr(name) for name in groups if not members.get(name)]:
        yield f"{', '.join(wrong)}: list at least one predictor of the group"
    stands = Counter(name for own in members.values() for name in own)
    if twice := [repr(name) for name, times in stands.items() if times > 1]:
        yield f"{', '.join(twice)} in more than one group, and a predictor has one LoRA adapter"
