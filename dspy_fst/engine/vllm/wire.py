"""Requests to vLLM's endpoints, and checks of its replies (vLLM 0.32)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict, cast

import httpx
from dspy.lm15 import Request, Response, ToolChoice, UnsupportedFeatureError

from dspy_fst.engine.base import Completion, Holding, refuse_reshaped_sampling
from dspy_fst.engine.chat import text_response
from dspy_fst.engine.replies import with_logprobs
from dspy_fst.errors import EngineError, NoAnswerError, ServerReplacedError
from dspy_fst.types import WeightsVersion

# The training loss scores the whole softmax, so sampling from a truncated one would be another policy. Every request
# sets these, because a server that somebody else launched may take its defaults from generation_config.json.
RESHAPING: Mapping[str, float] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
PROCESS = "x-dspy-fst-process"
"""Header that names the process of a server; see `served/dspy_fst_rows.py`."""
TRANSFER = ("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update")
"""Endpoints of vLLM's weight transfer."""
ABSENT = (404, 405)
"""Statuses of an endpoint that the server lacks."""
GATEWAY = (408, 429, 502, 503, 504)
"""Statuses that say nothing of a request: a gateway's limits, and its words for a server that it does not reach."""
FINISHED = {"stop", "length", "tool_calls"}
"""Finish reasons of a complete reply; any other means that the reply was cut off."""


class ServedChoice(TypedDict, total=False):
    """One choice of a chat completion, as far as it is read here."""

    token_ids: list[int] | None
    finish_reason: str | None


class ServedReply(TypedDict, total=False):
    """A chat completion, as far as it is read here."""

    choices: list[ServedChoice] | None
    prompt_token_ids: list[int] | None


class ScoredPrompt(TypedDict, total=False):
    """One choice of a /v1/completions reply to a scoring request, as far as it is read here."""

    prompt_logprobs: list[dict[str, dict[str, float]]] | None
    """For each token: id -> ``{"logprob": nats, ...}``. vLLM writes null for the first token."""


def pinned(request: Request, *, model: str, seed: int) -> Request:
    """The request as it is sent: sampled from softmax(logits / temperature), with exact ids and log-probabilities.

    Args:
        request: The caller's request.
        model: Name under which the server serves the model.
        seed: Seed of the sample.

    Raises:
        dspy.lm15.UnsupportedFeatureError: it asks for another distribution, which training would not score.
    """
    refuse_reshaped_sampling(request)
    config = request.config
    extensions = dict(config.extensions or {})
    if reshaping := sorted(name for name in extensions if extensions[name] != RESHAPING.get(name, extensions[name])):
        raise UnsupportedFeatureError(f"{', '.join(reshaping)}: not what training scores; remove it from the LM")
    pins = replace(
        config,
        temperature=1.0 if config.temperature is None else config.temperature,
        top_p=1.0,
        top_k=None,  # sent as an extension
        # The model sees the tools nevertheless. "auto" needs a parser in the server, which may force a call's form.
        tool_choice=ToolChoice(mode="none") if request.tools else None,
        seed=seed,
        logprobs=config.logprobs or 0,
        extensions={**extensions, **RESHAPING, "return_token_ids": True},
    )
    return replace(request, model=model, config=pins)


def read_completion(response: Response, weights: WeightsVersion, *, keep_logprobs: bool = False) -> Completion:
    """A reply with its exact tokens.

    Args:
        response: The response as lm15 read it, provider data included.
        weights: The version that sampled it.
        keep_logprobs: Whether the caller asked for log-probabilities in the response itself.

    Raises:
        NoAnswerError: the server cut the reply off.
        EngineError: ids or log-probabilities are missing or do not match. The text is never tokenized instead.
    """
    data = cast(ServedReply, response.provider_data or {})
    choice = (data.get("choices") or [{}])[0]
    prompt_ids, completion_ids = data.get("prompt_token_ids"), choice.get("token_ids")
    # lm15 reads every finish reason that it does not know, such as "abort", as a complete reply.
    finish_reason = _whole(choice.get("finish_reason"))
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
    stripped = replace(response, provider_data=None, logprobs=response.logprobs if keep_logprobs else None)
    return Completion(
        response=stripped,
        prompt_ids=tuple(prompt_ids),
        completion_ids=tuple(completion_ids),
        logprobs=logprobs,
        finish_reason=finish_reason,
        weights=weights,
    )


def asked_after(prompt_ids: Sequence[int], request: Request) -> dict[str, object]:
    """The body for /v1/completions that asks for one reply to exactly these prompt ids; the request is `pinned`."""
    config = request.config
    return {
        **(config.extensions or {}),
        "model": request.model,
        "prompt": list(prompt_ids),
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "seed": config.seed,
        "logprobs": config.logprobs,
    }


