"""`create_app`: a compiled program as a typed HTTP service.

POST /v1/program             the program: inputs to outputs
POST /v1/program/stream      the same, telling on the way what each module says (not when candidates vote)
POST /v1/chat/completions    the trained model itself; GET /v1/models names it
GET  /health /ready          alive; able to answer
GET  /metrics                Prometheus
GET  /docs /openapi.json     what the program takes and gives
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import dspy
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException

from dspy_fst.serve.chat import Chat, ChatRequest
from dspy_fst.serve.errors import ApiError, ErrorReply, Fault
from dspy_fst.serve.events import EventStream, Feed
from dspy_fst.serve.limits import Limits
from dspy_fst.serve.metrics import CONTENT_TYPE
from dspy_fst.serve.service import SEED_BITS, Meta, Service
from dspy_fst.serve.settings import CHAT, DOCS_FILES, HEALTH, METRICS, MODELS, READY, ServeSettings

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The request cannot be done."},
    401: {"model": ErrorReply, "description": "The key is missing or wrong."},
    413: {"model": ErrorReply, "description": "The body is too large."},
    422: {"model": ErrorReply, "description": "The body does not fit the schema; `faults` say where."},
    429: {"model": ErrorReply, "description": "The line is full; see Retry-After."},
    500: {"model": ErrorReply, "description": "The program failed."},
    502: {"model": ErrorReply, "description": "A model's reply could not be used."},
    503: {"model": ErrorReply, "description": "Not ready, ending, or the engine failed."},
    504: {"model": ErrorReply, "description": "There was no answer in time."},
}
_EVENTS = """Server-sent events, in this order:

- `start`: `{"tokens": bool}`, whether `delta` events will come; they do where the engine is a vLLM server.
- `delta`: `{"module", "field", "text"}`, a piece of an output field of the last module as the model writes it.
- `module`: `{"module", "outputs"}`, a module has finished.
- `result`: what the endpoint without `/stream` gives. It counts, whatever the pieces before it were.
- `error`: the body of an error, instead of a result.
"""


def create_app(program: dspy.Module, settings: ServeSettings | None = None) -> FastAPI:
    """An app that serves a compiled program; its lifespan starts the program's engine and releases it.

    `dspy_fst.serve.run.serve` runs it. Under another ASGI server all works but the drain of SIGTERM.

    Args:
        program: What FSTOptimizer.compile or dspy_fst.load gave back; it is not changed.

    Raises:
        ConfigurationError: the program cannot be served with these settings; names every reason.
    """
    settings = settings or ServeSettings()
    service = Service(program, settings)
    app = FastAPIOffline(  # FastAPI's own page of the docs loads its script from somebody else's server
        title=service.name,
        description="A DSPy program, compiled by dspy_fst.",
        lifespan=_lifespan,
        redoc_url=None,
        static_url=DOCS_FILES,
    )
    app.state.service = service
    router = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False))] if settings.api_key else [])
    _add_program(router, service)
    _add_chat(router, service)
    _add_state(app, router, service)
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_middleware(
        Limits,
        settings=settings,
        gate=service.gate,
        metrics=service.metrics,
        work=(settings.path, settings.stream_path, CHAT),
        not_ready=service.not_ready,
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    starting = asyncio.create_task(service.start())
    try:
        yield
    finally:
        await service.release()
        await starting


def _add_program(router: APIRouter, service: Service) -> None:
    settings = service.settings
    request_model, reply_model = _models(service)

    async def answer(body: request_model, request: Request) -> Response:  # type: ignore[valid-type]
        given = await service.answer(body.inputs, body.seed, request.state.ticket)  # type: ignore[attr-defined]
        reply = reply_model(outputs=given.outputs, meta=given.meta)
        return Response(reply.model_dump_json(), media_type="application/json")

    async def tell(body: request_model, request: Request) -> Response:  # type: ignore[valid-type]
        feed = Feed()
        return EventStream(feed.listen(service.tell(body.inputs, body.seed, request.state.ticket, feed)))  # type: ignore[attr-defined]

    router.add_api_route(
        settings.path,
        answer,
        methods=["POST"],
        response_model=reply_model,
        responses=_REFUSALS,
        summary=f"Ask {service.name}",
    )
    if settings.choice == "vote":
        return  # nobody is heard before all have spoken
    stream = {"description": "Events; see above.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    router.add_api_route(
        settings.stream_path,
        tell,
        methods=["POST"],
        response_class=StreamingResponse,
        responses={**_REFUSALS, 200: stream},
        summary=f"Ask {service.name} and listen",
        description=_EVENTS,
    )


def _models(service: Service) -> tuple[type[BaseModel], type[BaseModel]]:
    told = "The same seed draws the same answer, up to the server's batching."
    request = create_model(
        "ProgramRequest",
        __config__=ConfigDict(extra="forbid"),
        inputs=(service.schema.inputs, ...),
        seed=(int | None, Field(None, ge=0, lt=2**SEED_BITS, description=told)),
    )
    return request, create_model("ProgramReply", outputs=(service.schema.outputs, ...), meta=(Meta, ...))


def _add_chat(router: APIRouter, service: Service) -> None:
    chat = Chat(service.settings.model_name, service.policy, service.engine, service.upstream, service.metrics)

    @router.post(CHAT, responses=_REFUSALS, response_model=None, summary="Ask the trained model")
    async def complete(body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions, as far as the engine goes."""
        reply = await chat.answer(body, request.state.ticket)
        return reply if isinstance(reply, EventStream) else JSONResponse(reply)

    @router.get(MODELS, responses={401: _REFUSALS[401]}, summary="Name the trained model")
    async def models() -> dict[str, Any]:
        model = {"id": chat.name, "object": "model", "created": 0, "owned_by": "dspy_fst"}
        return {"object": "list", "data": [model]}


def _add_state(app: FastAPI, router: APIRouter, service: Service) -> None:
    @app.get(HEALTH, summary="Alive")
    async def health() -> dict[str, bool]:
        return {"alive": True}

    @app.get(READY, responses={503: _REFUSALS[503]}, summary="Able to answer")
    async def ready() -> dict[str, str]:
        """The version of the weights that answer."""
        if service.gate.draining:
            raise ApiError(503, "draining", "The server is ending.")
        if (reason := service.not_ready()) is not None:
            raise ApiError(503, "not_ready", reason)
        return {"weights": str(service.engine.weights)}

    @router.get(METRICS, response_class=Response, responses={401: _REFUSALS[401]}, summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)


async def _refuse(request: Request, error: Exception) -> NoReturn:
    """The frameworks' own errors in our shape; the middleware sends them."""
    if isinstance(error, RequestValidationError):
        # Without the values: they may be long, or secret.
        if any(fault["type"] == "json_invalid" for fault in error.errors()):
            raise ApiError(422, "invalid", "The body is no JSON.") from None
        faults = [Fault(where=".".join(map(str, fault["loc"][1:])), message=fault["msg"]) for fault in error.errors()]
        raise ApiError(422, "invalid", "The body does not fit the schema at /openapi.json.", faults=faults) from None
    assert isinstance(error, HTTPException)
    types = {404: "not_found", 405: "method_not_allowed"}
    raise ApiError(
        error.status_code,
        types.get(error.status_code, "invalid"),
        str(error.detail),
        headers=dict(error.headers or {}),
    ) from None
