"""What a request to vLLM's chat endpoint must say, and what of its replies is believed (vLLM 0.32)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dspy.lm15 import Request, Response, ToolChoice, UnsupportedFeatureError

from dspy_fst.engine.base import Completion
from dspy_fst.engine.chat import refuse_reshaped_sampling
from dspy_fst.errors import EngineError, NoAnswerError
from dspy_fst.types import WeightsVersion

# The training loss scores the whole softmax, so a truncated one would be another policy. Every request says
# so, for a server that somebody else launched may take defaults from generation_config.json.
RESHAPING: Mapping[str, Any] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
FINISHED = {"stop", "length", "tool_calls"}
"""Reasons for which a reply is whole; any other means that it was broken off."""


def pinned(request: Request, *, model: str, seed: int) -> Request:
    """The request as it is sent: exact ids and log-probabilities, sampled from softmax(logits / temperature).

    Raises:
        dspy.lm15.UnsupportedFeatureError: it asks for another distribution, which training would not score.
    """
    refuse_reshaped_sampling(request)
    config = request.config
    asked = dict(config.extensions or {})
    if reshaping := sorted(name for name in asked if name in RESHAPING and asked[name] != RESHAPING[name]):
        raise UnsupportedFeatureError(f"{', '.join(reshaping)}: not what training scores; remove it from the LM")
    pins = replace(
        config,
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0,
        top_k=None,  # not a field of this wire
        # Shown to the model all the same; "auto" needs a parser of the server's, which may force the form of a call.
        tool_choice=ToolChoice(mode="none") if request.tools else None,
        seed=seed,
        logprobs=config.logprobs or 0,
        extensions={**asked, **RESHAPING, "return_token_ids": True},
    )
    return replace(request, model=model, config=pins)


def read_completion(response: Response, weights: WeightsVersion, *, keep_logprobs: bool = False) -> Completion:
    """The exact tokens of a reply.

    Args:
        response: As lm15 read it, provider data included.
        weights: The version that sampled it.
        keep_logprobs: Whether the caller had asked for log-probabilities in the response itself.

    Raises:
        NoAnswerError: the server broke the reply off.
        EngineError: ids or log-probabilities are missing or do not match; nothing is re-tokenized instead.
    """
    data = response.provider_data or {}
    choice = (data.get("choices") or [{}])[0]
    prompt_ids, completion_ids = data.get("prompt_token_ids"), choice.get("token_ids")
    # lm15 reads every reason that it does not know, "abort" among them, as a finished reply.
    finish_reason = choice.get("finish_reason")
    if finish_reason not in FINISHED:
        raise NoAnswerError(f"vLLM broke off a reply ({finish_reason!r}); its tokens are not a sample")
    if not prompt_ids or completion_ids is None:
        raise EngineError(
            "vLLM returned no token ids: the server ignores return_token_ids. It must be vLLM 0.32 or newer"
        )
    logprobs = tuple(entry.logprob for entry in response.logprobs or ())
    if len(logprobs) != len(completion_ids):
        raise EngineError(
            f"vLLM returned {len(completion_ids)} sampled ids but {len(logprobs)} log-probabilities; "
            "the reply cannot be trained on"
        )
    shown = replace(response, provider_data=None, logprobs=response.logprobs if keep_logprobs else None)
    return Completion(
        response=shown,
        prompt_ids=tuple(prompt_ids),
        completion_ids=tuple(completion_ids),
        logprobs=logprobs,
        finish_reason=finish_reason,
        weights=weights,
    )


def read_scores(choice: Mapping[str, Any], sequence: Sequence[int]) -> list[float]:
    """Log-probability of each token but the first, from one choice of a /v1/completions reply.

    Raises:
        EngineError: the choice does not score this sequence.
    """
    entries = choice.get("prompt_logprobs")
    if not entries or len(entries) != len(sequence):
        raise EngineError(f"vLLM scored {len(entries or ())} of {len(sequence)} tokens of a sequence")
    try:
        return [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], sequence[1:], strict=True)]
    except KeyError as error:
        raise EngineError(f"vLLM scored other tokens than it was given: token {error} is missing") from error
