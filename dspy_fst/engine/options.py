"""A PolicyLM's settings: the engine's are made from ``engine_options``, and some of them are saved.

Unknown names are reported together, with likely corrections. A saved state may come from somebody else, so it holds how
the weights are sampled and nothing that belongs to one machine: it cannot set an address, a key, a path, a device, a
time limit or an argument of a server.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal, TypedDict, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from dspy_fst.errors import ConfigurationError, meant

# ---- given by a user -----------------------------------------------------------------------------


@dataclass(frozen=True)
class InProcessSettings:
    """How the in-process engine runs."""

    device: str | None = None
    """Torch device, e.g. ``"cuda:0"``; None takes the GPU when there is one."""
    dtype: str | None = None
    """``"float32"`` or ``"bfloat16"``; None is float32 on CPU, bfloat16 on CUDA. The LM head and sampling are in
    float32."""
    max_batch_tokens: int = 65_536
    """Most prompt plus completion tokens that are sampled at once, padding included; more calls wait until some end."""
    linger_s: float = 2.0
    """Seconds without a new call after which a batch runs although some caller in flight has made no call. If callers
    take longer on a busy machine, batches differ between runs, and so do the last bits of their results."""
    timeout_s: float = 600.0
    """Seconds that a reply may be sampled before its caller gets an EngineError. The wait for a place is excluded."""


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
    from dspy_fst.engine.vllm.server_settings import VLLMSettings

    if name in {field.name for settings in (VLLMSettings, InProcessSettings) for field in fields(settings)}:
        return f" of the LM itself; it is the engine's: engine_options={{{name!r}: ...}}"
    return f"; it has {', '.join(known)}"


# ---- saved ---------------------------------------------------------------------------------------


Positive = Annotated[int, Field(gt=0)]


class PortableOptions(BaseModel):
    """Engine options that a saved state may set."""

    model_config = ConfigDict(strict=True, extra="forbid")

    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    max_model_len: Positive | None = None
    enforce_eager: bool | None = None
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    cpu_kv_cache_gib: Positive | None = None
    max_batch_tokens: Positive | None = None


OF_ENGINE = {
    "vllm": {"dtype", "max_model_len", "enforce_eager", "gpu_memory_utilization", "cpu_kv_cache_gib"},
    "in_process": {"dtype", "max_batch_tokens"},
}
"""Engine -> those of the portable options that it has."""


class PolicyArguments(TypedDict, total=False):
    """Arguments of PolicyLM that a saved state may set."""

    model: str
    engine: Literal["auto", "vllm", "in_process"]
    engine_options: dict[str, object]
    temperature: float
    max_tokens: int | None
    num_retries: int
    version: str
    use_json_adapter_fallback: bool
    lora_adapter: str | None


class PolicyState(BaseModel):
    """The state that ``PolicyLM.dump_state`` returns."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    engine: Literal["auto", "vllm", "in_process"]
    engine_options: PortableOptions
    temperature: float = Field(ge=0, allow_inf_nan=False)
    max_tokens: Positive | None
    num_retries: int = Field(ge=0)
    version: str
    use_json_adapter_fallback: bool = False
    lora_adapter: str | None = None

    def settings(self, engine: str) -> PolicyArguments:
        """Arguments of PolicyLM. Options that were not set, or that this engine does not have, are left out."""
        settings: PolicyArguments = self.model_dump(exclude_unset=True)  # type: ignore[assignment]
        options = {name: value for name, value in settings["engine_options"].items() if name in OF_ENGINE[engine]}
        return {**settings, "engine_options": options}


def portable_options(options: Mapping[str, object]) -> dict[str, object]:
    """Those of a PolicyLM's engine options that may be saved."""
    return {name: value for name, value in options.items() if name in PortableOptions.model_fields}
