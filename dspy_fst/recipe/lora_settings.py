"""`LoRA`: the settings of a low-rank adapter that is trained in place of the whole weights."""

import hashlib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

ALL_LINEAR: Literal["all-linear"] = "all-linear"
SHARED = "shared"
"""Name of the LoRA adapter that all trained predictors share."""
LONGEST = 64
"""Characters of a group's name, or of what is kept of a predictor's (ours): each names a folder."""


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
    if grouping == "per_predictor":
        return {name: _named_for(name) for name in predictors}
    return {name: adapter for adapter, names in grouping.items() for name in names}


def _named_for(predictor: str) -> str:
    """A name that peft's modules and folders may have: no dot, no name of torch's own, no slash, not too long.

    A digest tells apart what is left of two predictors with other characters, which keys of a dict may have.
    """
    kept = re.sub(r"[^A-Za-z0-9_\-\[\]]", "-", predictor)[:LONGEST]
    plain = len(predictor) <= LONGEST and re.fullmatch(r"[A-Za-z0-9_.\[\]]+", predictor)
    return f"for-{kept}" if plain else f"for-{kept}-{hashlib.sha256(predictor.encode()).hexdigest()[:8]}"


class LoRA(BaseModel):
    """A low-rank adapter (Hu et al., arXiv 2106.09685): ``W + scaling * B A`` with a frozen W, for some linear layers.

    >>> LoRA(rank=8).scaling
    4.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    rank: Annotated[int, Field(strict=True, ge=1)] = 16
    """Rows of A and columns of B; at most the smaller side of the largest layer that gets an adapter."""
    alpha: Annotated[float, Field(strict=True, gt=0, le=1e6)] = 32.0
    """Numerator of the scaling, which is ``alpha / rank``; at most 1e6 (ours: far beyond it float32 overflows)."""
    target: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR
    """Which linear layers get an adapter. ``"all-linear"``: all of the text part but the LM head and the routers of
    experts. Else names of layers, or ends of names, e.g. ``("q_proj", "v_proj")``."""
    rslora: Annotated[bool, Field(strict=True)] = False
    """Whether the scaling is ``alpha / sqrt(rank)`` (rsLoRA, arXiv 2312.03732)."""

    @field_validator("target", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != ALL_LINEAR:
            return (value,)
        if isinstance(value, list | tuple | set | frozenset):
            if not value:
                raise ValueError("name at least one layer, or use 'all-linear'")
            names = sorted({str(name) for name in value})
            if ALL_LINEAR in names and len(names) > 1:
                raise ValueError("'all-linear' stands for all linear layers; give it alone, or name layers only")
            return ALL_LINEAR if names == [ALL_LINEAR] else tuple(names)
        if value != ALL_LINEAR:
            raise ValueError("use 'all-linear', or the names of layers")
        return value

    @property
    def scaling(self) -> float:
        """The factor on ``B A``."""
        return float(self.alpha / (self.rank**0.5 if self.rslora else self.rank))
