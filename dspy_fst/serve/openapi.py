"""Additions to /openapi.json: error replies and event streams. Untrue entries of FastAPI are removed."""

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dspy_fst.serve.chat_reply import ChatChunk
from dspy_fst.serve.error_replies import ErrorReply

Responses = dict[int | str, dict[str, object]]
_MODELS = "#/components/schemas/{model}"
_DESCRIPTIONS = {
    400: "The request cannot be done, or its body is no JSON.",
    401: "The key is missing or wrong.",
    403: "A server without a key answers to localhost only.",
    404: "There is no model of that name.",
    413: "The body is too large.",
    415: "The body is not said to be JSON, or is packed (`Content-Encoding`).",
    422: "The body does not fit the schema; `faults` say where.",
    429: "The line is full; see Retry-After.",
    500: "The program failed.",
    502: "A model's reply could not be used.",
    503: "Not ready, ending, or the engine failed.",
    504: "There was no answer in time.",
}
_ASKED = (400, 401, 403, 413, 415, 429, 500, 502, 503, 504)
EVENTS = """Server-sent events, in this order; the data of each is a JSON object:

- `start`: `{"tokens": bool}`, whether `delta` events will come; they do where the engine is a vLLM server.
- `delta`: `{"module", "field", "text"}`, a piece of an output field of the last module as the model writes it.
- `module`: `{"module", "outputs"}`, a module has finished.
- `result`: what the endpoint without `/stream` gives. It counts, whatever the pieces before it were.
- `error`: the body of an error, instead of a result.
"""


def refusals(*statuses: int) -> Responses:
    """Error replies of these statuses; all have the same body."""
    return {status: {"model": ErrorReply, "description": _DESCRIPTIONS[status]} for status in statuses}


def program_responses() -> Responses:
    return refusals(*_ASKED, 422)


def program_events(reply: str) -> Responses:
    """As `program_responses`, with a stream that ends with the reply model of this name."""
    properties = {
        "start": {"tokens": {"type": "boolean"}},
        "delta": {name: {"type": "string"} for name in ("module", "field", "text")},
        "module": {"module": {"type": "string"}, "outputs": {"type": "object"}},
    }
    kinds: dict[str, dict[str, object]] = {
        name: {"type": "object", "properties": fields, "required": list(fields)} for name, fields in properties.items()
    }
    kinds |= {"result": _ref(reply), "error": _ref("ErrorReply")}
    event = {"oneOf": [_event(data, name) for name, data in kinds.items()]}
    stream: dict[str, object] = {
        "description": "Events; see above.",
        "content": {"text/event-stream": {"schema": event}},
    }
    return {**program_responses(), 200: stream}


def chat_responses(reply: type[BaseModel]) -> Responses:
    stream = {"text/event-stream": {"schema": _event(_ref("ChatChunk"))}}
    whole = {"model": reply, "description": "A completion, or its chunks where `stream` is true.", "content": stream}
    return {**refusals(*_ASKED, 404), 200: whole}


def complete_document(app: FastAPI, chat: str, models: list[str]) -> None:
    """Add to the app's document what FastAPI does not find, and remove what it assumes about every body.

    Args:
        chat: Path of the chat endpoint, which answers an invalid body with 400 as OpenAI does, not with 422.
        models: The model names that the chat endpoint accepts.
    """
    original = app.openapi

    def openapi() -> dict[str, object]:
        document = original()
        _, chunk = models_json_schema([(ChatChunk, "serialization")], ref_template=_MODELS)
        schemas = document["components"]["schemas"]
        schemas.update(chunk["$defs"])
        schemas["ChatRequest"]["properties"]["model"]["enum"] = models
        document["paths"][chat]["post"]["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _event(data: dict[str, object], name: str | None = None) -> dict[str, object]:
    """One server-sent event, as FastAPI describes it."""
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": data}
    properties = {"data": text} if name is None else {"event": {"const": name}, "data": text}
    return {"type": "object", "properties": properties, "required": list(properties)}


def _ref(model: str) -> dict[str, object]:
    return {"$ref": _MODELS.format(model=model)}
