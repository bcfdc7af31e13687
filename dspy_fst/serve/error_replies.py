"""Error replies: OpenAI's error body on every path, never a traceback or a secret."""

from collections.abc import Sequence
from typing import Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
]
CONTEXT_LENGTH = "context_length_exceeded"
"""The code by which the clients of OpenAI, LiteLLM and DSPy recognize a prompt that is too long."""
ENGINE = "engine"
_TYPES: dict[int, ErrorType] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LONGEST_NAME = 64
"""Characters of a caller's text that an error repeats."""


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    where: str
    """Place in the body, e.g. ``"messages.0.content"``; empty for the body as a whole."""
    message: str


class ErrorDetail(BaseModel):
    """OpenAI's error object, with the faults of a body added."""

    message: str
    type: ErrorType
    """OpenAI's name of the kind of error."""
    param: str | None = None
    """The wrong setting, if the error is about one."""
    code: str
    """One word for programs, e.g. ``"queue_full"``."""
    faults: list[Fault] = []
    """What is wrong with a body; the first faults if there are many."""


class ErrorReply(BaseModel):
    """The body of every error reply."""

    error: ErrorDetail


class ApiError(Exception):
    """A reply that is an error.

    Args:
        status: HTTP status.
        code: One word for programs, e.g. ``"queue_full"``.
        message: For people: what is wrong and what to do.
        param: The wrong setting.
        faults: Everything that is wrong with the body.
        headers: Extra HTTP headers.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        faults: Sequence[Fault] = (),
        headers: dict[str, str] | None = None,
    ):
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code, self.headers = status, code, headers or {}
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        detail = ErrorDetail(message=message, type=kind, param=param, code=code, faults=list(faults))
        self.reply = ErrorReply(error=detail)

    def response(self) -> JSONResponse:
        return JSONResponse(self.reply.model_dump(), self.status, headers=self.headers)


def internal_error() -> ApiError:
    """For an unexpected exception; the log has the traceback."""
    return ApiError(500, "internal", "The server failed on this request; its log says why.")


def engine_failed() -> ApiError:
    return ApiError(503, ENGINE, "The engine that runs the model failed; try again later.")


def context_exceeded(context: int | None, param: str) -> ApiError:
    """A prompt that is too long, in words that LiteLLM recognizes (its `is_error_str_context_window_exceeded`).

    Args:
        context: Tokens of the model's context; None where unknown.
        param: The part of the body that holds the prompt.
    """
    length = "shorter than this prompt" if context is None else f"{context} tokens"
    message = f"This model's maximum context length is {length}. The prompt leaves no room for a reply: shorten it."
    return ApiError(400, CONTEXT_LENGTH, message, param=param)


def quoted(word: str) -> str:
    """A text of the caller, quoted, and cut to what fits into a sentence."""
    return repr(word if len(word) <= _LONGEST_NAME else f"{word[:_LONGEST_NAME]}...")
