"""DSPy's Provider of a PolicyLM. It imports no torch: every PolicyLM has one, and few are trained by DSPy."""

from typing import TYPE_CHECKING, Any

from dspy.clients.provider import Provider, ReinforceJob, TrainingJob
from dspy.clients.utils_finetune import TrainDataFormat

if TYPE_CHECKING:
    import dspy

    from dspy_fst.policy_lm import PolicyLM


def training_job(**given: Any) -> TrainingJob:
    """A job of `dspy.LM.finetune`, checked."""
    from dspy_fst.provider.fine_tuning import FineTuningJob

    return FineTuningJob(**given)


def reinforce_job(lm: "PolicyLM", train_kwargs: dict[str, Any] | None = None) -> ReinforceJob:
    """A job of `dspy.LM.reinforce`, checked."""
    from dspy_fst.provider.reinforcement import ReinforcementJob

    return ReinforcementJob(lm, train_kwargs)


def _policy(lm: "dspy.LM") -> "PolicyLM":
    from dspy_fst.policy_lm import PolicyLM

    assert isinstance(lm, PolicyLM), "its provider is that of a PolicyLM"
    return lm


class PolicyProvider(Provider):
    """Trains a PolicyLM where DSPy asks for it, and starts and stops its engine."""

    def __init__(self) -> None:
        super().__init__()
        self.finetunable = self.reinforceable = True
        self.TrainingJob = training_job  # type: ignore[assignment]  # DSPy only calls them
        self.ReinforceJob = reinforce_job  # type: ignore[assignment]

    @staticmethod
    def launch(lm: "dspy.LM", launch_kwargs: dict[str, Any] | None = None) -> None:
        """Start the LM's engine on its weights, if it is not running."""
        _policy(lm).handle.ready()

    @staticmethod
    def kill(lm: "dspy.LM", launch_kwargs: dict[str, Any] | None = None) -> None:
        """Stop the LM's engine, if it is running; the next call starts it again."""
        _policy(lm).release()

    @staticmethod
    def finetune(
        job: TrainingJob,
        model: str,
        train_data: list[dict[str, Any]],
        train_data_format: TrainDataFormat | str | None,
        train_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The folder of weights that have learnt the job's data; see `dspy_fst.provider.fine_tuning`."""
        from dspy_fst.provider.fine_tuning import FineTuningJob, finetuned

        assert isinstance(job, FineTuningJob), "it was made by this provider"
        return finetuned(job, model)
