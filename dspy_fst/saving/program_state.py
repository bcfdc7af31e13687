"""program.json: DSPy's own state of a program without its LMs; DSPy's ``program.load`` reads it too.

One thing is added: field names. DSPy writes the fields of a signature without names and reads them back by position, so
the descriptions of a program whose fields were reordered would go to the wrong fields.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import dspy
from dspy.utils.saving import get_dependency_versions
from pydantic import BaseModel, ConfigDict, ValidationError

from dspy_fst.errors import RunDirectoryError
from dspy_fst.recipe.declared import sentences
from dspy_fst.rollout.copying import copied
from dspy_fst.run.files import to_jsonable, write_json

METADATA = "metadata"
ALONE = {"self"}
"""Parameter names of a program that is itself its only predictor, e.g. a bare dspy.Predict."""


class Dumping(Protocol):
    """What DSPy's ``named_parameters`` gives: predictors, and parts of other classes."""

    def dump_state(self) -> dict[str, Any]: ...


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class SavedField(_Strict):
    """A field of a signature; ``name`` is missing in folders of earlier versions."""

    prefix: str | None
    description: str | None
    name: str | None = None


class SavedSignature(_Strict):
    instructions: str
    fields: list[SavedField]


class SavedPredictor(_Strict):
    """What dspy.Predict 3.4 saves. Its loader would set any other key as an attribute, e.g. ``config``, which can send
    prompts and keys to another address."""

    traces: list[object]
    train: list[object]
    demos: list[dict[str, object]]
    signature: SavedSignature
    lm: None
    fields: dict[str, object] = {}


class SavedFlex(_Strict):
    """What dspy.Flex 3.4 saves."""

    module_src: str
    lm: None


def without_lms(program: dspy.Module) -> dspy.Module:
    """A copy in which no predictor has an LM: DSPy would save headers and addresses of LMs."""
    bare: dspy.Module = copied(program)
    for _, parameter in bare.named_parameters():
        if hasattr(parameter, "lm"):
            parameter.lm = None
    return bare


def write_state(program: dspy.Module, path: Path) -> None:
    """Write program.json."""
    write_json(path, written_state(program))


def written_state(program: dspy.Module) -> dict[str, object]:
    """The contents of program.json."""
    parameters = dict(without_lms(program).named_parameters())
    parts = {name: _with_names(parameter) for name, parameter in parameters.items()}
    state = parts["self"] if parameters.keys() == ALONE else parts
    return {**state, METADATA: {"dependency_versions": get_dependency_versions()}}


def parts_in(state: object) -> dict[str, object]:
    """Parameter -> its state in a program.json. For a bare predictor or dspy.Flex the document itself is the state."""
    parts = {key: value for key, value in state.items() if key != METADATA} if isinstance(state, dict) else {}
    bare = isinstance(parts.get("demos"), list) or isinstance(parts.get("module_src"), str)
    return {"self": parts} if bare else parts


def read_state(path: Path, state: object, program: dspy.Module) -> dict[str, object]:
    """Parameter -> its state, checked against the program that will load it, with fields in the program's order.

    Raises:
        RunDirectoryError: the state belongs to another program, or sets what it may not.
    """
    parameters, parts = dict(without_lms(program).named_parameters()), parts_in(state)
    if parts.keys() != parameters.keys():
        raise RunDirectoryError(f"{path} was saved from another program; its parts are not {sorted(parameters)}")
    return {name: _checked(path, name, parts[name], parameter) for name, parameter in parameters.items()}


def take_state(program: dspy.Module, parts: Mapping[str, object]) -> None:
    """Load the result of `read_state` into a program. Not by its own ``load_state``, which copies the program first."""
    for name, parameter in program.named_parameters():
        parameter.load_state(parts[name])


def _with_names(parameter: Dumping) -> dict[str, object]:
    state = parameter.dump_state()
    if not isinstance(parameter, dspy.Predict):
        return state
    names = parameter.signature.fields
    fields = [{**field, "name": name} for field, name in zip(state["signature"]["fields"], names, strict=True)]
    return {**state, "signature": {**state["signature"], "fields": fields}}


def _checked(path: Path, name: str, state: object, parameter: Dumping) -> object:
    kind: type[BaseModel] = SavedFlex if isinstance(parameter, dspy.Flex) else SavedPredictor
    if not isinstance(parameter, dspy.Flex | dspy.Predict):
        if state != to_jsonable(parameter.dump_state()):
            raise RunDirectoryError(
                f"{path}: {name} is not a predictor and differs from this program's; it is not loaded"
            )
        return state
    try:
        saved = kind.model_validate(state)
    except ValidationError as error:
        raise RunDirectoryError(f"{path}: {name}: {'; '.join(sentences(error))}; save the program again") from error
    if not isinstance(saved, SavedPredictor):
        return state
    fields = _in_order(path, name, saved.signature.fields, parameter.signature)
    assert isinstance(state, dict), "SavedPredictor took it"
    return {**state, "signature": {"instructions": saved.signature.instructions, "fields": fields}}


def _in_order(
    path: Path, name: str, saved: list[SavedField], signature: type[dspy.Signature]
) -> list[dict[str, str | None]]:
    """The saved fields in the order of the program's own."""
    prefixes = {field: info.json_schema_extra["prefix"] for field, info in signature.fields.items()}
    named = all(field.name is not None for field in saved)
    # Without names, DSPy's prefixes identify the fields: "Question:".
    wanted = list(prefixes) if named else list(prefixes.values())
    by_name = {field.name if named else field.prefix: field for field in saved}
    if len(saved) != len(by_name) or by_name.keys() != set(wanted):
        there = [str(field.name or field.prefix) for field in saved]
        raise RunDirectoryError(
            f"{path} was saved from another program: the fields of {name} differ ({there} there, {[*prefixes]} here), "
            "so one field would get what was learnt for another; rename them back, or train this program"
        )
    return [{"prefix": by_name[key].prefix, "description": by_name[key].description} for key in wanted]
