"""The sections of a project file: the policy, the reflection LM, the recipe, and references."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from dspy_fst.config import FSTConfig
from dspy_fst.project.names import examples_in, reference_in


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError("write the name of an environment variable, not the key itself")
    return name


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PolicySettings(Part):
    """How the trained model is sampled; a missing setting has PolicyLM's default."""

    engine: Literal["auto", "vllm", "in_process"] | None = None
    engine_options: dict[str, object] | None = None
    """``api_key_env`` names the environment variable of an attached server's key."""
    temperature: float | None = None
    max_tokens: int | None = None


class ReflectionSettings(BaseModel):
    """Arguments of ``dspy.LM``. In the file, the model's name alone is enough."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str
    api_key_env: Annotated[str, AfterValidator(_variable)] | None = None
    """Environment variable with the key; by default the provider's usual one."""


class Recipe(FSTConfig):
    """Fields of FSTConfig, and DSPy's budgets instead of ``cycles``."""

    auto: Literal["light", "medium", "heavy"] | None = None


Reference = Annotated[str, AfterValidator(reference_in)]
ExamplesReference = Annotated[str, AfterValidator(examples_in)]


def model_alone(value: object) -> object:
    """The settings of a reflection LM that is given by its name alone."""
    return {"model": value} if isinstance(value, str) else value
