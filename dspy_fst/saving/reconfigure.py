"""How a compiled program calls its model: described in one line, and changed on purpose.

A compiled program calls its model as the training rollouts did: with the same adapter, temperature and ``max_tokens``,
and once for each reply. Settings are taken from the first of these places that gives them:

1. what the program's own code sets in ``forward``,
2. an argument of `reconfigured` or `dspy_fst.load`, or a flag of ``dspy-fst serve``,
3. what a predictor was created with, e.g. ``dspy.Predict(signature, temperature=0.3)``,
4. the training's settings,

and never from ``dspy.configure`` or ``dspy.context``, which set the whole process.
"""

import logging
from collections.abc import Container, Mapping
from typing import TypedDict, cast

import dspy

from dspy_fst.errors import ConfigurationError
from dspy_fst.policy_lm import PolicyLM, policy_of
from dspy_fst.preflight.sampling_settings import sampling_faults
from dspy_fst.rollout.chat_adapters import describe, keep, kept_by
from dspy_fst.rollout.components import carry
from dspy_fst.rollout.copying import copied
from dspy_fst.rollout.program_graph import all_speakers
from dspy_fst.types import Population

logger = logging.getLogger(__name__)
SAMPLING = ("temperature", "max_tokens")
"""What a predictor may be made with, e.g. ``dspy.Predict(signature, temperature=0.3)``. DSPy merges a predictor's
``config`` over its LM's settings at every call, and neither saves nor restores it."""


def reconfigured(
    program: dspy.Module,
    *,
    adapter: dspy.Adapter | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    use_json_adapter_fallback: bool | None = None,
) -> dspy.Module:
    """A copy of a compiled program that calls its model with other settings than in training. The program is unchanged.

    The copy's ``population`` and ``candidate_programs`` use the settings too. Both programs share one engine. A setting
    of None is unchanged; the others apply to every predictor that speaks with the trained model.

    >>> freer = reconfigured(compiled, use_json_adapter_fallback=True)               # doctest: +SKIP
    >>> other = reconfigured(compiled, adapter=dspy.JSONAdapter(), temperature=0.0)  # doctest: +SKIP

    Args:
        adapter: The adapter of the copy.
        temperature: Sampling temperature; 0 is greedy.
        max_tokens: Longest reply, in tokens.
        use_json_adapter_fallback: Whether DSPy's adapters may call again in JSON when a reply does not parse.

    Raises:
        ConfigurationError: a setting cannot work; every fault is named, and no copy is made.
        ValueError: the program has no PolicyLM.
    """
    given = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "use_json_adapter_fallback": use_json_adapter_fallback,
    }
    sampling = {name: value for name, value in given.items() if value is not None}
    if faults := sampling_faults(adapter, sampling):
        raise ConfigurationError(faults)
    policy_of(program)
    changed: dspy.Module = copied(program)
    lms: dict[int, PolicyLM] = {}  # one LM must stay one: BestOfN and Refine refuse a module of two
    for predictor in all_speakers(changed):
        if isinstance(lm := predictor.lm, PolicyLM):
            predictor.lm = lms[id(lm)] if id(lm) in lms else lms.setdefault(id(lm), lm.copy(**sampling))
            clear_own_sampling(predictor, sampling)
    if adapter is not None:
        _log_change(changed, adapter)
        keep(changed, adapter)
    if isinstance(population := getattr(changed, "population", None), Population):
        carry(changed, population)
    return changed


def _log_change(program: dspy.Module, adapter: dspy.Adapter) -> None:
    trained = kept_by(program)
    if trained is not None and describe(trained) != describe(adapter):
        before, now = describe(trained), describe(adapter)
        logger.warning("the program was trained through %s, and speaks through %s now", before, now)


def how_it_asks(program: dspy.Module) -> str:
    """One line on how a compiled program calls its trained model.

    E.g. ``"through JSONAdapter, temperature 1, at most 24 tokens a reply, each reply asked for once"``.
    """
    adapter = kept_by(program)
    through = "as DSPy is set" if adapter is None else f"through {describe(adapter).name}"
    predictors = [predictor for _, predictor in program.named_predictors()]
    calls = [(own_sampling(predictor), lm) for predictor in predictors if isinstance(lm := predictor.lm, PolicyLM)]
    temperatures = sorted(
        {f"{own_settings.get('temperature', lm.sampling_temperature):g}" for own_settings, lm in calls}
    )
    limits = sorted({_limit(own_settings.get("max_tokens", lm.reply_limit)) for own_settings, lm in calls})
    again = any(lm.use_json_adapter_fallback for _, lm in calls)
    once = "again in JSON where a reply does not parse" if again else "each reply asked for once"
    return f"{through}, temperature {' or '.join(temperatures)}, {' or '.join(limits)}, {once}"


def _limit(max_tokens: int | None) -> str:
    return "replies as long as the context allows" if max_tokens is None else f"at most {max_tokens} tokens a reply"


class PredictorSampling(TypedDict, total=False):
    """The part of `SAMPLING` that a predictor sets."""

    temperature: float
    max_tokens: int


def own_sampling(predictor: object) -> PredictorSampling:
    """What of sampling the predictor itself sets; nothing for a dspy.Flex, which has no settings of its own."""
    config = getattr(predictor, "config", None)
    config = config if isinstance(config, dict) else {}
    return cast(PredictorSampling, {name: config[name] for name in SAMPLING if config.get(name) is not None})


def set_own_sampling(predictor: dspy.Predict | dspy.Flex, own: Mapping[str, object]) -> None:
    """Have the predictor set this of sampling and nothing else; its other settings stay."""
    if own != own_sampling(predictor):
        assert isinstance(predictor, dspy.Predict), "a dspy.Flex has no settings of its own"
        predictor.config = {**{name: of for name, of in predictor.config.items() if name not in SAMPLING}, **own}


def clear_own_sampling(predictor: dspy.Predict | dspy.Flex, names: Container[str]) -> None:
    """Have the predictor no longer set these, so that its LM's count."""
    set_own_sampling(predictor, {name: of for name, of in own_sampling(predictor).items() if name not in names})
