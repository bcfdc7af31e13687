"""Runs the program for one request: in its own thread, on its own copy, with its own DSPy context.

Two runs share nothing but the engine, so answers cannot mix.
"""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import dspy
from dspy.utils.exceptions import AdapterParseError, ContextWindowExceededError, LMError
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from dspy_fst.engine.call_threads import Threads
from dspy_fst.errors import EngineError
from dspy_fst.rollout.call_recorder import SETTING, Recording
from dspy_fst.rollout.copying import Copier
from dspy_fst.serve.admission import Ticket
from dspy_fst.serve.error_replies import CONTEXT_LENGTH, ApiError, engine_failed
from dspy_fst.serve.events import ListenerGoneError

logger = logging.getLogger(__name__)
T = TypeVar("T")
_SHOWN = 500
"""Characters of an error that the log shows."""


_threads = Threads("dspy-fst-serve")  # requests are limited by `admission`, so none waits for a thread


async def in_thread(work: Callable[[], T], ticket: Ticket | None = None) -> T:
    """Run a function in a thread and wait for it. The ticket's slot stays taken until the function has ended."""
    if ticket is None:
        return await _threads.run(work)
    ticket.hold()
    return await _threads.run(work, ticket.let_go)


def run_program(
    program: Copier,
    inputs: Mapping[str, object],
    outputs: type[BaseModel],
    recording: Recording,
    context: Mapping[str, object],
) -> BaseModel:
    """One run of a copy of the program; blocks.

    Args:
        outputs: The model that the prediction must fit.
        recording: Seeds the sampling and counts the tokens; once closed, it refuses late calls.
        context: Further DSPy settings for this run.

    Raises:
        ApiError: whatever went wrong; the cause is logged and not sent.
    """
    settings = {SETTING: recording, "trace": [], "disable_history": True, **context}
    try:
        with dspy.context(**settings):
            prediction = program.copy(lean=True)(**inputs)
        return _as_outputs(prediction, outputs)
    except Exception as error:
        refusal = _as_api_error(error, outputs)
        _log(error, refusal, recording.closed)
        raise refusal from error


def _log(error: Exception, refusal: ApiError, over: str | None) -> None:
    """
    Args:
        over: Why nobody waits for the answer any more; None while somebody does.
    """
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_SHOWN]
    if over is not None or isinstance(error, ListenerGoneError) or isinstance(error.__cause__, ListenerGoneError):
        logger.info("the program was stopped: %s", over or why)
    elif refusal.status == 500:
        logger.error("the program failed", exc_info=error)
    else:  # a traceback for each reply that does not parse would hide the rest
        logger.warning("the program did not answer (%s): %s", refusal.code, why)


class _NoPredictionError(Exception):
    """The program returned something other than a prediction."""


def _as_outputs(prediction: object, outputs: type[BaseModel]) -> BaseModel:
    """The program's outputs, validated by their schema and known to have a JSON form."""
    if not isinstance(prediction, dspy.Example | Mapping):
        raise _NoPredictionError(f"the program gave {type(prediction).__name__}, not a dspy.Prediction")
    validated = outputs.model_validate({name: prediction[name] for name in outputs.model_fields if name in prediction})
    validated.model_dump_json()  # a field of type Any may hold a value without a JSON form
    return validated


def _as_api_error(error: Exception, outputs: type[BaseModel]) -> ApiError:
    fields = ", ".join(outputs.model_fields)
    if isinstance(error, AdapterParseError):
        return ApiError(502, "reply_not_parsed", "The model's reply could not be read; another seed may do.")
    if isinstance(error, ContextWindowExceededError):
        return ApiError(400, CONTEXT_LENGTH, "The inputs are too long for the model's context.", param="inputs")
    if isinstance(error, EngineError) or isinstance(error.__cause__, EngineError):
        return engine_failed()
    if isinstance(error, LMError):
        return ApiError(502, "lm_failed", "A language model that the program calls failed; try again later.")
    if isinstance(error, _NoPredictionError):
        return ApiError(502, "no_prediction", "The program gave no prediction on these inputs; another seed may do.")
    if isinstance(error, ValidationError | PydanticSerializationError):
        return ApiError(502, "outputs_invalid", f"The program's outputs do not fit its schema ({fields}).")
    return ApiError(500, "program_failed", "The program failed on these inputs; the server's log says why.")
