"""The prompts that a rollout's calls would have had under other instructions.

Each call of a predictor is made again through that call's adapter, with an LM that only takes down the request. What
the adapter passes on, tools and histories included, is rendered as it was for the engine. Nothing is assumed about how
an adapter writes a prompt.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import dspy
from dspy import lm15
from dspy.signatures.signature import ensure_signature
from dspy.utils.callback import BaseCallback

from dspy_fst.engine.chat import Ids, PromptRenderer, TemplateTraits, decoded
from dspy_fst.errors import TrainingError
from dspy_fst.rollout.call_recorder import is_recorded
from dspy_fst.rollout.chat_adapters import adapter_in_force, describe
from dspy_fst.types import PREDICTOR_TAG, Candidate, Rollout, SeedKLRollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RecordedCall:
    """One call of a predictor, as it was before the prompt was made."""

    name: str
    predictor: dspy.Predict
    given: dict[str, Any]
    """Its arguments, e.g. ``{"question": "..."}``, and ``signature``, ``demos`` or ``config`` if the program passed
    them."""
    lm: dspy.LM
    adapter: dspy.Adapter


class CallListener(BaseCallback):
    """DSPy's callback that notes every call of a predictor that calls the policy."""

    def __init__(self) -> None:
        self.asked: list[RecordedCall] = []

    def on_module_start(self, call_id: str, instance: object, inputs: Mapping[str, Any]) -> None:
        name: str | None = getattr(instance, PREDICTOR_TAG, None)
        if name is None or not isinstance(instance, dspy.Predict):
            return
        given = dict(inputs["kwargs"])
        lm = given.pop("lm", None) or instance.lm or dspy.settings.lm
        if is_recorded(lm):
            self.asked.append(RecordedCall(name, instance, given, lm, adapter_in_force()))


def seed_kl_rollouts(
    teachers: Sequence[Candidate], rollouts: Sequence[Rollout], tokenizer: "PreTrainedTokenizerBase"
) -> list[SeedKLRollout]:
    """Each rollout with the prompts of its calls under a teacher's texts. Teachers take turns.

    Raises:
        TrainingError: no call of any rollout could be rendered again, so there is nothing to compare.
    """
    renderer = renderer_of(tokenizer)
    rendered = [
        SeedKLRollout(rollout, _prompts(teacher, rollout, tokenizer, renderer))
        for rollout, teacher in zip(rollouts, itertools.cycle(teachers), strict=False)
    ]
    if all(ids is None for rollout in rendered for ids in rollout.start_prompts) and (fault := _unread(rollouts)):
        raise TrainingError(fault)
    return rendered


def unread_fault(rollouts: Sequence[Rollout], teacher: Candidate, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Why a teacher's texts cannot be used: no call of these rollouts has a prompt under them. None if one has."""
    renderer = renderer_of(tokenizer)
    prompts = (_prompts(teacher, rollout, tokenizer, renderer) for rollout in rollouts)
    return None if any(ids is not None for calls in prompts for ids in calls) else _unread(rollouts)


def _unread(rollouts: Sequence[Rollout]) -> str | None:
    calls = sum(len(rollout.calls) for rollout in rollouts)
    if not calls:
        return None
    asked = {(call.name, str(describe(call.adapter))) for rollout in rollouts for call in rollout.asked}
    through = "; ".join(f"predictor {name!r} speaks through {adapter}" for name, adapter in sorted(asked))
    return (
        f"seed_kl_teacher: none of {calls} calls can be rendered again under a teacher's instructions, so there would "
        f"be nothing to learn from them: {through or 'no predictor of the program made them'}. A call is found by its "
        "prompt, and an adapter whose prompts differ from call to call never writes the same one twice"
    )


def prompts_under(
    candidate: Candidate, rollout: Rollout, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Ids | None, ...]:
    """For each call of a rollout, its prompt's ids under the candidate's instructions.

    The predictor's call behind an LM call is found by its prompt: rendered again, it must give exactly the text that
    was sampled from. Ids are not compared, since a conversation that goes on keeps the ids of its earlier replies. The
    prompt is None if there is no such call, as in every rollout made without ``anew``. Callers count these.
    """
    return _prompts(candidate, rollout, tokenizer, renderer_of(tokenizer))


def renderer_of(tokenizer: "PreTrainedTokenizerBase") -> PromptRenderer:
    """To be made once for many rollouts: it renders a few conversations to find the chat template's traits."""
    return PromptRenderer(tokenizer, TemplateTraits.of(tokenizer))


def _prompts(
    candidate: Candidate, rollout: Rollout, tokenizer: "PreTrainedTokenizerBase", renderer: PromptRenderer
) -> tuple[Ids | None, ...]:
    rendered: dict[tuple[str, str], Ids] = {}
    for asked in rollout.asked:
        before = _render(asked, asked.predictor.signature.instructions, renderer)
        after = _render(asked, candidate.texts.get(asked.name), renderer)
        if before is not None and after is not None:
            rendered[asked.name, decoded(tokenizer, before)] = after
    return tuple(rendered.get((call.predictor, decoded(tokenizer, call.prompt_ids))) for call in rollout.calls)


def render(predictor: dspy.Predict, instructions: str, inputs: dict[str, Any], renderer: PromptRenderer) -> Ids | None:
    """The prompt's ids of a call that nobody made, through the adapter in force; None if they cannot be rendered."""
    lm = predictor.lm or dspy.settings.lm
    return _render(RecordedCall("", predictor, inputs, lm, adapter_in_force()), instructions, renderer)


def _render(asked: RecordedCall, instructions: str | None, renderer: PromptRenderer) -> Ids | None:
    """The prompt's ids; None if the adapter, the engine's rules or the chat template refuse the call."""
    if instructions is None:
        return None
    try:
        return renderer.ids(_heard(asked, instructions))
    except Exception:  # an adapter may be any code; if no call of a step is found, `_unread` says so
        return None


class _Heard(BaseException):
    """Carries a request out of DSPy, which would wrap an engine's Exception."""

    def __init__(self, request: lm15.Request):
        super().__init__()
        self.request = request


class _Ear:
    """An engine that only takes down a request. To adapters it has the capabilities of the real engine."""

    def __init__(self, engine: object):
        self.supports_function_calling = bool(getattr(engine, "supports_function_calling", False))
        self.supports_reasoning = bool(getattr(engine, "supports_reasoning", False))

    def complete(self, request: lm15.Request) -> NoReturn:
        raise _Heard(request)


def _heard(asked: RecordedCall, instructions: str) -> lm15.Request:
    """The request that this call sends to the LM under other instructions."""
    signature = ensure_signature(asked.given.get("signature") or asked.predictor.signature)
    given = {**asked.given, "signature": signature.with_instructions(instructions)}
    quiet: dict[str, object] = {"callbacks": [], "trace": None, "send_stream": None, "adapter": asked.adapter}
    ear = asked.lm.copy(engine=_Ear(asked.lm.engine))
    try:
        with dspy.context(**quiet):
            type(asked.predictor).forward(asked.predictor, lm=ear, **given)
    except _Heard as heard:
        return heard.request
    raise TypeError(f"{asked.name} did not call its LM")
