"""A PolicyLM on disk: how its weights are sampled, without anything that belongs to one machine.

A saved state may come from somebody else, so it cannot set an address, a key, a path, a device, a time limit or an
argument of a server.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

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

    def settings(self, engine: str) -> dict[str, Any]:
        """Arguments of PolicyLM. Options that were not set, or that this engine does not have, are left out."""
        settings = self.model_dump(exclude_unset=True)
        options = {name: value for name, value in settings["engine_options"].items() if name in OF_ENGINE[engine]}
        return {**settings, "engine_options": options}


def portable_options(options: Mapping[str, object]) -> dict[str, object]:
    """Those of a PolicyLM's engine options that may be saved."""
    return {name: value for name, value in options.items() if name in PortableOptions.model_fields}
