"""A reply of vLLM as it is sampled: its text in pieces, and then the exact tokens that a whole reply would have had.

lm15's own streams drop the ids of the sampled tokens, which training needs, so the server's chunks are read here
(vLLM 0.32: ``token_ids`` in each choice, ``prompt_token_ids`` in the first chunk).
"""

import json
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import httpx
from dspy.lm15 import Request

from dspy_fst.engine.base import Completion
from dspy_fst.engine.chat import text_response
from dspy_fst.engine.vllm.wire import FINISHED
from dspy_fst.errors import EngineError, NoAnswerError
from dspy_fst.types import WeightsVersion


def sse_chunks(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a reply of server-sent events, up to its ``[DONE]``.

    Raises:
        EngineError: the server told of an error instead of a chunk.
        NoAnswerError: the reply broke off.
    """
    try:
        for line in reply.iter_lines():
            name, _, data = line.partition(":")
            if name != "data" or not data.strip():
                continue
            if data.strip() == "[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                raise EngineError(f"vLLM failed in the middle of a reply: {chunk['error']}")
            yield chunk
        raise NoAnswerError("vLLM broke off a reply")
    except (httpx.HTTPError, ValueError) as error:
        raise NoAnswerError(f"vLLM broke off a reply: {error}") from error


def read_stream(
    chunks: Iterable[dict[str, Any]], request: Request, weights: WeightsVersion, *, scored: bool = True
) -> Generator[str, None, Completion]:
    """The pieces of a reply's text as they come; returns the reply with its tokens and log-probabilities.

    Args:
        chunks: As the server sends them, see `sse_chunks`.
        request: What was asked.
        weights: The version that samples.
        scored: Whether the reply is a sample to train on, so that log-probabilities were asked for. A reply that is
            only shown has none.

    Raises:
        NoAnswerError: the server broke the reply off.
        EngineError: ids or log-probabilities are missing or do not match; nothing is tokenized anew instead.
    """
    prompt_ids: list[int] = []
    ids: list[int] = []
    logprobs: list[float] = []
    pieces: list[str] = []
    finish_reason = None
    for chunk in chunks:
        prompt_ids = chunk.get("prompt_token_ids") or prompt_ids
        for choice in chunk["choices"]:
            ids += choice.get("token_ids") or []
            logprobs += [entry["logprob"] for entry in (choice.get("logprobs") or {}).get("content") or []]
            finish_reason = choice.get("finish_reason") or finish_reason
            if piece := choice["delta"].get("content"):
                pieces.append(piece)
                yield piece
    if finish_reason not in FINISHED:
        raise NoAnswerError(f"vLLM broke off a reply ({finish_reason!r}); its tokens are not a sample")
    if scored and (not prompt_ids or len(ids) != len(logprobs)):
        raise EngineError(
            f"vLLM streamed {len(prompt_ids)} ids of the prompt, {len(ids)} sampled ids and {len(logprobs)} "
            "log-probabilities; the reply cannot be trained on. It must be vLLM 0.32 or newer"
        )
    response = text_response(request.model, "".join(pieces), finish_reason, len(prompt_ids), len(ids))
    return Completion(response, tuple(prompt_ids), tuple(ids), tuple(logprobs), finish_reason, weights)
