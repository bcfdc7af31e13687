"""Adds a reply's log-probabilities to its response, for callers that want them (``policy("...", logprobs=True)``)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dspy import lm15

from dspy_fst.engine.base import Completion


def with_logprobs(
    completion: Completion, tokens: Sequence[str], likeliest: Sequence[Mapping[str, float] | None] = ()
) -> Completion:
    """The completion, with a log-probability entry in its response for every sampled token, the last one included.

    Args:
        completion: The completion.
        tokens: Text of each sampled token.
        likeliest: For each sampled token, the likeliest alternatives at its position and their log-probabilities in
            nats; empty if the caller did not ask for them.
    """
    entries = tuple(
        lm15.TokenLogprob(token=text, logprob=logprob, bytes=_bytes(text), token_id=number, top=_ranked(others))
        for text, logprob, number, others in zip(
            tokens,
            completion.logprobs,
            completion.completion_ids,
            likeliest or [None] * len(tokens),
            strict=True,
        )
    )
    return replace(completion, response=replace(completion.response, logprobs=entries))


def _ranked(others: Mapping[str, float] | None) -> tuple[lm15.TopLogprob, ...]:
    ranked = sorted((others or {}).items(), key=lambda entry: -entry[1])
    return tuple(lm15.TopLogprob(token=text, logprob=logprob, bytes=_bytes(text)) for text, logprob in ranked)


def _bytes(text: str) -> tuple[int, ...]:
    return tuple(text.encode("utf-8", "replace"))
