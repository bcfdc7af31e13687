"""What samples tokens: the one protocol that every engine meets. Its weights are verified by `engine.verification`."""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from dspy.lm15 import Request, Response

from dspy_fst.model_files.lora_folder import lora_parts
from dspy_fst.types import WeightsVersion

QUEUEING: ContextVar[Callable[[], AbstractContextManager[object]]] = ContextVar("queueing", default=nullcontext)
"""Makes the block in which an engine lets a call wait for its own queue.

Whoever limits the time of a call sets it, so that the limit measures work: while a call waits for the engine to finish
other callers' batches, its work has not begun (`dspy_fst.rollout.worker_pool.QueueTime`).
"""


@dataclass(frozen=True)
class Completion:
    """One reply with the exact tokens behind it."""

    response: Response
    """What DSPy's adapters read; carries no provider data."""
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    weights: WeightsVersion
    reasoning_tokens: int = 0
    """See `types.Call`."""


@dataclass(frozen=True)
class AdapterFiles:
    """One immutable LoRA adapter: a peft folder (adapter_config.json, adapter_model.safetensors).

    >>> AdapterFiles("shared", Path("weights/step-000007/shared")).tensor("x.q_proj.lora_A.weight")
    'shared: x.q_proj.lora_A.weight'
    """

    name: str
    """Unique within its checkpoint, e.g. ``"shared"``; the adapter of the next version has the same name."""
    path: Path
    digests: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Of every tensor as its writer held it, by name in adapter_model.safetensors; empty when nobody recorded them."""

    def tensor(self, name: str) -> str:
        """The name of one of its tensors in a `Holding`."""
        return f"{self.name}: {name}"


@dataclass(frozen=True)
class Checkpoint:
    """One immutable version of the policy's weights: a Hugging Face folder, and the LoRA adapters on it, if any."""

    version: WeightsVersion
    path: Path
    """Whole weights (untied, with tokenizer). With adapters: their base, which all versions of a run share."""
    digests: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Of every tensor of ``path`` as its writer held it, by name in the folder; empty when nobody recorded them."""
    adapters: tuple[AdapterFiles, ...] = ()
    """By name, in order. Empty: the folder's weights are the policy's."""

    @classmethod
    def at(cls, version: WeightsVersion, folder: Path) -> "Checkpoint":
        """The version that lies in a folder: whole weights, or LoRA adapters and the base that they name.

        Raises:
            ConfigurationError: the folder's list of adapters is damaged.
        """
        parts = lora_parts(folder)
        if parts is None:
            return cls(version, folder)
        base, adapters = parts
        return cls(version, base, adapters=tuple(AdapterFiles(name, path) for name, path in adapters.items()))

    @property
    def folder(self) -> Path:
        """The folder that names this version: the adapters' own parent where there are adapters, else ``path``."""
        return self.adapters[0].path.parent if self.adapters else self.path

    def adapter(self, name: str | None) -> AdapterFiles | None:
        """The adapter that a call goes through.

        Args:
            name: Of one of ``adapters``. None: the only one; where there are several or none, the base alone.

        Raises:
            ValueError: there is no adapter of this name.
        """
        if name is None:
            return self.adapters[0] if len(self.adapters) == 1 else None
        known = {adapter.name: adapter for adapter in self.adapters}
        if name not in known:
            raise ValueError(f"weights {self.version} have no LoRA adapter {name!r}; they have {[*known]}")
        return known[name]


@dataclass(frozen=True)
class Holding:
    """What an engine's weights in use are, beside those of a published folder."""

    digests: Mapping[str, str]
    """Of every tensor as the engine read it, by name in the folder; an adapter's under `AdapterFiles.tensor`."""
    wrong: Mapping[str, str]
    """Tensor -> how the one in use differs, e.g. ``{"lm_head.weight": "83 of 4096 numbers, by up to 0.002"}``."""
    dtype: str
    """``"float32"`` or ``"bfloat16"``: the arithmetic of the engine's body."""
    with_base: bool = True
    """Whether ``digests`` and ``wrong`` cover the folder ``path``. False: they cover the adapters alone, as the base
    has been compared since the engine read it, and nothing was written to it since."""


class Scorer(Protocol):
    """Whatever scores token sequences under the weights that it serves, and can say what those are."""

    def held(self, checkpoint: Checkpoint) -> Holding | None:
        """Compare the weights that the forward pass reads with a folder's; None when the engine cannot tell.

        Adapters are compared each time, their base once after each time that the engine read it.

        Raises:
            EngineError: the folder cannot be read, or the engine does not answer.
        """
        ...

    def score(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1.

        Args:
            sequences: Token ids.
            adapter: See `Checkpoint.adapter`.
        """
        ...


class Engine(Scorer, Protocol):
    """Samples replies from the newest weights it was given. Thread-safe; owns what it starts."""

    @property
    def weights(self) -> WeightsVersion | None:
        """The version now served; None before the first load."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Serve these weights from now on; starts the engine when it is not running.

        No reply sampled after this returns comes from older weights, nor from weights that ``verify`` (see
        :meth:`on_recovery`) refuses.

        Raises:
            EngineError: it cannot start, or does not answer in time.
            SyncError: it serves other weights than these, and could not be made to serve them.
        """
        ...

    def complete(
        self, request: Request, seed: int, prompt_ids: tuple[int, ...] | None = None, adapter: str | None = None
    ) -> Completion:
        """Sample one reply. ``seed`` fixes the draw given the weights (up to batching on a server).

        Args:
            prompt_ids: The rendered prompt, where the caller has it (a conversation that goes on from sampled ids).
                None: the engine renders the request.
            adapter: The LoRA adapter that the reply is sampled with, see `Checkpoint.adapter`. Callers that mean None
                leave it out, so that an engine of somebody's own need not have the argument.

        Raises:
            EngineError: the engine is gone or did not answer in time.
            dspy.lm15.LM15Error: the request itself is refused (e.g. the prompt exceeds the context).
        """
        ...

    def expect(self, callers: int) -> None:
        """Tell how many rollouts are in flight, so that an engine which batches knows for whom to wait."""
        ...

    def on_recovery(self, tell: Callable[[str], None], verify: Callable[[Scorer], None] | None) -> None:
        """Have each recovery from a failure told as a sentence, and the engine verified before it samples.

        ``verify`` belongs to the weights that are loaded next: it runs at their load, and after each recovery on them.
        None lets go of the last one, too.
        """
        ...

    def take_counts(self) -> Counter[str]:
        """Failures that were survived since the last call, by kind."""
        ...

    def close(self) -> None:
        """Release everything that was started. May be called twice."""
        ...


@runtime_checkable
class StreamingEngine(Protocol):
    """An engine that can tell a reply while it is sampled."""

    def stream(self, request: Request, seed: int, adapter: str | None = None) -> Generator[str, None, Completion]:
        """`Engine.complete`, its text told in pieces; the generator returns what ``complete`` would have.

        Closing it ends the reply. Once a piece was told, a failure is not survived by asking again.
        """
        ...
