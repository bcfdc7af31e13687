"""PolicyLM: the language model that is trained, as an ordinary dspy.LM."""

import inspect
import logging
import secrets
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import dspy
from dspy import lm15
from dspy.clients.engines.base import StreamEvent
from dspy.clients.provider import Provider, TrainingJob
from dspy.clients.utils_finetune import TrainDataFormat
from pydantic import ValidationError

from dspy_fst.engine.async_handle import AsyncHandle
from dspy_fst.engine.base import Checkpoint, Completion, Engine, Scorer, SleepingEngine, Through
from dspy_fst.engine.chat import Ids, PromptRenderer
from dspy_fst.engine.lora_handle import AdapterHandle
from dspy_fst.engine.machine import require_first_rank
from dspy_fst.engine.making import EngineKind, downloaded, engine_maker, resolve_kind
from dspy_fst.engine.options import PolicyState, portable_options, unknown_arguments
from dspy_fst.engine.replies import ReplyReader
from dspy_fst.engine.stream_events import events, pieces
from dspy_fst.engine.verification import verify_tensors
from dspy_fst.errors import ConfigurationError, imported
from dspy_fst.model_files.folder import adapter_fault
from dspy_fst.recipe.declared import sentences
from dspy_fst.rollout.call_recorder import RECORDED, complete_recorded, no_second_call, stream_recorded

logger = logging.getLogger(__name__)
BASE_VERSION = "base"
"""Version of weights that nobody has trained yet."""


