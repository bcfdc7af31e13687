"""The prompts that a rollout's calls would have had under other instructions.

Each call of a predictor is made once more through the adapter of that call, with an LM that only records the request.
Whatever the adapter passes on, tools and histories included, is rendered as it was for the engine. Nothing is assumed
about the form in which an adapter writes a prompt.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import dspy
from dspy import lm15
from dspy.signatures.signature import ensure_signature
from dspy.utils.callback import BaseCallback

from dspy_fst.engine.chat import Ids, PromptRenderer, TemplateTraits
from dspy_fst.errors import TrainingError
from dspy_fst.rollout.call_recorder import is_recorded
from dspy_fst.rollout.chat_adapters import adapter_in_force, describe
from dspy_fst.types import PREDICTOR_TAG, Candidate, Rollout, SeedKLRollout


@dataclass(frozen=True)
class RecordedCall:
    """One call of a predictor, before its prompt was made."""

    name: str
    predictor: dspy.Predict
    given: dict[str, Any]
    """Its arguments, e.g. ``{"question": "..."}``, and ``signature``, ``demos`` or ``config`` where the program gave
    any."""
    lm: dspy.LM
    adapter: dspy.Adapter


class Listening(BaseCallback):
    """DSPy's callback that takes down every call of a predictor that speaks with the policy."""

    def __init__(self) -> None:
        self.asked: list[RecordedCall] = []

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        name = getattr(instance, PREDICTOR_TAG, None)
        if name is None or not isinstance(instance, dspy.Predict):
            return
        given = dict(inputs["kwargs"])
        lm = given.pop("lm", None) or instance.lm or dspy.settings.lm
        if is_recorded(lm):
            self.asked.append(RecordedCall(name, instance, given, lm, adapter_in_force()))


def held_under(teachers: Sequence[Candidate], rollouts: Sequence[Rollout], tokenizer: Any) -> list[SeedKLRollout]:
    """Each rollout with its calls' prompts under the next teacher's texts.

    Raises:
        TrainingError: no call of any rollout could be rendered anew, so that nothing could be taught.
    """
    renderer = renderer_of(tokenizer)
    held = [
        SeedKLRollout(rollout, _prompts(teacher, rollout, tokenizer, renderer))
        for rollout, teacher in zip(rollouts, itertools.cycle(teachers), strict=False)
    ]
    if not any(ids is not None for of in held for ids in of.start_prompts) and (fault := _unread(rollouts)):
        raise TrainingError(fault)
    return held


def unread_fault(rollouts: Sequence[Rollout], teacher: Candidate, tokenizer: Any) -> str | None:
    """Why nothing can be taught by a teacher's texts, when not one call of these rollouts has a prompt under them."""
    renderer = renderer_of(tokenizer)
    prompts = (_prompts(teacher, rollout, tokenizer, renderer) for rollout in rollouts)
    return None if any(ids is not None for of in prompts for ids in of) else _unread(rollouts)


def _unread(rollouts: Sequence[Rollout]) -> str | None:
    calls = sum(len(rollout.calls) for rollout in rollouts)
    if not calls:
        return None
    asked = {(of.name, str(describe(of.adapter))) for rollout in rollouts for of in rollout.asked}
    through = "; ".join(f"predictor {name!r} speaks through {adapter}" for name, adapter in sorted(asked))
    return (
        f"none of {calls} calls can be rendered anew under other instructions, so there is nothing to teach by them "
        f"(seed_kl_teacher): {through or 'no predictor of the program made them'}. Rendered anew, a prompt must have "
        "exactly the ids that were sampled from; an adapter whose prompts differ from call to call has none"
    )


def prompts_under(candidate: Candidate, rollout: Rollout, tokenizer: Any) -> tuple[Ids | None, ...]:
    """For each call of a rollout its prompt's ids, had the program spoken the candidate's instructions.

    A call is found again among the rollout's calls of predictors by its prompt: one that, rendered anew, gives exactly
    the text that was sampled from. Not the ids: a conversation that goes on keeps the ids of its earlier replies. None
    for a call that none of them gives, as for every call of a rollout that was played without ``anew``; whoever uses
    this counts them.
    """
    return _prompts(candidate, rollout, tokenizer, renderer_of(tokenizer))


def renderer_of(tokenizer: Any) -> PromptRenderer:
    """Made once for many rollouts: the traits are found by rendering a handful of conversations."""
    return PromptRenderer(tokenizer, TemplateTraits.of(tokenizer))


def _prompts(
    candidate: Candidate, rollout: Rollout, tokenizer: Any, renderer: PromptRenderer
) -> tuple[Ids | None, ...]:
    rendered: dict[tuple[str, str], Ids] = {}
    for asked in rollout.asked:
        before = _render(asked, asked.predictor.signature.instructions, renderer)
        after = _render(asked, candidate.texts.get(asked.name), renderer)
        if before is not None and after is not None:
            rendered[asked.name, tokenizer.decode(before)] = after
    return tuple(rendered.get((call.predictor, tokenizer.decode(call.prompt_ids))) for call in rollout.calls)


def render(predictor: dspy.Predict, instructions: str, inputs: dict[str, Any], renderer: PromptRenderer) -> Ids | None:
    """The prompt's ids of a call that nobody made, through the adapter in force; None when it refuses."""
    lm = predictor.lm or dspy.settings.lm
    return _render(RecordedCall("", predictor, inputs, lm, adapter_in_force()), instructions, renderer)


def _render(asked: RecordedCall, instructions: str | None, renderer: PromptRenderer) -> Ids | None:
    """The prompt's ids; None when the adapter, the engine's rules or the chat template refuse."""
    if instructions is None:
        return None
    try:
        return renderer.ids(_heard(asked, instructions))
    except Exception:  # an adapter may be anybody's code; where none of a step's calls is found, `_unread` tells
        return None


class _Heard(BaseException):
    """Carries a request out of DSPy, which wraps every Exception of an engine."""

    def __init__(self, request: lm15.Request):
        super().__init__()
        self.request = request


class _Ear:
    """An engine that only hears; adapters see the capabilities of the real one."""

    def __init__(self, engine: Any):
        self.supports_function_calling = bool(getattr(engine, "supports_function_calling", False))
        self.supports_reasoning = bool(getattr(engine, "supports_reasoning", False))

    def complete(self, request: lm15.Request) -> NoReturn:
        raise _Heard(request)


def _heard(asked: RecordedCall, instructions: str) -> lm15.Request:
    """What the LM is asked in this call under these instructions."""
    signature = ensure_signature(asked.given.get("signature") or asked.predictor.signature)
    given = {**asked.given, "signature": signature.with_instructions(instructions)}
    quiet = {"callbacks": [], "trace": None, "send_stream": None, "adapter": asked.adapter}
    ear = asked.lm.copy(engine=_Ear(asked.lm.engine))
    try:
        with dspy.context(**quiet):
            type(asked.predictor).forward(asked.predictor, lm=ear, **given)
    except _Heard as heard:
        return heard.request
    raise TypeError(f"{asked.name} made no call of its LM")
