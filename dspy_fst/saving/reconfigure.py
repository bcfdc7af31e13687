"""How a compiled program asks its model, said in a sentence, and changed on purpose.

A compiled program asks and reads as its rollouts did: through the adapter of its training, at the temperature and with
the ``max_tokens`` of its training, and once for each reply. From first to last counts

1. what the program's own code sets in ``forward``,
2. what `reconfigured`, `dspy_fst.load` or a flag of ``dspy-fst serve`` says of this program by name,
3. what a predictor was made with, e.g. ``dspy.Predict(signature, temperature=0.3)``,
4. the training's,

and never what ``dspy.configure`` or ``dspy.context`` set for the process at large.
"""

import logging

import dspy

from dspy_fst.errors import ConfigurationError
from dspy_fst.policy_lm import PolicyLM
from dspy_fst.preflight.sampling_settings import asking_faults
from dspy_fst.rollout.adapters import describe, keep, kept_by
from dspy_fst.rollout.components import carry
from dspy_fst.rollout.copying import copied
from dspy_fst.rollout.own_sampling import clear_own_sampling, own_sampling
from dspy_fst.rollout.tree import all_predictors
from dspy_fst.saving.save_load import policy_of
from dspy_fst.types import Population

logger = logging.getLogger(__name__)


def reconfigured(
    program: dspy.Module,
    *,
    adapter: dspy.Adapter | None = None,
    temperature: float | None = None,
    max_tokens: int | None = None,
    use_json_adapter_fallback: bool | None = None,
) -> dspy.Module:
    """A copy of a compiled program that asks otherwise than it was trained; the program is left as it is.

    Its ``population`` and ``candidate_programs`` ask so, too. Both programs speak through one engine. What is None
    stays as it is; the rest holds for every predictor that speaks with the trained model.

    >>> freer = reconfigured(compiled, use_json_adapter_fallback=True)               # doctest: +SKIP
    >>> other = reconfigured(compiled, adapter=dspy.JSONAdapter(), temperature=0.0)  # doctest: +SKIP

    Args:
        adapter: What it speaks through.
        temperature: Of sampling; 0 is greedy.
        max_tokens: Longest reply, in tokens.
        use_json_adapter_fallback: Whether DSPy's adapters may ask again in JSON where a reply does not parse.

    Raises:
        ConfigurationError: what is said cannot be asked with; every fault is named, and no copy is made.
        ValueError: the program has no PolicyLM.
    """
    said = {
        "temperature": temperature,
        "max_tokens": max_tokens,
        "use_json_adapter_fallback": use_json_adapter_fallback,
    }
    sampling = {name: value for name, value in said.items() if value is not None}
    if faults := asking_faults(adapter, sampling):
        raise ConfigurationError(faults)
    policy_of(program)
    changed: dspy.Module = copied(program)
    lms: dict[int, PolicyLM] = {}  # one LM stays one: BestOfN and Refine refuse a module of two
    for predictor in all_predictors(changed, (dspy.Predict, dspy.Flex)):
        if isinstance(lm := predictor.lm, PolicyLM):
            predictor.lm = lms[id(lm)] if id(lm) in lms else lms.setdefault(id(lm), lm.copy(**sampling))
            clear_own_sampling(predictor, sampling)
    if adapter is not None:
        _tell_of(changed, adapter)
        keep(changed, adapter)
    if isinstance(population := getattr(changed, "population", None), Population):
        carry(changed, population)
    return changed


def _tell_of(program: dspy.Module, adapter: dspy.Adapter) -> None:
    trained = kept_by(program)
    if trained is not None and describe(trained) != describe(adapter):
        before, now = describe(trained), describe(adapter)
        logger.warning("the program was trained through %s, and speaks through %s now", before, now)


def how_it_asks(program: dspy.Module) -> str:
    """One line on what every call of a compiled program's trained model is asked with.

    E.g. ``"through JSONAdapter, temperature 1, at most 24 tokens a reply, each reply asked for once"``.
    """
    adapter = kept_by(program)
    through = "as DSPy is set" if adapter is None else f"through {describe(adapter).name}"
    predictors = [predictor for _, predictor in program.named_predictors()]
    asking = [(own_sampling(of), lm) for of in predictors if isinstance(lm := of.lm, PolicyLM)]
    temperatures = sorted({f"{own.get('temperature', lm.sampling_temperature):g}" for own, lm in asking})
    limits = sorted({_limit(own.get("max_tokens", lm.reply_limit)) for own, lm in asking})
    again = any(lm.use_json_adapter_fallback for _, lm in asking)
    once = "again in JSON where a reply does not parse" if again else "each reply asked for once"
    return f"{through}, temperature {' or '.join(temperatures)}, {' or '.join(limits)}, {once}"


def _limit(max_tokens: int | None) -> str:
    return "replies as long as the context allows" if max_tokens is None else f"at most {max_tokens} tokens a reply"
