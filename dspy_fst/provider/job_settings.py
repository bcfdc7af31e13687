"""What ``train_kwargs`` may set in a job that DSPy starts: the names of a run's recipe, where they mean something."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from dspy_fst.errors import ConfigurationError
from dspy_fst.preflight.library_checks import library_faults
from dspy_fst.recipe.declared import no_such_setting
from dspy_fst.recipe.other_names import INSTEAD as OTHER_NAMES
from dspy_fst.slow.training_settings import TrainingSettings

_EIGHT = "a step learns 8 replies; use micro_batch_tokens for the memory of a forward pass"
_GRPO_STEPS = "use GRPO(num_train_steps=...); a supervised job has epochs"
INSTEAD = {
    **OTHER_NAMES,
    "num_train_epochs": "use epochs",
    **dict.fromkeys(("epochs", "max_steps", "num_train_steps"), _GRPO_STEPS),
    **dict.fromkeys(("output_dir", "run_dir"), "use folder"),
    "device": "a job trains on the GPU where there is one",
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "train_batch_size"), _EIGHT),
    "max_seq_length": "nothing is cut: a prompt and reply beyond the model's context are left out, and counted",
    "packing": "replies are not packed",
    "num_generations": "use GRPO(num_rollouts_per_grpo_step=...)",
    "group_size": "use GRPO(num_rollouts_per_grpo_step=...)",
    "report_to": "job.json holds what a job learnt; trackers are for FSTOptimizer",
    "track": "job.json holds what a job learnt; trackers are for FSTOptimizer",
}
"""Names of DSPy's LocalProvider, of trl and of others -> what is meant in a job."""
SAME_IN_BOTH = ("adapter", "quantized_base", "optimizer", "learning_rate", "precision")
OF_MEMORY = ("micro_batch_tokens", "gradient_checkpointing")


class JobSettings(TrainingSettings):
    """What both kinds of jobs have."""

    folder: Path = Path("runs/dspy")
    """Where each job makes a folder of its own for its weights."""
    seed: int = 0
    """Seed of every random draw."""

    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Settings of a run that do nothing in this kind of job."""
    elsewhere: ClassVar[str] = ""
    """Where they do something, in words."""

    @classmethod
    def _unknown(cls, place: tuple[int | str, ...]) -> str:
        name, known = str(place[0]), [name for name in cls.model_fields if name not in cls.without_effect]
        if len(place) > 1:
            return super()._unknown(place)
        return no_such_setting(name, known, f"; it has {', '.join(known)}", INSTEAD)

    @classmethod
    def of(cls, train_kwargs: Mapping[str, Any] | None, faults: list[str]) -> Self | None:
        """The settings, or None; all that is wrong with them is added to ``faults``."""
        given = train_kwargs or {}
        if idle := [name for name in given if name in cls.without_effect]:
            faults.append(f"train_kwargs: {', '.join(idle)}: there is no use for it in this job; {cls.elsewhere}")
        try:
            settings = cls.checked({name: value for name, value in given.items() if name not in idle})
        except ConfigurationError as error:
            faults += [f"train_kwargs: {fault}" for fault in error.faults]
            return None
        faults += [f"train_kwargs: {fault}" for fault in library_faults(settings)]
        return settings


class FineTuneSettings(JobSettings):
    """Of a supervised job (`dspy.BootstrapFinetune`). ``learning_rate`` is 2e-5 by default, and 2e-4 for an adapter."""

    epochs: int = Field(default=3, ge=1)
    """Passes over the replies (transformers' default)."""

    without_effect = frozenset({*TrainingSettings.model_fields} - {*SAME_IN_BOTH, *OF_MEMORY})
    elsewhere = "it is for dspy.teleprompt.grpo.GRPO or FSTOptimizer"

    @property
    def rate(self) -> float | None:
        """The learning rate that was given, see `dspy_fst.slow.supervised.Supervision`."""
        return self.learning_rate if "learning_rate" in self.model_fields_set else None


class ReinforceSettings(JobSettings):
    """Of a job of reinforcement (`dspy.teleprompt.grpo.GRPO`)."""

    num_generations: int | None = Field(default=None, ge=2)
    """Replies of a group; DSPy's GRPO sets it."""
    keep_weights: int = Field(default=2, ge=1)
    """Newest weight versions that are kept, beside the first and the job's checkpoints."""
    sync_tolerance: float | None = Field(default=None, gt=0)
    """As in FSTConfig."""

    without_effect = frozenset(
        {"trained", "adapters", "continue_optimizer", "baseline", "sharding"}
        | {"seed_kl_coefficient", "seed_kl_teacher", "seed_kl_rollouts"}
    )
    elsewhere = "it is for FSTOptimizer"