class PolicyLM(dspy.LM):
    """An open-weights model on this machine whose every reply is known token by token.

    Behaves like any ``dspy.LM``; the engine starts at the first call. DSPy's cache is never used: a cached
    reply would come from other weights than the current ones. DSPy's adapters ask it once for each reply, in rollouts
    and outside, unless ``use_json_adapter_fallback`` is set.

    >>> policy = PolicyLM("Qwen/Qwen3-0.6B")          # doctest: +SKIP
    >>> program.set_lm(policy)                        # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path,
        *,
        engine: EngineKind = "auto",
        temperature: float = 1.0,
        max_tokens: int | None = 1024,
        engine_options: Mapping[str, object] | None = None,
        version: str = BASE_VERSION,
        num_retries: int = 3,
        use_json_adapter_fallback: bool = False,
        lora_adapter: str | None = None,
        **unknown: object,
    ):
        """Name the model; nothing is loaded or started.

        Args:
            model: A Hugging Face folder or hub name.
            engine: ``"vllm"`` (a server that this package starts), ``"in_process"`` (transformers), or ``"auto"``:
                vLLM where it is installed and there is a GPU, else in process.
            temperature: Of sampling; 1.0 trains the model's own distribution.
            max_tokens: Longest reply, in tokens; None: as far as the model's context goes.
            engine_options: Fields of VLLMSettings or InProcessSettings, e.g. ``{"max_model_len": 8192}``.
            version: Name of these weights.
            num_retries: How often a call that failed is asked again.
            use_json_adapter_fallback: Whether DSPy's adapters may ask again in JSON where a reply does not parse.
                Rollouts never do, so a score with it is no score of what is trained (`dspy_fst.reconfigured`).
            lora_adapter: The LoRA adapter of ``model`` that this LM speaks through, where it has several; None: the
                only one, or the base.
            **unknown: Refused, with the names that were meant.

        Raises:
            ConfigurationError: no model, or an unknown setting, engine or engine options, all of them named.
        """
        own = [name for name in inspect.signature(PolicyLM).parameters if name != "unknown"]
        faults = unknown_arguments(unknown, own)
        if not isinstance(model, str | Path) or not str(model):
            faults.append(f"model={model!r}: name a Hugging Face folder or a hub model")
        if not isinstance(engine_options, Mapping | None):
            faults.append(f"engine_options={engine_options!r}: pass a dict of the engine's settings")
        else:
            try:
                engine_maker(resolve_kind(engine), engine_options or {})
            except ConfigurationError as error:
                faults += error.faults
        if faults:
            raise ConfigurationError(faults)
        self.handle = EngineHandle(str(model), engine, dict(engine_options or {}), version)
        self.lora_adapter = lora_adapter
        speaks = self.handle.through(lora_adapter)
        super().__init__(
            model=str(model),
            engine=speaks,
            async_engine=AsyncHandle(speaks),
            temperature=temperature,
            max_tokens=max_tokens,
            num_retries=num_retries,
            cache=False,
        )
        setattr(self, RECORDED, True)
        self.use_json_adapter_fallback = use_json_adapter_fallback
        self._cache_responses = False  # a predictor's own cache=True would beat LM(cache=False)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        answer = super().__call__(*args, **kwargs)
        if not self.use_json_adapter_fallback:
            no_second_call()
        return answer

    async def acall(self, *args: object, **kwargs: object) -> Any:
        """The same as a call, to be awaited; DSPy's adapters ask once for each reply here too."""
        answer = await super().acall(*args, **kwargs)
        if not self.use_json_adapter_fallback:
            no_second_call()
        return answer

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights that this LM speaks with."""
        return self.handle.checkpoint

    # Not named as their settings are: dspy.LM.copy sets the attribute of a setting's name. It drops a None from kwargs.

    @property
    def sampling_temperature(self) -> float:
        """Of replies for which no predictor asks for another; 1.0 is the model's own distribution."""
        temperature: float = self.kwargs.get("temperature", 1.0)
        return temperature

    @property
    def reply_limit(self) -> int | None:
        """Longest reply, in tokens; None: as far as the model's context goes."""
        longest: int | None = self.kwargs.get("max_tokens")
        return longest

    def _get_initial_kwargs(self, *, temperature: object, max_tokens: object, **kwargs: object) -> dict[str, object]:
        # dspy.LM takes a folder named o3-mini or gpt-5 for OpenAI's model, whose rules and names of settings differ.
        return {"temperature": temperature, "max_tokens": max_tokens, **kwargs}

    def fork(self, checkpoint: Checkpoint | None = None) -> "PolicyLM":
        """The same LM on an engine of its own, so that training it leaves this one as it is."""
        checkpoint = checkpoint or self.checkpoint
        return PolicyLM(
            checkpoint.folder,
            engine=self.handle.kind,
            temperature=self.sampling_temperature,
            max_tokens=self.reply_limit,
            engine_options=self.handle.options,
            version=checkpoint.version,
            num_retries=self.num_retries,
            use_json_adapter_fallback=self.use_json_adapter_fallback,
        )

    def on(self, handle: "EngineHandle", lora_adapter: str | None = None) -> "PolicyLM":
        """A copy with this LM's temperature and limits that speaks through another engine, and a LoRA adapter of it."""
        speaks = handle if lora_adapter is None else handle.through(lora_adapter)
        copy = self.copy(engine=speaks, async_engine=AsyncHandle(speaks))
        copy.handle, copy.lora_adapter = handle, lora_adapter
        return copy

    def move_to(self, handle: "EngineHandle") -> None:
        """Speak through another engine from now on, in place. Copies that were made before stay with theirs."""
        moved = self.on(handle)
        moved.history = self.history
        vars(self).update(vars(moved))
        self.model = str(handle.checkpoint.folder)

    def release(self) -> None:
        """Stop the engine and free its memory; the next call starts it again."""
        self.handle.release()

    # ---- what DSPy's weight optimizers ask: see `dspy_fst.provider` ----

    def infer_provider(self) -> Provider:
        """What trains this LM where DSPy asks for it (`dspy.BootstrapFinetune`, GRPO)."""
        # By name: it stands above everything that trains, and those import this module.
        provider: Provider = imported("dspy_fst.provider.policy_provider").PolicyProvider()
        return provider

    def finetune(
        self,
        train_data: list[dict[str, Any]],
        train_data_format: TrainDataFormat | None,
        train_kwargs: dict[str, Any] | None = None,
    ) -> TrainingJob:
        """Start a supervised job from the weights as they are now; its result is another LM, and this one stays.

        Raises:
            ConfigurationError: data or settings are refused, all faults together; nothing was started.
        """
        self.finetuning_model = str(self.handle.local_folder)  # `model` may name what the training began with
        return super().finetune(train_data, train_data_format, train_kwargs)

    def copy(self, **changes: Any) -> "PolicyLM":
        """A copy. With another ``model`` it has an engine of its own that serves that model, else this LM's engine."""
        copied: PolicyLM = super().copy(**changes)
        if (model := changes.get("model")) is None or str(model) == self.model:
            return copied
        return copied.on(EngineHandle(str(model), self.handle.kind, self.handle.options, BASE_VERSION))

    def dump_state(self) -> dict[str, object]:
        """State for DSPy's save: no keys, addresses or whatever else belongs to the machine (see `engine.options`)."""
        return {
            "_dspy_lm_class": f"{type(self).__module__}.{type(self).__qualname__}",
            "model": str(self.checkpoint.folder),
            "engine": self.handle.kind,
            "engine_options": portable_options(self.handle.options),
            "temperature": self.sampling_temperature,
            "max_tokens": self.reply_limit,
            "num_retries": self.num_retries,
            "version": self.checkpoint.version,
            **({"use_json_adapter_fallback": True} if self.use_json_adapter_fallback else {}),
            **({"lora_adapter": self.lora_adapter} if self.lora_adapter is not None else {}),
        }

    @classmethod
    def load_state(cls, state: Mapping[str, object], *, allow_custom_lm_class: bool = False) -> "PolicyLM":
        """Rebuild from `dump_state`; called by DSPy with ``allow_unsafe_lm_state=True``.

        Raises:
            ConfigurationError: the state sets something else than `dump_state` writes.
        """
        try:
            saved = PolicyState.model_validate({key: state[key] for key in state if key != "_dspy_lm_class"})
        except ValidationError as error:
            raise ConfigurationError([f"saved PolicyLM: {sentence}" for sentence in sentences(error)]) from None
        return cls(**saved.settings(resolve_kind(saved.engine)))


