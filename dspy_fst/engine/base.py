"""What samples tokens: the one protocol that every engine meets, and what no engine is asked to do.

The weights that an engine serves are verified by `engine.verification`.
"""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypedDict, runtime_checkable

from dspy.lm15 import Config, Request, Response, UnsupportedFeatureError

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
    predictors: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Predictor -> the adapter that it speaks through, where not all speak through one."""

    @classmethod
    def at(cls, version: WeightsVersion, folder: Path) -> "Checkpoint":
        """The version that lies in a folder: whole weights, or LoRA adapters and the base that they name.

        Raises:
            ConfigurationError: the folder's list of adapters is damaged.
        """
        parts = lora_parts(folder)
        if parts is None:
            return cls(version, folder)
        adapters = tuple(AdapterFiles(name, path) for name, path in parts.adapters.items())
        return cls(version, parts.base, adapters=adapters, predictors=parts.predictors)

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


@dataclass
class PromptTokens:
    """Tokens of prompts.

    >>> PromptTokens(in_calls=900, read=300)  # eight calls, and what their prompts have in common was read once
    PromptTokens(in_calls=900, read=300)
    """

    in_calls: int = 0
    """Of all calls, each by itself."""
    read: int = 0
    """Those that the model read, padding included."""


class Through(TypedDict, total=False):
    """What a call says of its LoRA adapter; nothing, where it means none or the only one."""

    adapter: str


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

    def on_recovery(self, tell: Callable[[str], None], verify: Callable[[Scorer], object] | None) -> None:
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


@runtime_checkable
class SleepingEngine(Protocol):
    """An engine that can give its GPU memory to the trainer for a while."""

    def asleep(self) -> AbstractContextManager[None]:
        """The engine's memory is free in this block, where it was told to sleep. Calls wait for the block's end."""
        ...


@runtime_checkable
class CountingEngine(Protocol):
    """An engine that counts the tokens of prompts, and those that its model read."""

    def count_prompts(self) -> Callable[[], PromptTokens]:
        """A function that returns those of the calls from now until it is called, or until weights are loaded."""
        ...


# ---- what no engine is asked ----------------------------------------------------------------------

_SAMPLING = {
    "top_p": "nucleus sampling",
    "top_k": "top-k sampling",
    "frequency_penalty": "a frequency penalty",
    "presence_penalty": "a presence penalty",
}
_MASKING = {
    *("logit_bias", "structured_outputs", "bad_words", "allowed_token_ids", "min_tokens"),
    *("thinking_token_budget", "use_beam_search", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
}
"""Servers' own settings that forbid some tokens or force others."""
LEAST_TEMPERATURE = 0.01
"""vLLM 0.32 raises a temperature between 0 and this value to this value (vllm/sampling_params.py), and reports the
log-probabilities at the raised temperature."""


def temperature_fault(temperature: object) -> str | None:
    """Why calls cannot be both sampled and scored at this temperature; None if they can."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        return f"temperature={temperature!r}: it must be a number above 0, at most 2; 1.0 is the model's own"
    if 0 < temperature < LEAST_TEMPERATURE:
        return (
            f"temperature={temperature!r}: vLLM samples at {LEAST_TEMPERATURE} instead, so training would score "
            f"another distribution than was sampled; use 0 (greedy) or at least {LEAST_TEMPERATURE}"
        )
    return None


def refuse_reshaped_sampling(request: Request) -> None:
    """Refuse settings under which tokens are not sampled from softmax(logits / temperature).

    The trainer scores that distribution. Any other would silently bias every importance weight.

    Raises:
        dspy.UnsupportedFeatureError: names the setting.
    """
    neutral = {"top_p": (None, 1, 1.0), "top_k": (None, 0, -1)}
    for name, meaning in _SAMPLING.items():
        if getattr(request.config, name) not in neutral.get(name, (None, 0, 0.0)):
            raise UnsupportedFeatureError(
                f"{name}={getattr(request.config, name)!r}: {meaning} is not what training scores; remove it from "
                "the PolicyLM or the predictor's config"
            )
    temperature = request.config.temperature
    if temperature is not None and 0 < temperature < LEAST_TEMPERATURE:
        raise UnsupportedFeatureError(str(temperature_fault(temperature)))
    if masks := sorted(_masks(request.config)):
        raise UnsupportedFeatureError(
            f"{', '.join(masks)}: the reply would be drawn with some tokens masked, which is not what training scores; "
            "ask for the form in words (DSPy's adapters do)"
        )


def _masks(config: Config) -> set[str]:
    """Names of the settings that force the form of a reply.

    A forced tool choice is not among them: it is not enforced here. The model sees the tools and decides itself whether
    to call one, so that a reply without a call is the policy's own action.
    """
    forced = {"response_format"} if config.response_format is not None else set()
    return forced | (_MASKING & set(config.extensions or {}))
