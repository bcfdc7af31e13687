"""How a fast phase searches. What depends on the run, e.g. a search's budget, is an argument of `evolve` instead."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from dspy_fst.recipe.declared import Settings

if TYPE_CHECKING:
    import dspy

    from dspy_fst.types import Candidate


MOST_DEMO_TOKENS = 1000
"""``max_demo_tokens`` by default, where the context has four times as many to spare (ours)."""


class SearchSettings(Settings):
    """Which texts GEPA evolves, and from what it reflects."""

    reflection_minibatch: int = Field(default=3, ge=1)
    """Problems shown to a reflection (GEPA, section 4.3)."""
    proposals_at_once: int = Field(default=1, ge=1)
    """Proposals that a search makes from the same pool at a time, their reflections in flight together (GEPA: 1). Each
    is shown another minibatch."""
    components: Literal["round_robin", "all"] = "round_robin"
    """Whether a proposal changes one text of the program or all (GEPA's default)."""
    tool_descriptions: Literal["fixed", "evolved"] = "fixed"
    """Whether the descriptions of a dspy.ReAct's tools and of their arguments evolve too (ours; DSPy 3.4's GEPA leaves
    them alone)."""
    max_bootstrapped_demos: int = Field(default=0, ge=0)
    """Demos of one predictor that a search makes of its own rollouts, at most; 0: none (ours; DSPy's BootstrapFewShot:
    4). A candidate then holds demos beside its instructions, and both evolve in turns."""
    max_labeled_demos: int = Field(default=0, ge=0)
    """Demos of one predictor that a search takes from the labels of the trainset, at most; 0: none (ours; DSPy's
    LabeledFewShot: 16)."""
    metric_threshold: float | None = Field(default=None, allow_inf_nan=False)
    """Reward from which on a rollout gives bootstrapped demos; None: ``perfect_score`` (ours; DSPy takes any that its
    metric calls true)."""
    max_demo_tokens: int | None = Field(default=None, ge=1)
    """Tokens that the demos of one predictor may add to its prompt, those that the user set left out. None: a quarter
    of the context that ``max_tokens`` leaves, and at most 1000 (ours). A demo is shown whole or not at all."""
    protected: dict[str, tuple[str, ...]] = Field(default={})
    """Component -> lines of the program's own text that every proposal keeps. A proposal that lost a line gets it back
    at its end (ours)."""
    reflection_tokens: int = Field(default=4000, ge=100)
    """Budget of what a reflection is shown of one rollout, in tokens estimated at four characters each (ours)."""
    reuse_rollouts: bool = Field(default=False, strict=True)
    """Whether the rollouts that scored the new population's members in a search are members of the groups of the step
    after it, whose weights and texts sampled them: one for each member and anchor among the step's problems, and the
    step takes anchors first (ours; future work of the paper)."""
    perfect_score: float = 1.0
    """Reward from which on a rollout counts as solved and is not reflected on (DSPy's GEPA)."""

    @property
    def demos_evolve(self) -> bool:
        """Whether a candidate holds demos."""
        return self.max_bootstrapped_demos + self.max_labeled_demos > 0

    @property
    def demo_tokens(self) -> int:
        """Tokens that a search may add to a prompt by demos; 0 where none evolve. A run knows the model's context and
        has replaced a None (`preflight.model_checks.with_demo_tokens`)."""
        return (self.max_demo_tokens or MOST_DEMO_TOKENS) if self.demos_evolve else 0

    @property
    def demo_score(self) -> float:
        """Least reward of a rollout that gives demos."""
        return self.perfect_score if self.metric_threshold is None else self.metric_threshold


def own_texts(program: "dspy.Module", settings: SearchSettings) -> "Candidate":
    """The program's own texts, as far as a search may change them: the candidate that a run starts from."""
    from dspy_fst.rollout.components import read_texts  # imports DSPy, which the settings do without

    return read_texts(program, tools=settings.tool_descriptions == "evolved", demos=settings.demos_evolve)
