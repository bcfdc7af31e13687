"""Request bodies: read, bounded and validated in a thread.

Contract: the cost of a body is bounded before it is validated, so that no body within the size limit blocks the event
loop or causes a long reply. Exactly what the schema at /openapi.json allows is accepted: a text is never converted to a
number.
"""

import math
import re
from collections.abc import Callable, Coroutine
from functools import partial, reduce
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json, to_json

from dspy_fst.serve.error_replies import ApiError, Fault
from dspy_fst.serve.worker import in_thread

MOST_DEEP = 64
"""Nesting levels of a body, and of JSON inside one of its strings; deeper nesting breaks recursive readers."""
SHOWN_FAULTS = 20
_LONGEST_WORD, _LONGEST_SENTENCE = 64, 200
"""Characters of a name and of a fault that an error shows; a caller may have chosen either."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_ABSENT = object()
M = TypeVar("M", bound=BaseModel)


class BodyRoute(APIRoute):
    """A route whose endpoint takes ``(body, request)``. It validates the body in a thread: the event loop stays free.

    A body that does not fit the model gets the status that the route documents: 422, or 400 as OpenAI answers.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[object, object, Response]]:
        assert self.body_field is not None
        model: type[BaseModel] = self.body_field.field_info.annotation  # type: ignore[assignment]
        status = 422 if 422 in self.responses else 400

        async def handle(request: Request) -> Response:
            most: int = request.app.state.service.settings.max_body_values
            _require_json(request.headers.get("content-type", ""), request.headers.get("content-encoding", ""))
            work = partial(read, await request.body(), model, most, status)
            response: Response = await self.endpoint(await in_thread(work, request.state.ticket), request)
            return response

        return handle


def read(body: bytes, model: type[M], most: int, status: int) -> M:
    """The body as a model.

    Args:
        most: The most values that it may hold. Every entry of every object and array counts.
        status: HTTP status of a body that does not fit the model.

    Raises:
        ApiError: the body is no JSON (400), holds too many values (400), or does not fit the model (``status``).
    """
    check_count(body, most)
    value = parsed(body)
    check_values(value)
    try:
        try:
            return model.model_validate_json(body, strict=True)
        except ValidationError as error:
            if not _wrote_whole_numbers(value, error):
                raise
            return model.model_validate_json(to_json(value), strict=True)
    except ValidationError as error:
        raise _misfit(error, value, status) from None


def _wrote_whole_numbers(value: object, error: ValidationError) -> bool:
    """Replace 5.0 by 5 where a whole number is expected, in place; return whether there was such a number.

    JSON Schema counts 5.0 as an integer, and strict validation does not.
    """
    changed = False
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        steps = _steps(fault, value)
        holder: Any = reduce(_entry, steps[:-1], value)
        number = _entry(holder, steps[-1]) if steps else None
        if fault["type"] == "int_type" and isinstance(number, float) and number.is_integer():
            holder[steps[-1]] = int(number)
            changed = True
    return changed


def parsed(text: bytes | str) -> object:
    """The value of a JSON text in UTF-8.

    Raises:
        ApiError: the text is not JSON or nests too deep. Half of a surrogate pair and NaN are not JSON either.
    """
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        if "recursion limit" in str(error):  # pydantic's own, of 200 levels
            raise _too_deep() from None
        raise ApiError(400, "invalid_json", f"The body is no JSON in UTF-8: {error}.") from None


def check_count(body: bytes, most: int) -> None:
    """Refuse a body that may hold more than ``most`` values, before any of them is created.

    Every entry of an object or array follows a comma or an opening bracket. Very many objects would also make Python's
    garbage collector stop all threads for seconds.

    Raises:
        ApiError: with what to change.
    """
    if _separators(body) > most and _separators(_STRING.sub(b"", body)) > most:
        message = f"The body holds more than {most} values (entries of arrays and objects); send less at once."
        raise ApiError(400, "too_many_values", message)


def _separators(body: bytes) -> int:
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def check_values(value: object) -> None:
    """Refuse a value that nests too deep, or holds a number beyond the range of a float.

    Raises:
        ApiError: with what to change.
    """
    level, depth = [value], 0
    while level:
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict | list):
                inner.extend(item.values() if isinstance(item, dict) else item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ApiError(400, "invalid_json", "The body holds a number that is out of range.")
        level = inner
        depth += bool(level)
        if depth > MOST_DEEP:
            raise _too_deep()


def _too_deep() -> ApiError:
    return ApiError(400, "too_deep", f"The body nests deeper than {MOST_DEEP} levels.")


def _require_json(content_type: str, encoding: str) -> None:
    """Refuse other media types: a web page may send those to a server on this machine without a CORS preflight.

    Raises:
        ApiError: the headers do not declare JSON, or declare a compressed body.
    """
    if encoding.strip().lower() not in ("", "identity"):
        message = "Send the body as it is, without the header 'Content-Encoding': nothing is unpacked here."
        raise ApiError(415, "unsupported_media_type", message)
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, "unsupported_media_type", "Send JSON, with the header 'Content-Type: application/json'.")


def _misfit(error: ValidationError, body: object, status: int) -> ApiError:
    """The error for a body that does not fit: its first faults, and how many there are."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    distinct = dict.fromkeys((_place(fault, body), _message(fault)) for fault in errors[:SHOWN_FAULTS])
    faults = [Fault(where=where, message=message) for where, message in distinct]
    first = f"{faults[0].where or 'the body'}: {faults[0].message}"
    more = f" ({len(errors)} faults in all; 'faults' lists the first)" if len(errors) > 1 else ""
    message = f"The body does not fit the schema at /openapi.json: {first}{more}"
    return ApiError(status, "invalid", message, param=faults[0].where or None, faults=faults)


def _place(fault: ErrorDetails, body: object) -> str:
    """Where a fault is, in names of the body. Pydantic's names of unions and validators are left out."""
    place = [str(step) for step in _steps(fault, body)]
    if fault["type"] == "missing":
        place.append(str(fault["loc"][-1]))
    return ".".join(step if len(step) <= _LONGEST_WORD else f"{step[:_LONGEST_WORD]}..." for step in place)


def _steps(fault: ErrorDetails, body: object) -> list[int | str]:
    """The keys and indices of the body that lead to a fault."""
    steps: list[int | str] = []
    here = body
    for step in fault["loc"]:
        if (inner := _entry(here, step)) is not _ABSENT:
            here = inner
            steps.append(step)
    return steps


def _entry(value: object, step: int | str) -> object:
    """What an array holds at this index, or an object under this key; `_ABSENT` where there is nothing."""
    if isinstance(value, list):
        return value[step] if isinstance(step, int) and step < len(value) else _ABSENT
    return value.get(step, _ABSENT) if isinstance(value, dict) else _ABSENT


def _message(fault: ErrorDetails) -> str:
    """Pydantic's message of a fault, without the caller's value."""
    if fault["type"] == "union_tag_invalid":
        return f"Input should be one of the kinds {fault['msg'].partition('expected tags: ')[2]}"
    return fault["msg"].removeprefix("Value error, ")[:_LONGEST_SENTENCE]
