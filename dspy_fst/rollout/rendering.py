"""The prompts that a rollout's calls would have had under other instructions."""

from collections.abc import Iterator
from typing import Any

import dspy

from dspy_fst.engine.chat_template import TemplateTraits, fitted_messages
from dspy_fst.types import PREDICTOR_TAG, Candidate, Rollout

Ids = tuple[int, ...]


def prompts_under(candidate: Candidate, rollout: Rollout, tokenizer: Any) -> tuple[Ids | None, ...]:
    """For each call of a rollout its prompt's ids, had the program spoken the candidate's instructions.

    A call is found again among the rollout's traced module calls by its prompt: one whose inputs, rendered anew, give
    exactly the text that was sampled from. Not the ids: a conversation that goes on keeps the ids of its earlier
    replies. None for a call that none of them gives, such as one whose tools or history the adapter handed on by
    another way; whoever uses this counts them.
    """
    traits = TemplateTraits.of(tokenizer)
    rendered = {
        (name, tokenizer.decode(before)): after
        for name, predictor, inputs in _traced(rollout)
        if (before := render(predictor, predictor.signature.instructions, inputs, tokenizer, traits)) is not None
        and (after := render(predictor, candidate.texts.get(name), inputs, tokenizer, traits)) is not None
    }
    return tuple(rendered.get((call.predictor, tokenizer.decode(call.prompt_ids))) for call in rollout.calls)


def _traced(rollout: Rollout) -> Iterator[tuple[str, dspy.Predict, dict[str, Any]]]:
    for predictor, inputs, _ in rollout.trace:
        if (name := getattr(predictor, PREDICTOR_TAG, None)) is not None:
            yield name, predictor, inputs


def render(
    predictor: dspy.Predict,
    instructions: str | None,
    inputs: dict[str, Any],
    tokenizer: Any,
    traits: TemplateTraits | None = None,
) -> Ids | None:
    """The prompt's ids; None when the adapter or the chat template refuses."""
    if instructions is None:
        return None
    adapter = dspy.settings.adapter or dspy.ChatAdapter()
    signature = predictor.signature.with_instructions(instructions)
    try:
        traits = traits or TemplateTraits.of(tokenizer)
        messages = fitted_messages(adapter.format(signature, predictor.demos, inputs), traits)
        return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
    except (TypeError, ValueError, KeyError):
        return None
