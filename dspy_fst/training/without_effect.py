"""Settings that can do nothing in a run, as sentences that warn of them before work."""

from collections.abc import Iterator

from dspy_fst.config import FSTConfig
from dspy_fst.slow.training_settings import TrainingSettings

OF_UPDATES = ("resample_flat", "retire_solved", "overlong_penalty")
"""Options of what an update learns from."""


def settings_without_effect(config: FSTConfig) -> list[str]:
    """A sentence for each kind of setting that was given and can do nothing."""
    of = (_of_updates, _of_searches, _of_proposals, _of_no_loss, update_settings_without_effect)
    return [sentence for kind in of for sentence in kind(config)]


def update_settings_without_effect(settings: TrainingSettings) -> list[str]:
    """The same for what an update reads, in a run and in a job that DSPy starts."""
    if isinstance(settings, FSTConfig) and settings.method == "gepa":
        return _of_the_penalty(settings)
    return [*_of_the_penalty(settings), *_of_the_loss(settings)]


def _of_updates(config: FSTConfig) -> list[str]:
    given = [f"{name}={getattr(config, name):g}" for name in OF_UPDATES if getattr(config, name)]
    given += [f"{name}={getattr(config, name)}" for name in ("updates_per_batch", "ranks") if getattr(config, name) > 1]
    if config.method != "gepa" or not given:
        return []
    does = "does" if len(given) == 1 else "do"
    return [
        f"{' and '.join(given)} {does} nothing under method='gepa': weight updates are what it changes, "
        "and here none are made. Leave it out, or use a method with updates, e.g. method='fst'"
    ]


def _of_searches(config: FSTConfig) -> list[str]:
    if not config.reuse_rollouts or config.method not in ("rl", "gepa", "rl_then_gepa"):
        return []
    return [
        f"reuse_rollouts=True does nothing under method={config.method!r}: it takes rollouts of a search into the "
        "groups of the step after it, and here no step comes after a search. Leave it out, or use method='fst'"
    ]


def _of_proposals(config: FSTConfig) -> list[str]:
    if config.proposals_at_once == 1 or config.method != "rl":
        return []
    return [
        f"proposals_at_once={config.proposals_at_once} does nothing under method='rl', which never searches. Leave it "
        "out, or use method='fst'"
    ]


def _of_the_penalty(config: TrainingSettings) -> list[str]:
    share, default = config.overlong_share, FSTConfig.model_fields["overlong_share"].default
    if config.overlong_penalty or share == default:
        return []
    return [
        f"overlong_share={share:g} does nothing at overlong_penalty=0: it says over which part of max_tokens the "
        "penalty grows. Leave it out, or set overlong_penalty, e.g. to 1.0"
    ]


def _of_no_loss(config: FSTConfig) -> list[str]:
    if config.method != "gepa" or config.loss == "cispo":
        return []
    return [
        f"loss={config.loss!r} does nothing under method='gepa', which makes no weight updates. Leave it out, or use "
        "a method with updates, e.g. method='fst'"
    ]


def _of_the_loss(config: TrainingSettings) -> Iterator[str]:
    loss, default = config.loss, TrainingSettings.model_fields["importance_cap"].default
    if loss != "cispo" and config.importance_cap != default:
        instead = "leave it out" if loss in ("rloo", "rft") else "set clip"
        yield (
            f"importance_cap={config.importance_cap:g} does nothing under loss={loss!r}: it caps CISPO's importance "
            f"weights. Use loss='cispo', or {instead}"
        )
    if loss in ("dr_grpo", "rloo", "rft") and config.advantage_normalization != "group":
        yield (
            f"advantage_normalization={config.advantage_normalization!r} does nothing under loss={loss!r}, which "
            "divides by no standard deviation. Leave it out, or use loss='grpo'"
        )
    if loss == "rloo" and config.updates_per_batch > 1:
        yield (
            f"loss='rloo' has no importance weights: with updates_per_batch={config.updates_per_batch} only the first "
            "optimizer step of a batch learns from rollouts of its own weights, as this loss supposes. Use "
            "updates_per_batch=1, or loss='dr_grpo'"
        )
