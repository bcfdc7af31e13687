"""The DSPy adapter through which a program calls its LM: described on disk, and kept on a trained program.

DSPy 3.4 reads the adapter from its settings at every call (dspy/predict/predict.py). Trained weights would then be
prompted in whatever format the process happens to use. So a trained program keeps its adapter, and every call of the
program runs under ``dspy.context(adapter=...)``: in threads, tasks and streams, inside another program, and in copies.
An adapter that the program sets in its ``forward`` takes precedence there.
"""

import copyreg
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, SupportsIndex, TypeAlias

import dspy
from dspy.adapters.baml_adapter import BAMLAdapter
from pydantic import BaseModel, ConfigDict, StrictBool

from dspy_fst.errors import ConfigurationError
from dspy_fst.rollout.dspy_release import default_adapter
from dspy_fst.run.secrets import is_secret

logger = logging.getLogger(__name__)
Setting: TypeAlias = str | int | float | bool | list[str] | None
"""A recorded setting of an adapter, e.g. ``True``, or ``["Citations", "Reasoning"]`` for a list of classes."""
DSPY_ADAPTERS: Mapping[str, type[dspy.Adapter]] = {
    "ChatAdapter": dspy.ChatAdapter,
    "JSONAdapter": dspy.JSONAdapter,
    "XMLAdapter": dspy.XMLAdapter,
    "BAMLAdapter": BAMLAdapter,
    "TwoStepAdapter": dspy.TwoStepAdapter,
}
"""DSPy's adapters, by the names under which they are recorded."""
NATIVE_TYPES: Mapping[str, type] = {"Citations": dspy.adapters.types.citation.Citations, "Reasoning": dspy.Reasoning}
"""Types that DSPy's adapters leave to an LM's own features by default."""
KEPT = "_fst_adapter"
"""Attribute of a trained program that holds its KeptAdapter."""
WITH_AN_LM: Mapping[str, str] = {"TwoStepAdapter": "extraction_model"}
"""Those of `DSPY_ADAPTERS` that cannot be made without an LM -> the attribute that holds it."""
LONGEST_NAME = 500
"""Most characters of a name of a class or a setting in a valid record (ours)."""
PLACES = "adapters of the program"
"""Key in an `identity` of the adapters that are attributes of the program."""


class AdapterSettings(BaseModel):
    """The recorded settings of one of DSPy's adapters. Each affects prompts, or how a reply is read."""

    model_config = ConfigDict(extra="forbid")

    use_native_function_calling: StrictBool | None = None
    parallel_tool_calls: StrictBool | None = None
    use_json_adapter_fallback: StrictBool | None = None
    native_response_types: list[str] = []
    """Names of types, e.g. ``["Citations", "Reasoning"]``."""


