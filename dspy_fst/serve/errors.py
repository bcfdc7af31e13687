"""What a caller is told when something goes wrong: always the same shape, never a traceback or a secret."""

from collections.abc import Sequence

from fastapi.responses import JSONResponse
from pydantic import BaseModel


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    where: str
    message: str


class ErrorDetail(BaseModel):
    type: str
    message: str
    faults: list[Fault] = []


class ErrorReply(BaseModel):
    """The body of every reply that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """A reply that is an error.

    Args:
        status: Of HTTP.
        type: One word for programs, e.g. ``"queue_full"``.
        message: One sentence for people: what is wrong and what to do.
        faults: Of the request, one by one.
        headers: To be sent along.
    """

    def __init__(
        self,
        status: int,
        type: str,
        message: str,
        *,
        faults: Sequence[Fault] = (),
        headers: dict[str, str] | None = None,
    ):
        super().__init__(f"{status} {type}: {message}")
        self.status, self.type, self.headers = status, type, headers or {}
        self.reply = ErrorReply(error=ErrorDetail(type=type, message=message, faults=list(faults)))

    def response(self) -> JSONResponse:
        return JSONResponse(self.reply.model_dump(), self.status, headers=self.headers)


def internal_error() -> ApiError:
    """For what nobody foresaw; the log has the traceback."""
    return ApiError(500, "internal", "The server failed on this request; its log says why.")
