"""`create_app`: a compiled program as a typed HTTP service.

POST /v1/program             the program: inputs to outputs
POST /v1/program/stream      the same, with events for what each module says (not with choice="vote")
POST /v1/chat/completions    the trained model itself; GET /v1/models and /v1/models/NAME name it
GET  /health /ready          whether the process is alive; whether it can answer
GET  /metrics                Prometheus
GET  /docs /openapi.json     the schema of the program's inputs and outputs

HEAD is answered wherever GET is.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import dspy
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException

from dspy_fst.serve.body import BodyRoute
from dspy_fst.serve.chat_models import ChatModels
from dspy_fst.serve.chat_reply import ChatReply, ModelCard, ModelList
from dspy_fst.serve.chat_request import ChatRequest
from dspy_fst.serve.error_replies import ApiError
from dspy_fst.serve.events import EventStream, Feed
from dspy_fst.serve.limits import Limits
from dspy_fst.serve.openapi import (
    EVENTS,
    Responses,
    chat_responses,
    complete_document,
    program_events,
    program_responses,
    refusals,
)
from dspy_fst.serve.prometheus import CONTENT_TYPE
from dspy_fst.serve.service import SEED_BITS, Meta, Service
from dspy_fst.serve.serving_settings import CHAT, DOCS_FILES, HEALTH, METRICS, MODELS, READY, ServeSettings


def create_app(program: dspy.Module, settings: ServeSettings | None = None) -> FastAPI:
    """An app that serves a compiled program. Its lifespan starts and releases the program's engine.

    `dspy_fst.serve.listening.serve` runs it. Under another ASGI server everything works but the drain at SIGTERM.

    Args:
        program: Returned by FSTOptimizer.compile or dspy_fst.load; it is not changed.

    Raises:
        ConfigurationError: the program cannot be served with these settings; every reason is named.
    """
    settings = settings or ServeSettings()
    service = Service(program, settings)
    app = FastAPIOffline(  # FastAPI's own docs page loads its script from another server
        title=service.name,
        description="A DSPy program, compiled by dspy_fst.",
        lifespan=_lifespan,
        redoc_url=None,
        static_url=DOCS_FILES,
        redirect_slashes=False,  # a redirect would contain the Host that the caller sends
    )
    app.state.service = service
    router = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False))] if settings.api_key else [])
    _add_program(router, service)
    _add_chat(router, service)
    _add_state(app, router, service)
    app.include_router(router)
    complete_document(app, CHAT, list(service.models))
    app.add_exception_handler(HTTPException, _refuse)
    app.add_middleware(
        Limits,
        settings=settings,
        queue=service.queue,
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
        responses=program_responses(),
        route_class_override=BodyRoute,
        summary=f"Ask {service.name}",
    )
    if settings.choice == "vote":
        return  # there is no answer to stream before every candidate has answered
    router.add_api_route(
        settings.stream_path,
        tell,
        methods=["POST"],
        response_class=StreamingResponse,
        responses=program_events(reply_model.__name__),
        route_class_override=BodyRoute,
        summary=f"Ask {service.name} and listen",
        description=EVENTS,
    )


def _models(service: Service) -> tuple[type[BaseModel], type[BaseModel]]:
    description = "The same seed draws the same answer, up to the server's batching."
    request = create_model(
        "ProgramRequest",
        __config__=ConfigDict(extra="forbid"),
        inputs=(service.schema.inputs, ...),
        seed=(int | None, Field(None, ge=0, lt=2**SEED_BITS, description=description)),
    )
    return request, create_model("ProgramReply", outputs=(service.schema.outputs, ...), meta=(Meta, ...))


def _add_chat(router: APIRouter, service: Service) -> None:
    models = ChatModels(service.chats())

    async def complete(body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions, as far as the engine supports them."""
        reply = await models.of(body.model).answer(body, request.state.ticket)
        return reply if isinstance(reply, EventStream) else JSONResponse(reply)

    router.add_api_route(
        CHAT,
        complete,
        methods=["POST"],
        response_model=None,
        responses=chat_responses(ChatReply),
        route_class_override=BodyRoute,
        summary="Ask the trained model",
    )

    @router.get(MODELS, responses=refusals(401, 403), summary="Name the trained models")
    async def listed() -> ModelList:
        return ModelList(data=models.cards())

    @router.get(f"{MODELS}/{{name:path}}", responses=refusals(401, 403, 404), summary="The model of a name")
    async def model(name: str) -> ModelCard:
        return ModelCard(id=models.of(name).name)


def _add_state(app: FastAPI, router: APIRouter, service: Service) -> None:
    @app.get(HEALTH, summary="Alive")
    async def health() -> dict[str, bool]:
        return {"alive": True}

    @app.get(READY, responses=refusals(503), summary="Able to answer")
    async def ready() -> dict[str, str]:
        """The version of the weights that answer."""
        if service.queue.draining:
            raise ApiError(503, "draining", "The server is ending.")
        if (reason := service.not_ready()) is not None:
            raise ApiError(503, "not_ready", reason)
        return {"weights": str(service.engine.weights)}

    page: Responses = {200: {"content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}}

    @router.get(
        METRICS, response_class=Response, responses={**page, **refusals(401, 403)}, summary="Figures for Prometheus"
    )
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)


async def _refuse(request: Request, error: Exception) -> NoReturn:
    """Turn Starlette's own errors into ours; the middleware sends them."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    raise ApiError(
        error.status_code,
        codes.get(error.status_code, "invalid"),
        str(error.detail),
        headers=dict(error.headers or {}),
    ) from None
