"""A program's inputs and outputs as pydantic models: the API's schema is the program's own."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import dspy
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from dspy_fst.errors import ConfigurationError

Fields = dict[str, tuple[Any, object]]
"""Field name -> (annotation, default), as `pydantic.create_model` takes them; ``...`` is no default."""
SIGNATURE_HELP = "set signature (--signature), e.g. 'question: str, year: int -> answer: str'"


class Sent(BaseModel):
    """What a caller sends: known fields only. `body` checks that all text is valid Unicode."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Given(BaseModel):
    """What a program returns."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


@dataclass(frozen=True)
class ProgramSchema:
    """Models of a program's inputs and outputs."""

    inputs: type[BaseModel]
    outputs: type[BaseModel]


def schema_of(program: dspy.Module, signature: str | type[dspy.Signature] | None = None) -> ProgramSchema:
    """The models of a program's inputs and outputs.

    They come from ``signature`` when it is given; else from the program's own signature (Predict, ChainOfThought, ReAct
    and the like); else from the annotations of its ``forward`` and the outputs of its last predictor.

    Raises:
        ConfigurationError: they cannot be determined, or one of their types has no JSON form.
    """
    inputs, outputs = _fields_of(program, signature)
    faults = [*_type_faults("input", inputs), *_type_faults("output", outputs)]
    if faults:
        raise ConfigurationError(faults)
    return ProgramSchema(_model("Inputs", Sent, inputs), _model("Outputs", Given, outputs))


def _fields_of(program: dspy.Module, given: str | type[dspy.Signature] | None) -> tuple[Fields, Fields]:
    if given is not None:
        return _fields_of_signature(_parsed(given))
    if (declared := own_signature(program)) is not None:
        return _fields_of_signature(declared)
    predictors = program.named_predictors()
    if not predictors:
        raise ConfigurationError([f"signature: {_name(program)} has no predictors to read its outputs from"])
    _, last = predictors[-1]
    return _fields_of_forward(program), _plain(last.signature.output_fields)


def own_signature(program: dspy.Module) -> type[dspy.Signature] | None:
    """The signature that a module is called by; None for a program with its own ``forward``.

    A module that passes everything to its one predictor, such as ChainOfThought, has that predictor's signature.
    """
    if isinstance(signature := getattr(program, "signature", None), type(dspy.Signature)):
        return signature
    predictors = program.named_predictors()
    kinds = [parameter.kind for parameter in _parameters(program)]
    if kinds == [inspect.Parameter.VAR_KEYWORD] and len(predictors) == 1:
        return predictors[0][1].signature
    return None


def _parsed(given: str | type[dspy.Signature]) -> type[dspy.Signature]:
    if not isinstance(given, str):
        return given
    try:
        return dspy.Signature(given)
    except (ValueError, SyntaxError, TypeError, NameError) as error:
        raise ConfigurationError([f"signature={given!r}: {error}; {SIGNATURE_HELP}"]) from error


def _fields_of_signature(signature: type[dspy.Signature]) -> tuple[Fields, Fields]:
    return _plain(signature.input_fields), _plain(signature.output_fields)


def _plain(fields: Mapping[str, FieldInfo]) -> Fields:
    """DSPy's fields without the parts that are meant for its prompts."""
    return {name: (_annotation(field), _default(field)) for name, field in fields.items()}


def _annotation(field: FieldInfo) -> object:
    extra = field.json_schema_extra
    text = str(extra.get("desc", "")) if isinstance(extra, dict) else ""
    description = None if text.startswith("${") else text or None  # "${...}" is DSPy's placeholder
    return Annotated[(field.annotation, *field.metadata, Field(description=description))]


def _default(field: FieldInfo) -> object:
    return ... if field.is_required() else field.get_default(call_default_factory=True)


def _parameters(program: dspy.Module) -> list[inspect.Parameter]:
    forward = getattr(type(program), "forward", None)
    return list(inspect.signature(forward).parameters.values())[1:] if forward else []


def _fields_of_forward(program: dspy.Module) -> Fields:
    parameters, where = _parameters(program), f"signature: {_name(program)}.forward"
    if not parameters:
        raise ConfigurationError([f"{where} takes no inputs; {SIGNATURE_HELP}"])
    try:
        hints = get_type_hints(getattr(type(program), "forward", None), include_extras=True)
    except (NameError, TypeError) as error:
        raise ConfigurationError(
            [f"{where} has an annotation that cannot be read ({error}); {SIGNATURE_HELP}"]
        ) from error
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    faults = [
        f"{where}({parameter}): this input has no readable type; annotate it, or {SIGNATURE_HELP}"
        for parameter in parameters
        if parameter.kind not in named or parameter.name not in hints
    ]
    if faults:
        raise ConfigurationError(faults)
    return {p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in parameters}


def _type_faults(kind: str, fields: Fields) -> list[str]:
    faults = []
    for name, (annotation, _) in fields.items():
        if kind == "input" and (special := _dspy_type(annotation)):
            faults.append(
                f"signature: input {name!r} is made of dspy.{special.__name__}, which cannot be sent as plain data; "
                "take a plain value, such as a text or an address, and make it in forward"
            )
            continue
        try:
            TypeAdapter(annotation).json_schema(mode="validation" if kind == "input" else "serialization")
        except PydanticUserError as error:
            reason = str(error).partition("\n")[0]
            faults.append(f"signature: {kind} {name!r} has no JSON form ({reason}); use plain types or pydantic models")
    return faults


def _dspy_type(annotation: object) -> type | None:
    """A dspy.Type (image, tool, ...) anywhere in an annotation: a caller could have any address fetched through it."""
    if isinstance(annotation, type) and issubclass(annotation, dspy.Type):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _dspy_type(part))), None)


def _model(name: str, base: type[BaseModel], fields: Fields) -> type[BaseModel]:
    return create_model(name, __base__=base, **fields)  # type: ignore[call-overload]


def _name(program: dspy.Module) -> str:
    return type(program).__name__
