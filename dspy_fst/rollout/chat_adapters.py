"""The adapter that a program speaks through: described for a run's identity and for disk, and kept on the program.

DSPy 3.4 reads the adapter from its settings at every call (dspy/predict/predict.py), so trained weights would be asked
in whatever format the process happens to use. A trained program therefore keeps its adapter, and every call of it runs
under ``dspy.context(adapter=...)``: in threads, in tasks, in streams, as a part of another program, and in copies of
it. An adapter that the program sets itself, in its ``forward``, still holds where it sets it.
"""

import copyreg
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import dspy
from dspy.adapters.baml_adapter import BAMLAdapter
from pydantic import BaseModel, ConfigDict, StrictBool

from dspy_fst.errors import ConfigurationError
from dspy_fst.run.secrets import is_secret

logger = logging.getLogger(__name__)
OWN: Mapping[str, type[dspy.Adapter]] = {
    "ChatAdapter": dspy.ChatAdapter,
    "JSONAdapter": dspy.JSONAdapter,
    "XMLAdapter": dspy.XMLAdapter,
    "BAMLAdapter": BAMLAdapter,
    "TwoStepAdapter": dspy.TwoStepAdapter,
}
"""DSPy's own adapters by the names under which they are recorded."""
NATIVE_TYPES: Mapping[str, type] = {"Citations": dspy.adapters.types.citation.Citations, "Reasoning": dspy.Reasoning}
"""Types that DSPy's adapters hand to an LM's own features by default."""
KEPT = "_fst_adapter"
"""Attribute of a trained program that holds its KeptAdapter."""
ASKING: Mapping[str, str] = {"TwoStepAdapter": "extraction_model"}
"""Those of `OWN` that cannot be made without an LM -> the attribute that holds it."""
LONGEST_NAME = 500
"""Characters of the longest name of a class or a setting that is believed (ours)."""
PLACES = "adapters of the program"
"""Key of a description under which stand the adapters that are attributes of the program."""


class AdapterSettings(BaseModel):
    """What of one of DSPy's own adapters is recorded; each shapes prompts, or how a reply is read."""

    model_config = ConfigDict(extra="forbid")

    use_native_function_calling: StrictBool | None = None
    parallel_tool_calls: StrictBool | None = None
    use_json_adapter_fallback: StrictBool | None = None
    native_response_types: list[str] = []
    """Names of types, e.g. ``["Citations", "Reasoning"]``."""


