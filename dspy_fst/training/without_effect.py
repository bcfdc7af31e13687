"""Settings that can do nothing in a run, as sentences that warn of them before work."""

from dspy_fst.config import FSTConfig

OF_UPDATES = ("resample_flat", "retire_solved", "overlong_penalty")
"""Options of what an update learns from."""


def settings_without_effect(config: FSTConfig) -> list[str]:
    """A sentence for each kind of setting that was given and can do nothing."""
    return [*_of_updates(config), *_of_searches(config), *_of_proposals(config), *_of_the_penalty(config)]


def _of_updates(config: FSTConfig) -> list[str]:
    given = [f"{name}={getattr(config, name):g}" for name in OF_UPDATES if getattr(config, name)]
    if config.method != "gepa" or not given:
        return []
    does = "does" if len(given) == 1 else "do"
    return [
        f"{' and '.join(given)} {does} nothing under method='gepa': it changes the groups or rewards of weight "
        "updates, and here none are made. Leave it out, or use a method with updates, e.g. method='fst'"
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


def _of_the_penalty(config: FSTConfig) -> list[str]:
    share, default = config.overlong_share, FSTConfig.model_fields["overlong_share"].default
    if config.overlong_penalty or share == default:
        return []
    return [
        f"overlong_share={share:g} does nothing at overlong_penalty=0: it says over which part of max_tokens the "
        "penalty grows. Leave it out, or set overlong_penalty, e.g. to 1.0"
    ]