class SavedAdapter(BaseModel):
    """An adapter as it is recorded. A class that is not DSPy's is named, and never imported from its name."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    """``"JSONAdapter"``, or ``"my_module.MyAdapter"``."""
    settings: dict[str, Setting]
    lms: dict[str, str]
    """Attribute -> model of an LM that the adapter calls itself, e.g. ``{"extraction_model": "openai/gpt-5"}``."""

    def __str__(self) -> str:
        arguments = {**self.settings, **self.lms}
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"

    def is_complete(self) -> bool:
        """Whether the adapter can be made again from this record alone. A record without `faults` is assumed."""
        native = self.settings.get("native_response_types") or []
        return (
            self.name in DSPY_ADAPTERS
            and not self.lms
            and self.name not in WITH_AN_LM
            and isinstance(native, list)
            and {*native} <= NATIVE_TYPES.keys()
        )

    def faults(self) -> list[str]:
        """Why no adapter can have this record, a sentence each."""
        names = [self.name, *self.settings, *self.lms]
        if strange := [name for name in names if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME]:
            return [f"adapter: {strange[0][:LONGEST_NAME]!r} is no name of a class or of a setting"]
        if self.name not in DSPY_ADAPTERS:
            return []
        if self.name in WITH_AN_LM and WITH_AN_LM[self.name] not in self.lms:
            return [f"adapter: a {self.name} has an LM as its {WITH_AN_LM[self.name]}, and none is recorded"]
        unknown = sorted(self.settings.keys() - AdapterSettings.model_fields.keys())
        return [f"adapter: {name} is no setting of {self.name}" for name in unknown] or self._wrong_values()

    def _wrong_values(self) -> list[str]:
        try:
            AdapterSettings.model_validate(self.settings)
        except ValueError:
            return [f"adapter: the settings of {self.name} are not of the right type"]
        return []


def adapter_in_force() -> dspy.Adapter:
    """The adapter that DSPy's settings hold now, or a new one of DSPy's default kind."""
    return dspy.settings.adapter or default_adapter()


def describe(adapter: dspy.Adapter) -> SavedAdapter:
    """The record of an adapter: its class, its plain settings, and the models of the LMs that it calls.

    A text that is a secret by its name or its form is left out. It is never recorded, compared or logged.
    """
    kind = type(adapter)
    of_dspy = DSPY_ADAPTERS.get(kind.__name__) is kind
    public = [name for name in sorted(vars(adapter)) if name[0] != "_" and name != "callbacks"]
    attributes = {name: vars(adapter)[name] for name in public}
    settings = dict(_plain_settings(attributes))
    return SavedAdapter(
        name=kind.__name__ if of_dspy else f"{kind.__module__}.{kind.__qualname__}",
        settings={name: settings[name] for name in settings if not of_dspy or name in AdapterSettings.model_fields},
        lms={name: str(value.model) for name, value in attributes.items() if isinstance(value, dspy.BaseLM)},
    )


def _plain_settings(attributes: Mapping[str, object]) -> Iterator[tuple[str, Setting]]:
    """Those of an adapter's attributes that can be recorded, as they are recorded."""
    for name, value in attributes.items():
        if isinstance(value, str | int | float | bool | None):
            if not (isinstance(value, str) and is_secret(name, value)):
                yield name, value
        elif isinstance(value, list | tuple) and all(isinstance(item, type) for item in value):
            yield name, [item.__name__ for item in value]
        elif isinstance(value, dspy.Adapter):
            yield name, str(describe(value))


def identity(program: dspy.Module) -> dict[str, object]:
    """The records of the adapters that a run of this program uses: the one in force, and those the program holds."""
    adapter = kept_by(program) or adapter_in_force()
    places = {place: str(describe(inner)) for place, inner in adapters_held_by(program).items()}
    return {**describe(adapter).model_dump(), **({PLACES: places} if places else {})}


def adapters_held_by(program: dspy.Module) -> dict[str, dspy.Adapter]:
    """Place, e.g. ``"writer.adapter"`` -> adapter, for adapters that are attributes of the program or of its parts."""
    return {
        f"{name}.{attribute}".removeprefix("self."): value
        for name, module in program.named_sub_modules(dspy.Module)
        for attribute, value in vars(module).items()
        if isinstance(value, dspy.Adapter)
    }


def differing_adapter(program: dspy.Module) -> list[str]:
    """A sentence if the program keeps another adapter than the one that DSPy is set to."""
    kept, outer = kept_by(program), dspy.settings.adapter
    if kept is None or outer is None or describe(kept) == describe(outer):
        return []
    return [
        f"DSPy is set to {describe(outer)}, but the student was trained through {describe(kept)} and goes on through "
        "that; to change it on purpose, give it to dspy_fst.reconfigured(program, adapter=...) or load(..., "
        "adapter=...)"
    ]


def recorded(found: object) -> SavedAdapter | None:
    """The record of an adapter in a run's recipe, checked; None for runs of a release that recorded none.

    Raises:
        ValueError: ``found`` is no record of an adapter.
    """
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise ValueError(f"{found!r} is no record of an adapter")
    saved = SavedAdapter.model_validate({name: value for name, value in found.items() if name != PLACES})
    if faults := saved.faults():
        raise ValueError("; ".join(faults))
    return saved


def make_adapter(saved: SavedAdapter, given: dspy.Adapter | None) -> dspy.Adapter:
    """The given adapter, or else the one that a record describes. A warning is logged if they differ.

    Raises:
        ConfigurationError: the record is not enough to make the adapter, and it is neither given nor in force.
    """
    if given is not None:
        if (other := describe(given)) != saved:
            logger.warning("the program was trained through %s, and speaks through %s now", saved, other)
        return given
    if saved.is_complete():
        adapter = DSPY_ADAPTERS[saved.name]()
        for name, value in saved.settings.items():
            if isinstance(value, list) and name == "native_response_types":
                setattr(adapter, name, [NATIVE_TYPES[kind] for kind in value])
            else:
                setattr(adapter, name, value)
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
    """Lines of Python, to follow ``import dspy``, after which ``adapter`` is the recorded adapter.

    Every recorded setting is written out, as DSPy's defaults may change. For an adapter that cannot be made from its
    record alone there is one line, for the user to fill in.
    """
    if not saved.is_complete():
        return [f"adapter = ...  # to be made by you: {saved}"]
    kind = DSPY_ADAPTERS[saved.name]
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


