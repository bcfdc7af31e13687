"""What the settings of every room share, and the sentences that say what is wrong with a document.

A room declares its settings once, beside the code that reads them (`slow.training_settings`, `fast.search_settings`,
`rollout.rollout_settings`); `dspy_fst.config.FSTConfig` inherits them all. These modules import no torch and no DSPy.
"""

from collections.abc import Callable, Iterable, Mapping
from inspect import isclass
from types import MappingProxyType
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from dspy_fst.errors import ConfigurationError, meant

ALL_SETTINGS = "; see dspy_fst.FSTConfig for all of them"


class Settings(BaseModel):
    """Frozen settings. Unknown names are refused, and so are numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> Self:
        """Settings from values of any kind.

        Raises:
            ConfigurationError: with every fault that was found.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            raise ConfigurationError(sentences(error, show=_as_it_is, unknown=cls._unknown)) from None

    @classmethod
    def _unknown(cls, place: tuple[int | str, ...]) -> str:
        if known := _fields_within(cls, place):
            return no_such_setting(_words(place), known, f"; {place[0]} has {', '.join(known)}")
        return no_such_setting(_words(place), cls.model_fields, ALL_SETTINGS)

    @field_validator("*", mode="before")
    @classmethod
    def _a_truth_value_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool and value not in get_args(annotation):
            raise ValueError("True and False are no numbers")
        return value


def _fields_within(settings: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The fields of a setting that has fields of its own, as ``adapter`` has; empty for a setting itself."""
    if len(place) < 2 or (field := settings.model_fields.get(str(place[0]))) is None:
        return []
    kinds = (field.annotation, *get_args(field.annotation))
    return [name for kind in kinds if isclass(kind) and issubclass(kind, BaseModel) for name in kind.model_fields]


def sentences(
    error: ValidationError,
    *,
    show: Callable[[str, object], str | None] = lambda place, value: None,
    unknown: Callable[[tuple[int | str, ...]], str] | None = None,
) -> list[str]:
    """A sentence for each fault: where it is, and what is wrong.

    Args:
        show: Place and value -> the value in words, or None to leave it out. By default no value is shown: it may be
            secret.
        unknown: The place of a name that is not declared -> the sentence on it. None takes pydantic's.
    """
    return [_sentence(fault, show, unknown) for fault in error.errors(include_url=False, include_context=False)]


def _sentence(
    fault: Mapping[str, Any],
    show: Callable[[str, object], str | None],
    unknown: Callable[[tuple[int | str, ...]], str] | None,
) -> str:
    if unknown is not None and fault["type"] == "extra_forbidden":
        return unknown(fault["loc"])
    place = _words(fault["loc"])
    if fault["type"] == "missing":
        return f"{place}: it is missing"
    value = show(place, fault["input"]) if place else None  # a fault of the whole document has the whole as its value
    message = fault["msg"].removeprefix("Value error, ")
    return ": ".join(part for part in (place if value is None else f"{place}={value}", message) if part)


def no_such_setting(
    place: str, known: Iterable[str], otherwise: str = "", instead: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The sentence on a name that is not declared, with the one that was meant.

    Args:
        place: The name, after those of the sections that it stands in, e.g. ``"recipe.cycle"``.
        known: Names that are declared there.
        otherwise: What follows when none of them is close.
        instead: Names that others have for a setting -> what to do, see `dspy_fst.recipe.other_names`.
    """
    name = place.rpartition(".")[2]
    hint = f"; {instead[name]}" if name in instead else meant(name, list(known)) or otherwise
    return f"{place}: there is no such setting{hint}"


def _as_it_is(place: str, value: object) -> str:
    return repr(value)


def _words(place: tuple[int | str, ...]) -> str:
    return ".".join(map(str, place))
