"""Between DSPy's canonical requests and the chat messages of a Hugging Face template."""

from dspy import lm15

_SAMPLING = {
    "top_p": "nucleus sampling",
    "top_k": "top-k sampling",
    "frequency_penalty": "a frequency penalty",
    "presence_penalty": "a presence penalty",
}


def refuse_reshaped_sampling(request: lm15.Request) -> None:
    """Refuse settings under which tokens are not drawn from softmax(logits / temperature).

    The trainer scores that distribution; anything else would silently bias every importance weight.

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


def chat_messages(request: lm15.Request) -> list[dict[str, str]]:
    """The request as ``{"role", "content"}`` messages for ``tokenizer.apply_chat_template``.

    Raises:
        dspy.lm15.UnsupportedFeatureError: the request has tools, media or sampling that this engine cannot do.
    """
    refuse_reshaped_sampling(request)
    if request.tools or request.config.stop or request.config.response_format:
        raise lm15.UnsupportedFeatureError(
            "the in-process engine has no native tools, stop strings or response formats; use engine='vllm' "
            "or dspy.ChatAdapter"
        )
    messages = []
    if request.system:
        system = request.system
        content = system if isinstance(system, str) else "\n".join(part.text for part in system)
        messages.append({"role": "system", "content": content})
    for message in request.messages:
        if message.text is None:
            raise lm15.UnsupportedFeatureError("the in-process engine reads text messages only")
        messages.append({"role": message.role, "content": message.text})
    return messages


def text_response(
    model: str, text: str, finish_reason: str, prompt_tokens: int, completion_tokens: int
) -> lm15.Response:
    """A canonical response that holds one text."""
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
