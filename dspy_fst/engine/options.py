"""An engine's settings from ``engine_options``: every name that is none of them is told at once, with the one meant."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from dspy_fst.errors import ConfigurationError, meant

Settings = TypeVar("Settings")


def made(settings: type[Settings], options: Mapping[str, Any], kind: str) -> Settings:
    """The settings.

    Args:
        settings: A dataclass; what its fields may hold is checked later, with everything else of a run.
        options: Field -> value.
        kind: The engine's name, for the message.

    Raises:
        ConfigurationError: some names are no fields.
    """
    known = [field.name for field in fields(settings)]  # type: ignore[arg-type]
    unknown = [name for name in options if name not in known]
    if unknown:
        listed = f"; it has {', '.join(known)}"
        raise ConfigurationError(
            [
                f"engine_options of engine={kind!r}: {name}: there is no such option{meant(str(name), known) or listed}"
                for name in unknown
            ]
        )
    return settings(**options)