def policy_of(program: dspy.Module) -> PolicyLM:
    """The PolicyLM that a program's trained predictors speak with.

    Raises:
        ValueError: there is none.
    """
    for _, predictor in program.named_predictors():
        if isinstance(predictor.lm, PolicyLM):
            return predictor.lm
    raise ValueError("the program has no PolicyLM; compile it with FSTOptimizer first")


class EngineHandle:
    """DSPy's engine contract over one of our engines, made at the first use.

    Shared by every copy of its LM: ``program.deepcopy()`` copies LMs, and must not start servers.
    """

    def __init__(self, model: str, kind: EngineKind, options: dict[str, object], version: str):
        self.kind, self.options = kind, options
        path = Path(model)
        # A folder is meant where it lies now, also after the working directory changed; else it is a hub name.
        self.checkpoint = Checkpoint.at(version, path.resolve() if path.is_dir() else path)
        self.resolved_kind = resolve_kind(kind)
        self.heard: Callable[[lm15.Request, Completion], None] | None = None
        """Is told every reply that is sampled here, in the thread that asked."""
        self._prove: Callable[[Scorer], object] | None = None
        self._make = engine_maker(self.resolved_kind, options)
        self._engine: Engine | None = None
        self._reader: ReplyReader | None = None
        self._renderer: PromptRenderer | None = None
        self._lock = threading.RLock()

    @property
    def engine(self) -> Engine:
        """The engine, not necessarily started."""
        with self._lock:
            if self._engine is None:
                require_first_rank()
                self._engine = self._make()
                self._unheld = weakref.finalize(self, _close_beside, self._engine)
                self._unheld.atexit = False  # the interpreter ends threads and children itself
            return self._engine

    def ready(self) -> Engine:
        """The engine, serving weights: this handle's own unless others were loaded."""
        with self._lock:
            engine = self.engine
            if engine.weights is None:
                checkpoint = downloaded(self.checkpoint)
                if fault := adapter_fault(checkpoint.path):
                    raise ConfigurationError([f"model={str(self.checkpoint.folder)!r}: {fault}"])
                prove = self._prove or partial(verify_tensors, checkpoint=checkpoint)
                engine.on_recovery(logger.warning, prove if checkpoint.digests else None)
                engine.load(checkpoint)
            return engine

    def prove_by(self, checkpoint: Checkpoint, prove: Callable[[Scorer], object]) -> None:
        """These weights are served, verified when they are loaded next. An engine that runs serves them already.

        Args:
            prove: Raises where an engine serves other weights.
        """
        with self._lock:
            self.checkpoint, self._prove = checkpoint, prove
            if self._engine is not None:
                self._engine.on_recovery(logger.warning, None)  # the last proof may hold a trainer
                self._engine.on_recovery(logger.warning, self._prove)

    @property
    def local_folder(self) -> Path:
        """The folder of its weights on this machine; a hub name is fetched."""
        return downloaded(self.checkpoint).folder

    @property
    def reader(self) -> ReplyReader:
        """How this model writes thoughts and tool calls."""
        with self._lock:
            if self._reader is None:
                self._reader = ReplyReader.load(downloaded(self.checkpoint).path)
            return self._reader

    @property
    def supports_function_calling(self) -> bool:
        """Read by DSPy's adapters: whether tools may go to the chat template instead of the prompt's text."""
        return self.reader.takes_tools

    @property
    def supports_reasoning(self) -> bool:
        """Read by DSPy's adapters: whether a ``dspy.Reasoning`` field is what the model thinks before it answers."""
        return self.reader.thinks

    def asleep(self) -> AbstractContextManager[None]:
        """The engine's GPU memory is free in this block, if it sleeps (``sleep_level``); its calls wait."""
        engine = self.engine
        return engine.asleep() if isinstance(engine, SleepingEngine) else nullcontext()

    def release(self) -> None:
        with self._lock:
            if self._engine is not None:
                self._unheld.detach()
                self._engine.close()
                self._engine = None

    def through(self, lora_adapter: str | None) -> "EngineHandle | AdapterHandle":
        """The same engine, asked through one of its LoRA adapters; None: this handle."""
        return self if lora_adapter is None else AdapterHandle(self, lora_adapter)

    def complete(self, request: lm15.Request, **through: Unpack[Through]) -> lm15.Response:
        return complete_recorded(partial(self.sample, **through), request, _free_seed, continued=self._continued)

    def sample(self, request: lm15.Request, *call: Any, **through: Unpack[Through]) -> Completion:
        """A reply that no rollout records here; ``call`` is a seed and, where they are known, the prompt's ids."""
        # The engine is asked for last: a late call of a rollout that was given up must not start one.
        completion = self.ready().complete(request, *call, **through)
        if self.heard is not None:
            self.heard(request, completion)
        return completion

    def _continued(self, request: lm15.Request, said: Sequence[Ids]) -> Ids | None:
        """The prompt of a conversation that goes on, from the ids that were sampled; see `PromptRenderer.continued`."""
        reader = self.reader
        if reader.tokenizer is None:
            return None
        with self._lock:  # one renderer, as its lock is what keeps threads apart in one tokenizer
            self._renderer = self._renderer or PromptRenderer(reader.tokenizer, reader.traits)
        return self._renderer.continued(request, said)

    def stream(self, request: lm15.Request, **through: Unpack[Through]) -> Iterator[StreamEvent]:
        """The reply's events as it is sampled (``dspy.streamify``); it is recorded as a whole one is."""

        def told(asked: lm15.Request, seed: int, prompt_ids: Ids | None) -> Generator[str, None, Completion]:
            return pieces(self.ready(), self.reader, asked, seed, prompt_ids, **through)

        return events(stream_recorded(told, request, _free_seed, self._continued), request)

    def close(self) -> None:
        """DSPy closes LMs it does not own the engine of; only `release` stops ours."""

    def __deepcopy__(self, memo: dict[int, object]) -> "EngineHandle":
        return self

    def __reduce__(self) -> tuple[object, ...]:
        path, version = str(self.checkpoint.folder), self.checkpoint.version
        return (EngineHandle, (path, self.kind, self.options, version))


def _close_beside(engine: Engine) -> None:
    """Stop an engine whose LM nobody holds any more; in a thread, as the collector may run in one of the engine's."""
    threading.Thread(target=engine.close, name="engine-end", daemon=True).start()


def _free_seed() -> int:
    return secrets.randbits(31)
