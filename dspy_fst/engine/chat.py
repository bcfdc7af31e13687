"""Converts DSPy's canonical requests to the chat messages of a Hugging Face template, and text to a response."""

from collections.abc import Sequence
from typing import Any

from dspy import lm15

ChatMessage = dict[str, Any]
"""One turn as chat templates read it, e.g. ``{"role": "user", "content": "What is a lynx?"}``; tool calls are lists."""

_SAMPLING = {
    "top_p": "nucleus sampling",
    "top_k": "top-k sampling",
    "frequency_penalty": "a frequency penalty",
    "presence_penalty": "a presence penalty",
}
_MASKING = {
    *("logit_bias", "structured_outputs", "bad_words", "allowed_token_ids", "min_tokens"),
    *("thinking_token_budget", "use_beam_search", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
}
"""Servers' own settings that forbid some tokens or force others."""

_ROLES = {"developer": "system"}
"""OpenAI's newer name of a role -> the name that chat templates know."""

LEAST_TEMPERATURE = 0.01
"""vLLM 0.32 raises a temperature between 0 and this value to this value (vllm/sampling_params.py), and reports the
log-probabilities at the raised temperature."""


def temperature_fault(temperature: object) -> str | None:
    """Why calls cannot be both sampled and scored at this temperature; None if they can."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        return f"temperature={temperature!r}: it must be a number above 0, at most 2; 1.0 is the model's own"
    if 0 < temperature < LEAST_TEMPERATURE:
        return (
            f"temperature={temperature!r}: vLLM samples at {LEAST_TEMPERATURE} instead, so training would score "
            f"another distribution than was sampled; use 0 (greedy) or at least {LEAST_TEMPERATURE}"
        )
    return None


def refuse_reshaped_sampling(request: lm15.Request) -> None:
    """Refuse settings under which tokens are not sampled from softmax(logits / temperature).

    The trainer scores that distribution. Any other would silently bias every importance weight.

    Raises:
        dspy.lm15.UnsupportedFeatureError: names the setting.
    """
    neutral = {"top_p": (None, 1, 1.0), "top_k": (None, 0, -1)}
    for name, meaning in _SAMPLING.items():
        if getattr(request.config, name) not in neutral.get(name, (None, 0, 0.0)):
            raise lm15.UnsupportedFeatureError(
                f"{name}={getattr(request.config, name)!r}: {meaning} is not what training scores; remove it from "
                "the PolicyLM or the predictor's config"
            )
    temperature = request.config.temperature
    if temperature is not None and 0 < temperature < LEAST_TEMPERATURE:
        raise lm15.UnsupportedFeatureError(str(temperature_fault(temperature)))
    if masks := sorted(_masks(request.config)):
        raise lm15.UnsupportedFeatureError(
            f"{', '.join(masks)}: the reply would be drawn with some tokens masked, which is not what training scores; "
            "ask for the form in words (DSPy's adapters do)"
        )


def _masks(config: lm15.Config) -> set[str]:
    """Names of the settings that force the form of a reply.

    A forced tool choice is not among them: it is not enforced here. The model sees the tools and decides itself whether
    to call one, so that a reply without a call is the policy's own action.
    """
    forced = {"response_format"} if config.response_format is not None else set()
    return forced | (_MASKING & set(config.extensions or {}))


def chat_messages(request: lm15.Request) -> list[ChatMessage]:
    """The request as messages for ``tokenizer.apply_chat_template``: roles, texts, tool calls and their results.

    Raises:
        dspy.lm15.UnsupportedFeatureError: the request has media, stop strings or sampling that this engine cannot do.
    """
    refuse_reshaped_sampling(request)
    if request.config.stop:
        raise lm15.UnsupportedFeatureError("the in-process engine has no stop strings; use engine='vllm'")
    messages: list[ChatMessage] = []
    if request.system:
        system = request.system
        messages.append({"role": "system", "content": system if isinstance(system, str) else _text(system)})
    for message in request.messages:
        results = [part for part in message.parts if isinstance(part, lm15.ToolResultPart)]
        if results:
            messages += [{"role": "tool", "name": part.name, "content": _text(part.content)} for part in results]
        else:
            messages.append({"role": _ROLES.get(message.role, message.role), **_contents(message)})
    return messages


def _contents(message: lm15.Message) -> ChatMessage:
    """A message's text, thoughts and tool calls, under the names that chat templates read."""
    calls = [part for part in message.parts if isinstance(part, lm15.ToolCallPart)]
    thoughts = [part.text for part in message.parts if isinstance(part, lm15.ThinkingPart)]
    rest = [part for part in message.parts if not isinstance(part, lm15.ToolCallPart | lm15.ThinkingPart)]
    functions = [{"name": call.name, "arguments": dict(call.input)} for call in calls]
    return {
        "content": _text(rest),
        **({"reasoning_content": "\n".join(thoughts)} if thoughts else {}),
        **({"tool_calls": [{"type": "function", "function": function} for function in functions]} if functions else {}),
    }


def _text(parts: Sequence[object]) -> str:
    texts = [part.text for part in parts if isinstance(part, lm15.TextPart)]
    if len(texts) != len(parts):
        raise lm15.UnsupportedFeatureError("the in-process engine reads text messages only")
    return "\n".join(texts)


def chat_options(request: lm15.Request) -> dict[str, object]:
    """Further arguments of a chat template: the tools, and how much a reasoning model shall think."""
    tools = [
        {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
        for t in request.tools
        if isinstance(t, lm15.FunctionTool)
    ]
    reasoning = request.config.reasoning
    thinking: dict[str, object] = {}
    if reasoning is not None:  # under vLLM's names
        effort = "none" if reasoning.is_off else reasoning.effort
        thinking = {"enable_thinking": not reasoning.is_off, "reasoning_effort": effort}
    return {**({"tools": tools} if tools else {}), **thinking}


def text_response(
    model: str, text: str, finish_reason: str, prompt_tokens: int, completion_tokens: int
) -> lm15.Response:
    """A canonical response with one text part."""
    return lm15.Response(
        id=None,
        model=model,
        message=lm15.Message.assistant(text),
        finish_reason=finish_reason,
        usage=lm15.Usage(
            input_tokens=prompt_tokens,
            output_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        ),
    )