def _code(value: Setting) -> str:
    if isinstance(value, list):
        types = [NATIVE_TYPES[name] for name in value]
        return f"[{', '.join(f'{kind.__module__}.{kind.__qualname__}' for kind in types)}]"
    return repr(value)


# ---- a program keeps its adapter -----------------------------------------------------------------------------


class KeptAdapter:
    """A trained program's adapter. Copies of the program share it."""

    def __init__(self, adapter: dspy.Adapter):
        self.adapter = adapter
        self.saved = describe(adapter)
        self._warned_of: set[str] = set()

    def __deepcopy__(self, memo: dict[int, object]) -> "KeptAdapter":
        return self

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """A block in which LMs are called through it. If DSPy is set to another adapter, a warning says so once."""
        outer = dspy.settings.adapter
        with _inside_refine(outer, self.adapter) as wrapped:
            if wrapped is None and outer is not None and str(other := describe(outer)) != str(self.saved):
                self._warn(str(other))
            for listener in dspy.settings.stream_listeners or ():
                _listen_through(listener, self.adapter)
            with dspy.context(adapter=wrapped or self.adapter):
                yield

    def _warn(self, other: str) -> None:
        if other not in self._warned_of:
            self._warned_of.add(other)
            logger.warning(
                "DSPy is set to %s, but this program was trained through %s and speaks through that; to change it on "
                "purpose, give it to dspy_fst.reconfigured(program, adapter=...) or load(..., adapter=...)",
                other,
                self.saved,
            )


class SpeaksAsTrained:
    """Mixed into a program's class by `keep`: a call of the program runs under its own adapter."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        with vars(self)[KEPT].in_force():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    async def acall(self, *args: object, **kwargs: object) -> object:
        with vars(self)[KEPT].in_force():
            return await super().acall(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """A pickle names the program's own class: the class that `keep` made exists in this process only.

        A class derived from that one, such as a counted program's, stays: a copy is made of it too.
        """
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        (function, arguments, *rest), kind = reduced, type(self)
        plain = _plain_class(kind)
        if function is copyreg.__newobj__ and arguments[0] is kind and kind is _speaking.get(plain):  # type: ignore[attr-defined]
            return (_new, (plain, *arguments[1:]), *rest)
        return reduced


def keep(program: dspy.Module, adapter: dspy.Adapter) -> None:
    """Make a program call its LMs through the adapter, wherever the program is called.

    The program's class becomes a subclass of the same name. DSPy looks up ``__call__`` on the class, and a module that
    wraps the program would rename its predictors.
    """
    vars(program)[KEPT] = KeptAdapter(adapter)
    if not isinstance(program, SpeaksAsTrained):
        program.__class__ = _speaking_class(type(program))


def kept_by(program: dspy.Module) -> dspy.Adapter | None:
    """The adapter that a trained program keeps; None if it was not trained, or by a release that kept none."""
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


def _new(plain: type, *arguments: object) -> object:
    kind = _speaking_class(plain)
    return kind.__new__(kind, *arguments)


def _listen_through(listener: object, adapter: dspy.Adapter) -> None:
    """Make one of DSPy's stream listeners use the adapter.

    It runs outside of the program's call, and would use the adapter in the settings of whoever listens.
    """

    def under(method: Callable[..., object], *arguments: object) -> object:
        with dspy.context(adapter=adapter):
            return method(listener, *arguments)

    for name in ("receive", "finalize"):
        setattr(listener, name, partial(under, getattr(type(listener), name)))


@contextmanager
def _inside_refine(outer: dspy.Adapter | None, adapter: dspy.Adapter) -> Iterator[dspy.Adapter | None]:
    """A block in which dspy.Refine's adapter, if that is the outer one, wraps the given adapter; gives it, or None.

    To add its advice, dspy.Refine puts an adapter of its own around the one in force.
    """
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
