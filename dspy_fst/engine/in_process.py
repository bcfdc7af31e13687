"""The in-process engine: transformers in this process, with concurrent calls batched together.

Batches are deterministic for programs that make one LM call at a time, so a resumed run can equal an uninterrupted one:
a batch runs when every caller in flight waits for it (not after a fixed time), its rows are sorted, and each row is
sampled from its own seeded generator. A caller that makes no call for ``linger_s`` seconds is not waited for.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from dspy import lm15
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from dspy_fst.engine.base import QUEUEING, Checkpoint, Completion, Holding, Scorer
from dspy_fst.engine.chat import PromptRenderer, text_response
from dspy_fst.engine.generation import BatchDecoder, Pending, Reply, cut, generate
from dspy_fst.engine.holding import compare, compare_adapters, head_in_float32
from dspy_fst.engine.lora import put_on_as_read, take_off, takes_rows, using, using_by_row
from dspy_fst.engine.machine import has_gpu
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.engine.replies import ReplyReader, with_logprobs
from dspy_fst.errors import EngineError, TrainingError
from dspy_fst.model_files.architectures import context_length, load_model_with_info
from dspy_fst.model_files.folder import folder_faults, layer_fault
from dspy_fst.types import WeightsVersion

UNLIMITED_REPLY = 1024
"""Longest reply, in tokens, of a model without a context limit (Mamba, Bloom) if the call sets none; as in PolicyLM."""

SCORED_AT_ONCE = 64
"""Number of tokens whose logits are normalised at once (ours): 39 MiB with a vocabulary of 150k."""


class InProcessEngine:
    """Engine over ``transformers``; see `dspy_fst.engine.base.Engine` for the contract."""

    def __init__(self, settings: InProcessSettings | None = None):
        self.settings = settings or InProcessSettings()
        self._version: WeightsVersion | None = None
        self._checkpoint: Checkpoint | None = None
        """What the model holds; unlike ``_version`` it may not have been verified."""
        self._base_compared: Path | None = None
        """The base whose tensors were compared since it was read."""
        self._model: Any = None
        self._decoder: Any = None
        self._mixes = False
        """Whether one batch may hold calls of several LoRA adapters and of the base."""
        self._context: int | None = None
        self._tokenizer: Any = None
        self._reader: ReplyReader | None = None
        self._renderer: PromptRenderer | None = None
        self._lock = threading.Condition()
        self._model_lock = threading.Lock()
        self._pending: list[Pending] = []
        self._callers = 0
        self._worker: threading.Thread | None = None
        self._closed = False
        self._moved_at = 0.0
        """``time.monotonic()`` at which the queue last moved: a call was gathered, or a batch began."""
        self._verify: Callable[[Scorer], None] | None = None

    @property
    def weights(self) -> WeightsVersion | None:
        return self._version

    @property
    def context(self) -> int | None:
        """Tokens of prompt and reply together; None where the model has no limit, and before the first load."""
        return self._context

    def expect(self, callers: int) -> None:
        """Set how many rollouts are in flight; a batch waits for that many calls."""
        with self._lock:
            self._callers = callers
            self._wake()

    def load(self, checkpoint: Checkpoint) -> None:
        with self._model_lock:
            try:
                self._take(checkpoint)
            except (OSError, ValueError, RuntimeError, TrainingError) as error:
                raise EngineError(
                    f"weights {checkpoint.version} at {checkpoint.folder} do not load: {error}"
                ) from error
            self._version = checkpoint.version
        try:
            if self._verify is not None:
                self._verify(self)
        except BaseException:
            self._version = None
            raise

    def held(self, checkpoint: Checkpoint) -> Holding:
        with self._model_lock:
            if self._model is None:
                raise EngineError("the in-process engine has no weights yet: load a checkpoint first")
            try:
                adapters = compare_adapters(self._model, checkpoint.adapters)
                if checkpoint.adapters and self._base_compared == checkpoint.path:
                    return adapters
                base = compare(self._model, checkpoint.path)
            except (OSError, SafetensorError) as error:
                raise EngineError(
                    f"weights {checkpoint.version} at {checkpoint.folder} cannot be read: {error}"
                ) from error
            self._base_compared = None if base.wrong else checkpoint.path
            return Holding({**base.digests, **adapters.digests}, {**base.wrong, **adapters.wrong}, base.dtype)

    def complete(
        self, request: lm15.Request, seed: int, prompt_ids: tuple[int, ...] | None = None, adapter: str | None = None
    ) -> Completion:
        if request.config.logprobs:
            raise lm15.UnsupportedFeatureError(
                f"top_logprobs={request.config.logprobs}: the in-process engine tells the log-probabilities of the "
                "sampled tokens only; leave top_logprobs out, or use engine='vllm'"
            )
        prompt = self._render(request) if prompt_ids is None else prompt_ids
        temperature = 1.0 if request.config.temperature is None else request.config.temperature
        longest = self._longest_reply(prompt, request.config.max_tokens)
        call = Pending(prompt, longest, temperature, seed, self._through(adapter))
        with self._lock:
            if self._closed:
                raise EngineError("the in-process engine was closed")
            self._pending.append(call)
            self._wake()
        reply = self._reply_to(call)
        # The text excludes the stop token, which need not be a special token. A server excludes it, too.
        content_ids = reply.ids[:-1] if reply.finish_reason == "stop" else reply.ids
        text = self._tokenizer.decode(content_ids, skip_special_tokens=True)
        response = text_response(request.model, text, reply.finish_reason, len(prompt), len(reply.ids))
        tokens = (prompt, tuple(reply.ids), tuple(reply.logprobs))
        completion = Completion(response, *tokens, reply.finish_reason, reply.weights)
        if request.config.logprobs is not None:
            completion = with_logprobs(completion, [self._tokenizer.decode([number]) for number in reply.ids])
        if self._reader is None or not (self._reader.thinks or request.tools):  # there is nothing to divide
            return completion
        return self._reader.read(completion, request)

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        with self._model_lock, self._using(self._through(adapter)):
            return [self._token_logprobs(sequence) for sequence in sequences]

    def _token_logprobs(self, sequence: Sequence[int]) -> list[float]:
        """Scores one sequence, in parts: the logits of all its tokens may need too much memory at once."""
        if len(sequence) < 2:
            return []
        ids = torch.tensor([[*sequence]], device=self._model.device)
        logits = self._model(input_ids=ids).logits[0, :-1]
        parts = zip(logits.split(SCORED_AT_ONCE), ids[0, 1:].split(SCORED_AT_ONCE), strict=True)
        chosen = [part.float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0] for part, wanted in parts]
        return torch.cat(chosen).tolist()

    def on_recovery(self, tell: Callable[[str], None], verify: Callable[[Scorer], None] | None) -> None:
        """Verify the weights that are loaded next. This engine never recovers: it fails with its process."""
        self._verify = verify

    def take_counts(self) -> Counter[str]:
        return Counter()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._worker is not None:
            self._worker.join(timeout=self.settings.timeout_s)
        self._model = self._decoder = self._tokenizer = self._reader = self._renderer = self._version = None
        self._checkpoint = self._base_compared = None

    def _reply_to(self, call: Pending) -> Reply:
        """Wait for the batch of a call to begin, then for at most ``timeout_s`` for its reply.

        Raises:
            EngineError: the batch takes longer, failed, or never began because the one before it is stuck.
        """
        # A batch is given up at the first token after timeout_s. One that outlasts this is stuck inside the model.
        stuck_s = 2 * self.settings.timeout_s + self.settings.linger_s
        with QUEUEING.get()():
            while not call.begun.wait(max(self._deadline(call, stuck_s) - time.monotonic(), 0.0)):
                if time.monotonic() >= self._deadline(call, stuck_s):
                    raise EngineError(
                        f"the in-process engine's queue has not moved for {stuck_s:g} s: the batch that runs is stuck"
                    )
        if not call.reply.done():
            left = call.began_at + self.settings.timeout_s - time.monotonic()
            try:
                return call.reply.result(timeout=max(left, 0.0))
            except TimeoutError as error:
                raise EngineError(
                    f"no reply from the in-process engine within {self.settings.timeout_s:g} s (timeout_s)"
                ) from error
        return call.reply.result()

    def _deadline(self, call: Pending, limit_s: float) -> float:
        return max(self._moved_at, call.arrived_at) + limit_s

    # ---- one batch at a time -------------------------------------------------------------------

    def _start(self, checkpoint: Checkpoint) -> None:
        device = self.settings.device or ("cuda" if has_gpu() else "cpu")
        dtype = self.settings.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False)
        if faults := list(folder_faults(checkpoint.path)):
            raise EngineError(f"weights {checkpoint.version} at {checkpoint.path} are not served: {'; '.join(faults)}")
        self._reader = ReplyReader.of(self._tokenizer, checkpoint.path)
        self._renderer = PromptRenderer(self._tokenizer, self._reader.traits)
        self._read(checkpoint, device, dtype)
        self._closed = False
        if self._worker is None or not self._worker.is_alive():
            self._worker = threading.Thread(target=self._serve, name="in-process-engine", daemon=True)
            self._worker.start()

    def _take(self, checkpoint: Checkpoint) -> None:
        """Hold the weights of a checkpoint. A base that is held already is not read again for other adapters on it."""
        if self._model is None:
            self._start(checkpoint)
        elif not (checkpoint.adapters and self._checkpoint and self._checkpoint.path == checkpoint.path):
            self._replace_weights(checkpoint)
        self._version = None  # an error from here on may leave a part of the new weights in the model
        former = self._checkpoint.adapters if self._checkpoint else ()
        for name in {adapter.name for adapter in former} - {adapter.name for adapter in checkpoint.adapters}:
            take_off(self._model, name)
        for adapter in checkpoint.adapters:
            put_on_as_read(self._model, adapter.name, adapter.path)
        self._mixes = len(checkpoint.adapters) > 1 and takes_rows(self._model)
        self._checkpoint = checkpoint

    def _replace_weights(self, checkpoint: Checkpoint) -> None:
        """Replace the served whole weights, or the base, by others of the same model."""
        stored = load_file(checkpoint.path / "model.safetensors")
        self._version = self._base_compared = None
        if stored.keys() == self._model.state_dict().keys():
            self._model.load_state_dict(stored)
            return
        # The tensors have other names or shapes on disk (experts, for example), or adapters are on the model.
        del stored
        device, dtype = self._model.device, self._model.dtype
        self._model = self._decoder = self._checkpoint = None  # frees memory for the new model
        self._read(checkpoint, str(device), dtype)

    def _read(self, checkpoint: Checkpoint, device: str, dtype: str | torch.dtype) -> None:
        model, info = load_model_with_info(checkpoint.path, dtype=dtype)
        if fault := layer_fault(info):
            raise EngineError(f"weights {checkpoint.version} at {checkpoint.path} are not served: {fault}")
        served: nn.Module = model  # transformers decorates its own `to`, and its type is lost there
        self._model = served.to(device).eval()
        head_in_float32(self._model, checkpoint.path)
        self._decoder = BatchDecoder(self._model)
        self._context = context_length(self._model.config)

    def _using(self, adapter: str | None) -> AbstractContextManager[None]:
        """A block in which the model computes with this LoRA adapter, or as its base does."""
        with_adapters = self._checkpoint is not None and self._checkpoint.adapters
        return using(self._model, adapter) if with_adapters else nullcontext()

    def _using_those_of(self, batch: Sequence[Pending]) -> AbstractContextManager[None]:
        """A block in which the model computes each call of a batch with its own LoRA adapter."""
        if len({call.adapter for call in batch}) == 1:
            return self._using(batch[0].adapter)
        self._decoder.adapters[:] = [call.adapter for call in batch]
        return using_by_row(self._model, self._decoder.adapters)

    def _through(self, adapter: str | None) -> str | None:
        """The adapter that a call goes through, see `Checkpoint.adapter`."""
        try:
            found = self._checkpoint.adapter(adapter) if self._checkpoint else None
        except ValueError as error:
            raise EngineError(str(error)) from error
        return found.name if found else None

    def _longest_reply(self, prompt: tuple[int, ...], wanted: int | None) -> int:
        """Longest reply, in tokens, to a prompt; ``wanted`` is the call's own limit."""
        if self._context is None:
            return wanted or UNLIMITED_REPLY
        available = self._context - len(prompt)
        if available <= 0:
            raise lm15.ContextLengthError(
                f"the prompt has {len(prompt)} tokens and the model's context {self._context}"
            )
        return min(wanted or available, available)

    def _render(self, request: lm15.Request) -> tuple[int, ...]:
        if self._reader is None or self._renderer is None:
            raise EngineError("the in-process engine has no weights yet: load a checkpoint first")
        if request.tools:
            self._reader.check(request)
        return self._renderer.ids(request)

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._pending or self._closed)
                self._gather()
                calls, self._pending = self._pending, []
                if self._closed:
                    self._refuse(calls)
                    return
            for batch in cut(calls, self.settings.max_batch_tokens, mixed=self._mixes):
                self._answer(batch)

    def _wake(self) -> None:
        """Wake the worker if it has something to do. Waking it for every call would cost more than the calls."""
        if len(self._pending) == 1 or len(self._pending) >= self._callers:
            self._lock.notify_all()

    def _gather(self) -> None:
        """Wait until every caller in flight has made a call, or no new call came for ``linger_s``."""
        seen = 0
        while seen < len(self._pending) < self._callers and not self._closed:
            seen, self._moved_at = len(self._pending), time.monotonic()
            self._lock.wait_for(self._complete, timeout=self.settings.linger_s)

    def _complete(self) -> bool:
        return self._closed or len(self._pending) >= self._callers

    def _answer(self, batch: list[Pending]) -> None:
        if self._closed:
            self._refuse(batch)
            return
        try:
            with self._model_lock, self._using_those_of(batch):
                began_at = self._begin(batch)
                replies = generate(
                    self._decoder,
                    self._eos(),
                    batch,
                    lambda: time.monotonic() - began_at > self.settings.timeout_s,
                )
                for reply in replies:
                    reply.weights = self._version or ""
        except Exception as error:  # every caller waits for an answer, whatever went wrong
            for call in batch:
                call.reply.set_exception(EngineError(f"the in-process engine failed: {error!r}"))
            return
        for call, reply in zip(batch, replies, strict=True):
            call.reply.set_result(reply)

    def _begin(self, batch: list[Pending]) -> float:
        """Start the time limit of a batch's callers."""
        self._moved_at = now = time.monotonic()
        for call in batch:
            call.began_at = now
            call.begun.set()
        return now

    def _refuse(self, calls: list[Pending]) -> None:
        for call in calls:
            call.reply.set_exception(EngineError("the in-process engine was closed"))

    def _eos(self) -> frozenset[int]:
        return frozenset() if self._reader is None else self._reader.stop_ids
