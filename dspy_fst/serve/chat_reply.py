"""Replies of the chat endpoint, as OpenAI's clients read them. Other fields of a server's reply are dropped."""

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import BaseModel

from dspy_fst.engine.base import Completion


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CalledFunction(BaseModel):
    name: str
    arguments: str


class CalledTool(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    tool_calls: list[CalledTool] | None = None


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob] = []


class Logprobs(BaseModel):
    content: list[ChosenLogprob] | None = None


class Choice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: Logprobs | None = None
    finish_reason: str


class ChatReply(BaseModel):
    """A whole completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class DeltaFunction(BaseModel):
    name: str | None = None
    arguments: str | None = None


class DeltaTool(BaseModel):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: DeltaFunction | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[DeltaTool] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class ChatChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "dspy_fst"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


_ALWAYS = ("logprobs", "finish_reason")
"""Keys of a choice that OpenAI sends even when they are null."""


def reply_of(server: Mapping[str, object], name: str) -> dict[str, object]:
    """A server's whole reply under our model's name."""
    return _document(ChatReply.model_validate({**server, "model": name}), "message", ("content", "refusal"))


def chunk_of(server: Mapping[str, object], name: str) -> dict[str, object]:
    """A server's chunk under our model's name."""
    return _document(ChatChunk.model_validate({**server, "model": name}), "delta", ())


def completed(completion: Completion, name: str) -> dict[str, object]:
    """A reply of the engine in process."""
    read, sampled = len(completion.prompt_ids), len(completion.completion_ids)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": completion.response.text},
        "finish_reason": completion.finish_reason,
    }
    usage = {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
    return reply_of({**head, "choices": [choice], "usage": usage}, name)


def in_chunks(reply: Mapping[str, object], include_usage: bool) -> Iterator[dict[str, object]]:
    """A complete reply as the chunks of a stream: the role, the text in one piece, the end."""
    whole = ChatReply.model_validate(reply)
    (choice,) = whole.choices
    head = {"id": whole.id, "created": whole.created}
    deltas = [{"role": "assistant", "content": ""}, {"content": choice.message.content}]
    for delta in deltas:
        yield chunk_of({**head, "choices": [{"index": 0, "delta": delta}]}, whole.model)
    end = {"index": 0, "delta": {}, "finish_reason": choice.finish_reason}
    yield chunk_of({**head, "choices": [end]}, whole.model)
    if include_usage:
        yield chunk_of({**head, "choices": [], "usage": whole.usage}, whole.model)


def _document(reply: ChatReply | ChatChunk, part: str, kept: tuple[str, ...]) -> dict[str, object]:
    """The reply as JSON. Of empty keys only those that OpenAI sends are kept."""
    document = reply.model_dump(exclude_none=True)
    for choice in document["choices"]:
        choice.update({key: choice.get(key) for key in _ALWAYS})
        choice[part].update({key: choice[part].get(key) for key in kept})
    return document