class ServedText(TypedDict, total=False):
    """One choice of a /v1/completions reply to `asked_after`, as far as it is read here."""

    text: str
    token_ids: list[int] | None
    prompt_token_ids: list[int] | None
    finish_reason: str | None
    logprobs: dict[str, list[Any]] | None


def read_after(
    prompt_ids: Sequence[int], choice: ServedText, request: Request, weights: WeightsVersion, *, keep_logprobs: bool
) -> Completion:
    """The reply to `asked_after`; see `read_completion`."""
    scored = choice.get("logprobs") or {}
    ids, logprobs = choice.get("token_ids") or (), scored.get("token_logprobs") or ()
    completion = exact(
        request.model, prompt_ids, ids, logprobs, choice.get("text") or "", choice.get("finish_reason"), weights
    )
    if choice.get("prompt_token_ids") != list(prompt_ids):
        raise EngineError("vLLM sampled after other ids than it was given")
    if not keep_logprobs:
        return completion
    return with_logprobs(completion, scored["tokens"], scored["top_logprobs"] if request.config.logprobs else ())


def exact(
    model: str,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    logprobs: Sequence[float],
    text: str,
    finish_reason: str | None,
    weights: WeightsVersion,
) -> Completion:
    """A reply of plain text with its tokens.

    Raises:
        NoAnswerError: the server cut the reply off.
        EngineError: there is not one log-probability for each id.
    """
    reason = _whole(finish_reason)
    if len(ids) != len(logprobs):
        raise EngineError(f"vLLM returned {len(ids)} sampled ids but {len(logprobs)} log-probabilities")
    response = text_response(model, text, reason, len(prompt_ids), len(ids))
    return Completion(response, tuple(prompt_ids), tuple(ids), tuple(logprobs), reason, weights)


def _whole(finish_reason: str | None) -> str:
    """The finish reason of a reply that the server did not cut off."""
    if finish_reason is None or finish_reason not in FINISHED:
        raise NoAnswerError(f"vLLM broke off a reply ({finish_reason!r}); its tokens are not a sample")
    return finish_reason


def read_scores(choice: ScoredPrompt, sequence: Sequence[int]) -> list[float]:
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


class WorkerAnswer(TypedDict):
    """What one worker found when it compared the weights in use with a folder's; see `served/`."""

    digests: dict[str, str]
    wrong: dict[str, str]
    dtype: str


def read_holding(workers: Sequence[WorkerAnswer]) -> Holding:
    """The answers of all workers to one comparison. Each has a part of the model, and reads the whole folder."""
    wrong = {name: how for worker in workers for name, how in worker["wrong"].items()}
    return Holding(workers[0]["digests"], wrong, workers[0]["dtype"])


def require_asked_process(other: str | None, what: str) -> None:
    """
    Args:
        other: `PROCESS` of an answer that is no success.
        what: Was asked, e.g. ``"POST http://127.0.0.1:8000/pause"``.

    Raises:
        ServerReplacedError: another process of the server answers than the one that was asked.
    """
    if other is not None:
        raise ServerReplacedError(f"{what}: the server was started anew since it got its weights")


def require_success(reply: httpx.Response, what: str, *, refused: bool = False) -> None:
    """Raise an error for any answer but success.

    Args:
        refused: Whether a server error is known to be a refusal: the server is healthy, and asking again is useless.

    Raises:
        ServerReplacedError: another process of the server answers than the one that was asked.
        NoAnswerError: a server error or a gateway's limit, after which asking again may help.
        EngineError: any other answer.
    """
    if reply.is_success:
        return
    require_asked_process(reply.headers.get(PROCESS), what)
    hint = " Is the API key right?" if reply.status_code == 401 else ""
    if refused:
        raise EngineError(
            f"{what} answered {reply.status_code}, and the server is well, so it refused: {_reason(reply)}"
        )
    kind = NoAnswerError if reply.is_server_error or reply.status_code in GATEWAY else EngineError
    raise kind(f"{what} answered {reply.status_code}: {_reason(reply)}{hint}")


def said(reply: httpx.Response) -> Any:
    """What a successful answer says.

    Raises:
        NoAnswerError: it is no JSON, but a gateway's page, or cut off where nothing tells its length.
    """
    try:
        return reply.json()
    except ValueError as error:
        raise NoAnswerError(f"{reply.request.url} answered what is no JSON: {reply.text[:200]!r}") from error


def _reason(reply: httpx.Response) -> str:
    """The server's explanation of an error: vLLM's message if there is one, else the body."""
    try:
        error = reply.json()["error"]
        return str(error["message"] if isinstance(error, Mapping) else error)[:500]
    except (ValueError, KeyError, TypeError):
        return reply.text[:500]
