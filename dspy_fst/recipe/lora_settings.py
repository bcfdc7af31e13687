"""`LoRA`: the settings of a low-rank adapter that is trained in place of the whole weights."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

ALL_LINEAR: Literal["all-linear"] = "all-linear"
SHARED = "shared"
"""Name of the LoRA adapter that all trained predictors share."""


Grouping = Literal["shared", "per_predictor"] | dict[str, tuple[str, ...]]
"""Which predictors share a LoRA adapter: all, none, or those of each group (adapter -> predictors)."""


def adapter_of(grouping: Grouping, predictors: Iterable[str]) -> dict[str, str]:
    """Predictor -> the name of its LoRA adapter; empty where all share one.

    Args:
        grouping: The setting ``adapters``.
        predictors: Names of the trained predictors.

    >>> adapter_of("per_predictor", ["hops[0].query", "answer"])
    {'hops[0].query': 'for-hops[0]-query', 'answer': 'for-answer'}
    """
    if grouping == "shared":
        return {}
    if grouping == "per_predictor":  # peft's modules may have no dot in their names, nor a name of torch's own
        return {name: f"for-{name.replace('.', '-')}" for name in predictors}
    return {name: adapter for adapter, names in grouping.items() for name in names}


class LoRA(BaseModel):
    """A low-rank adapter (Hu et al., arXiv 2106.09685): ``W + scaling * B A`` with a frozen W, for some linear layers.

    >>> LoRA(rank=8).scaling
    4.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    rank: Annotated[int, Field(strict=True, ge=1)] = 16
    """Rows of A and columns of B."""
    alpha: Annotated[float, Field(strict=True, gt=0)] = 32.0
    """Numerator of the scaling, which is ``alpha / rank``."""
    target: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR
    """Which linear layers get an adapter. ``"all-linear"``: all of the text part but the LM head and the routers of
    experts. Else names of layers, or ends of names, e.g. ``("q_proj", "v_proj")``."""
    rslora: bool = False
    """Whether the scaling is ``alpha / sqrt(rank)`` (rsLoRA, arXiv 2312.03732)."""

    @field_validator("target", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != ALL_LINEAR:
            return (value,)
        if isinstance(value, list | tuple | set | frozenset):
            if not value:
                raise ValueError("name at least one layer, or use 'all-linear'")
            return tuple(sorted({str(name) for name in value}))
        if value != ALL_LINEAR:
            raise ValueError("use 'all-linear', or the names of layers")
        return value

    @property
    def scaling(self) -> float:
        """The factor on ``B A``."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))
