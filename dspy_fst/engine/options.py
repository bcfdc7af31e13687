"""An engine's settings from ``engine_options``: every name that is none of them is told at once, with the one meant."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from dspy_fst.errors import ConfigurationError, meant

Settings = TypeVar("Settings")
RESHAPING = ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
"""Settings under which tokens are drawn from another distribution than the one that is scored."""


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


def unknown_arguments(given: Iterable[str], known: Sequence[str]) -> list[str]:
    """A sentence for each name that PolicyLM does not take, with the one that was meant or the place where it belongs.

    Args:
        known: What it takes.
    """
    return [f"{name}: there is no such setting{_advice(name, known)}" for name in given if name not in known]


def _advice(name: str, known: Sequence[str]) -> str:
    if name in RESHAPING:
        return ": training scores plain temperature sampling; remove it"
    if close := meant(name, known):
        return close
    from dspy_fst.engine.in_process import InProcessSettings
    from dspy_fst.engine.vllm.server_settings import VLLMSettings

    if name in {field.name for settings in (VLLMSettings, InProcessSettings) for field in fields(settings)}:
        return f" of the LM itself; it is the engine's: engine_options={{{name!r}: ...}}"
    return f"; it has {', '.join(known)}"
