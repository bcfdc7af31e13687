"""Reads a streamed reply of vLLM: its text piece by piece, then the exact tokens, as in a whole reply.

lm15's own streams drop the ids of the sampled tokens, which training needs. The server's chunks are therefore read here
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
        EngineError: the server sent an error instead of a chunk.
        NoAnswerError: the reply was cut off.
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
    """Yield the pieces of a reply's text as they come; return the reply with its tokens and log-probabilities.

    Args:
        chunks: The server's chunks, see `sse_chunks`.
        request: The request.
        weights: The version that samples the reply.
        scored: Whether log-probabilities were requested, because the reply may be trained on.

    Raises:
        NoAnswerError: the server cut the reply off.
        EngineError: ids or log-probabilities are missing or do not match. The text is never tokenized instead.
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