class SavedAdapter(BaseModel):
    """An adapter as it is recorded. A class that is not DSPy's own is named, never imported from here."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    """``"JSONAdapter"``, or ``"my_module.MyAdapter"``."""
    settings: dict[str, str | int | float | bool | list[str] | None]
    lms: dict[str, str]
    """Attribute -> model of an LM that the adapter asks itself, e.g. ``{"extraction_model": "openai/gpt-5"}``."""

    def __str__(self) -> str:
        told = {**self.settings, **self.lms}
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in told.items())})"

    def is_own(self) -> bool:
        """Whether it can be made again from this record alone; one with `faults` cannot."""
        native = self.settings.get("native_response_types") or []
        return (
            self.name in OWN
            and not self.lms
            and self.name not in ASKING
            and isinstance(native, list)
            and {*native} <= NATIVE_TYPES.keys()
        )

    def faults(self) -> list[str]:
        """Why the record is that of no adapter, one sentence each."""
        names = [self.name, *self.settings, *self.lms]
        if strange := [name for name in names if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME]:
            return [f"adapter: {strange[0][:LONGEST_NAME]!r} is no name of a class or of a setting"]
        if self.name not in OWN:
            return []
        if self.name in ASKING and ASKING[self.name] not in self.lms:
            return [f"adapter: a {self.name} has an LM as its {ASKING[self.name]}, and none is recorded"]
        unknown = sorted(self.settings.keys() - AdapterSettings.model_fields.keys())
        return [f"adapter: {name} is no setting of {self.name}" for name in unknown] or self._wrong_values()

    def _wrong_values(self) -> list[str]:
        try:
            AdapterSettings.model_validate(self.settings)
        except ValueError:
            return [f"adapter: the settings of {self.name} are not of the right type"]
        return []


def adapter_in_force() -> dspy.Adapter:
    """What DSPy speaks through now; its default is made anew, as DSPy does."""
    return dspy.settings.adapter or dspy.ChatAdapter()


def describe(adapter: dspy.Adapter) -> SavedAdapter:
    """The adapter's class, the plain settings that shape its prompts, and the LMs that it asks.

    A text that is a secret by its name or its form is left out: it is never recorded, compared or logged.
    """
    kind = type(adapter)
    own = OWN.get(kind.__name__) is kind
    held = {name: value for name, value in sorted(vars(adapter).items()) if name[0] != "_" and name != "callbacks"}
    shown = {
        name: _plain(name, value) for name, value in held.items() if not own or name in AdapterSettings.model_fields
    }
    return SavedAdapter(
        name=kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}",
        settings={name: value for name, value in shown.items() if value is not _OPAQUE},
        lms={name: str(value.model) for name, value in held.items() if isinstance(value, dspy.BaseLM)},
    )


_OPAQUE = object()


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, str) and is_secret(name, value):
        return _OPAQUE
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, type) for item in value):
        return [item.__name__ for item in value]
    return str(describe(value)) if isinstance(value, dspy.Adapter) else _OPAQUE


def identity(program: dspy.Module) -> dict[str, Any]:
    """The adapters that a run of this program speaks through: the one in force, and those that the program holds."""
    adapter = kept_by(program) or adapter_in_force()
    places = {place: str(describe(held)) for place, held in adapters_held_by(program).items()}
    return {**describe(adapter).model_dump(), **({PLACES: places} if places else {})}


def adapters_held_by(program: dspy.Module) -> dict[str, dspy.Adapter]:
    """The adapters that are attributes of the program or of its parts, by place, e.g. ``"writer.adapter"``."""
    return {
        f"{name}.{attribute}".removeprefix("self."): value
        for name, module in program.named_sub_modules(dspy.Module)
        for attribute, value in vars(module).items()
        if isinstance(value, dspy.Adapter)
    }


def differing_adapter(program: dspy.Module) -> list[str]:
    """A sentence when the program keeps another adapter than the one that DSPy is set to."""
    kept, outer = kept_by(program), dspy.settings.adapter
    if kept is None or outer is None or describe(kept) == describe(outer):
        return []
    return [
        f"DSPy is set to {describe(outer)}, but the student was trained through {describe(kept)} and goes on through "
        "that; to change it on purpose, give it to dspy_fst.reconfigured(program, adapter=...) or load(..., "
        "adapter=...)"
    ]


def recorded(found: Any) -> SavedAdapter | None:
    """The adapter of a run's recipe; None for a run of a release that recorded none.

    Raises:
        ValueError: it is no record of an adapter.
    """
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise ValueError(f"{found!r} is no record of an adapter")
    saved = SavedAdapter.model_validate({name: value for name, value in found.items() if name != PLACES})
    if faults := saved.faults():
        raise ValueError("; ".join(faults))
    return saved


def made(saved: SavedAdapter, given: dspy.Adapter | None) -> dspy.Adapter:
    """The adapter that a record means; told when the caller gives another one on purpose.

    Raises:
        ConfigurationError: it is not DSPy's own, and neither given nor in force.
    """
    if given is not None:
        if (other := describe(given)) != saved:
            logger.warning("the program was trained through %s, and speaks through %s now", saved, other)
        return given
    if saved.is_own():
        adapter = OWN[saved.name]()
        for name, value in saved.settings.items():
            types = [NATIVE_TYPES[one] for one in value] if name == "native_response_types" and value else None  # type: ignore[union-attr]
            setattr(adapter, name, types or value)
        return adapter
    if (current := dspy.settings.adapter) is not None and describe(current).name == saved.name:
        if describe(current) != saved:
            logger.warning("the program was trained through %s, and speaks through %s now", saved, describe(current))
        return current
    raise ConfigurationError(
        [
            f"adapter: the program was trained through {saved}, which cannot be made from its name alone; give it: "
            "load(..., adapter=...) in Python; for a command, have the function that --program names call "
            "dspy.configure(adapter=...)"
        ]
    )


def code_of(saved: SavedAdapter) -> list[str]:
    """Lines of Python, behind ``import dspy``, after which ``adapter`` is the recorded one.

    Every recorded setting is written out, as DSPy's defaults change. An adapter that cannot be made from its record
    alone is one line to be filled in.
    """
    if not saved.is_own():
        return [f"adapter = ...  # to be made by you: {saved}"]
    kind = OWN[saved.name]
    taken = inspect.signature(kind).parameters
    arguments = ", ".join(f"{name}={_code(value)}" for name, value in saved.settings.items() if name in taken)
    by_default = describe(kind()).settings
    public = hasattr(dspy, saved.name)
    return [
        *([] if public else [f"from {kind.__module__} import {saved.name}"]),
        f"adapter = {'dspy.' if public else ''}{saved.name}({arguments})",
        *(
            f"adapter.{name} = {_code(value)}"
            for name, value in saved.settings.items()
            if name not in taken and value != by_default.get(name)
        ),
    ]


def _code(value: Any) -> str:
    if isinstance(value, list):
        types = [NATIVE_TYPES[name] for name in value]
        return f"[{', '.join(f'{kind.__module__}.{kind.__qualname__}' for kind in types)}]"
    return repr(value)


# ---- on a program --------------------------------------------------------------------------------


class KeptAdapter:
    """A trained program's adapter; copies of the program share it."""

    def __init__(self, adapter: dspy.Adapter):
        self.adapter = adapter
        self.saved = describe(adapter)
        self._told: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptAdapter":
        return self

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """A block that speaks through it; told once when DSPy is set to another one."""
        outer = dspy.settings.adapter
        with _inside_refine(outer, self.adapter) as wrapped:
            if wrapped is None and outer is not None and str(other := describe(outer)) != str(self.saved):
                self._tell(str(other))
            for listener in dspy.settings.stream_listeners or ():
                _listen_through(listener, self.adapter)
            with dspy.context(adapter=wrapped or self.adapter):
                yield

    def _tell(self, other: str) -> None:
        if other not in self._told:
            self._told.add(other)
            logger.warning(
                "DSPy is set to %s, but this program was trained through %s and speaks through that; to change it on "
                "purpose, give it to dspy_fst.reconfigured(program, adapter=...) or load(..., adapter=...)",
                other,
                self.saved,
            )


