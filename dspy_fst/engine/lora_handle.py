"""DSPy's engine contract over one LoRA adapter of an engine that serves several.

In: the handle of the engine, which all predictors share. Out: what a predictor's LM asks, so that its calls go through
its adapter in rollouts and outside of them.
"""

from collections.abc import Iterator
from typing import Protocol, Unpack

from dspy import lm15
from dspy.clients.engines.base import StreamEvent

from dspy_fst.engine.base import Through


class Handle(Protocol):
    """The part of `dspy_fst.policy_lm.EngineHandle` that is asked."""

    @property
    def supports_function_calling(self) -> bool: ...

    @property
    def supports_reasoning(self) -> bool: ...

    def complete(self, request: lm15.Request, **through: Unpack[Through]) -> lm15.Response: ...

    def stream(self, request: lm15.Request, **through: Unpack[Through]) -> Iterator[StreamEvent]: ...


class AdapterHandle:
    """See the module."""

    def __init__(self, handle: Handle, adapter: str):
        self._handle, self._adapter = handle, adapter

    @property
    def supports_function_calling(self) -> bool:
        """Read by DSPy's adapters, see `EngineHandle`."""
        return self._handle.supports_function_calling

    @property
    def supports_reasoning(self) -> bool:
        """Read by DSPy's adapters, see `EngineHandle`."""
        return self._handle.supports_reasoning

    def complete(self, request: lm15.Request) -> lm15.Response:
        return self._handle.complete(request, adapter=self._adapter)

    def stream(self, request: lm15.Request) -> Iterator[StreamEvent]:
        """The reply's events as it is sampled."""
        return self._handle.stream(request, adapter=self._adapter)

    def close(self) -> None:
        """DSPy closes LMs it does not own the engine of; only `PolicyLM.release` stops ours."""

    def __deepcopy__(self, memo: dict[int, object]) -> "AdapterHandle":
        return self
