"""Makes an engine's settings from ``engine_options``. Unknown names are reported together, with likely corrections."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

from dspy_fst.errors import ConfigurationError, meant

Settings = TypeVar("Settings")
RESHAPING = ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
"""Settings under which tokens are sampled from another distribution than training scores."""


def make_settings(settings: type[Settings], options: Mapping[str, object], kind: str) -> Settings:
    """An engine's settings from its options.

    Args:
        settings: A dataclass. Its values are checked later, together with the rest of a run.
        options: Field -> value.
        kind: The engine's name, for the message.

    Raises:
        ConfigurationError: some names are not fields of the settings.
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
    """One sentence for each argument that PolicyLM does not have, with a likely correction or its proper place.

    Args:
        given: Names that the user gave.
        known: Names that PolicyLM has.
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