class SpeaksAsTrained:
    """Mixed into a program's class by `keep`: a call of the program runs under its own adapter."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with vars(self)[KEPT].in_force():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        with vars(self)[KEPT].in_force():
            return await super().acall(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        made_by, arguments = reduced[:2]
        if made_by is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            return (_new, (_plain_class(type(self)), *arguments[1:]), *reduced[2:])
        return reduced


def keep(program: dspy.Module, adapter: dspy.Adapter) -> None:
    """Have a program speak through the adapter wherever it is called.

    Its class becomes a subclass of the same name: DSPy looks ``__call__`` up on the class, and a wrapping module would
    rename its predictors.
    """
    vars(program)[KEPT] = KeptAdapter(adapter)
    if not isinstance(program, SpeaksAsTrained):
        program.__class__ = _speaking_class(type(program))


def kept_by(program: dspy.Module) -> dspy.Adapter | None:
    """The adapter that a trained program keeps; None for a program that nobody trained, or before this was kept."""
    kept = vars(program).get(KEPT)
    return kept.adapter if isinstance(kept, KeptAdapter) else None


_speaking: dict[type, type] = {}
"""A program's class -> the class that `keep` gives it."""


def _speaking_class(plain: type) -> type:
    if plain not in _speaking:
        named = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
        _speaking[plain] = type(plain)(plain.__name__, (SpeaksAsTrained, plain), named)
    return _speaking[plain]


def _plain_class(speaking: type) -> type:
    return speaking.__mro__[speaking.__mro__.index(SpeaksAsTrained) + 1]


def _new(plain: type, *arguments: Any) -> Any:
    kind = _speaking_class(plain)
    return kind.__new__(kind, *arguments)


def _listen_through(listener: Any, adapter: dspy.Adapter) -> None:
    """DSPy's stream listeners read the format from the settings of whoever listens, outside of the program's call."""

    def under(method: Any, *arguments: Any) -> Any:
        with dspy.context(adapter=adapter):
            return method(listener, *arguments)

    for name in ("receive", "finalize"):
        setattr(listener, name, partial(under, getattr(type(listener), name)))


@contextmanager
def _inside_refine(outer: Any, adapter: dspy.Adapter) -> Iterator[dspy.Adapter | None]:
    """dspy.Refine tells its advice through an adapter of its own round the one in force: put ours inside it."""
    call = vars(type(outer)).get("__call__")
    names = getattr(getattr(call, "__code__", None), "co_freevars", ())
    if call is None or type(outer).__module__ != dspy.Refine.__module__ or "adapter" not in names:
        yield None
        return
    cell = call.__closure__[names.index("adapter")]
    before = cell.cell_contents
    cell.cell_contents = adapter
    try:
        yield outer
    finally:
        cell.cell_contents = before
