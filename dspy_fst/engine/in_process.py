"""The in-process engine: transformers in this process, with concurrent calls batched together.

Batches are deterministic for programs that make one LM call at a time, so a resumed run can equal an uninterrupted one:
a batch begins when every caller in flight waits for it (not after a fixed time), its rows are sorted, and each row is
sampled from its own seeded generator. A caller that makes no call for ``linger_s`` seconds is not waited for.

Replies are handed out as they end. On a GPU calls join those that are still sampled, at tokens that are counted and
not timed: calls that found no room when the batch began, once a quarter of its rows has ended; later calls, once in
`JOIN_AFTER` tokens, when every caller waits again.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from dspy import lm15

from dspy_fst.engine.base import QUEUEING, Checkpoint, Completion, Holding, PromptTokens, Scorer
from dspy_fst.engine.chat import text_response
from dspy_fst.engine.generation import Pending, Reply, SideBySide
from dspy_fst.engine.loaded_model import LoadedModel
from dspy_fst.engine.lora import using, using_by_row
from dspy_fst.engine.options import InProcessSettings
from dspy_fst.engine.replies import with_logprobs
from dspy_fst.errors import EngineError, TrainingError
from dspy_fst.types import WeightsVersion

UNLIMITED_REPLY = 1024
"""Longest reply, in tokens, of a model without a context limit (Mamba, Bloom) if the call sets none; as in PolicyLM."""

JOIN_AFTER = 64
"""Tokens after which later calls may join a batch (ours). Its rows stand still until every caller waits, e.g. for a
tool. That is little beside the time of so many tokens, and much beside that of a few."""
JOIN_ON = frozenset({"cuda"})
"""Devices on which calls join those of callers in flight. On a CPU each row costs its width, and joining took 2.2 times
the processor time of waves (`benchmarks.joining`)."""


class InProcessEngine(LoadedModel):
    """Engine over ``transformers``; see `dspy_fst.engine.base.Engine` for the contract."""

    def __init__(self, settings: InProcessSettings | None = None):
        super().__init__(settings or InProcessSettings())
        self._lock = threading.Condition()
        self._model_lock = threading.Lock()
        self._pending: list[Pending] = []
        self._callers = 0
        self._sampled = 0
        """Calls whose replies are being sampled."""
        self._away = 0
        """Callers that a batch last waited for in vain."""
        self._others = 0
        """Threads that wait for the model between two batches."""
        self._worker: threading.Thread | None = None
        self._closed = False
        self._moved_at = 0.0
        """``time.monotonic()`` at which the queue last moved: a call was gathered, or a batch began."""
        self._verify: Callable[[Scorer], object] | None = None

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
            self._away = min(self._away, callers)
            self._callers = callers
            self._wake()

    def count_prompts(self) -> Callable[[], PromptTokens]:
        counted = PromptTokens() if self._decoder is None else self._decoder.prompt_tokens  # new weights count anew
        before = replace(counted)
        return lambda: PromptTokens(counted.in_calls - before.in_calls, counted.read - before.read)

    def load(self, checkpoint: Checkpoint) -> None:
        with self._between_batches():
            try:
                self._take(checkpoint)
                self._start_worker()
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
        with self._between_batches():
            return self._compare(checkpoint)

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
        with self._between_batches(), self._using(self._through(adapter)):
            return [self._token_logprobs(sequence) for sequence in sequences]

    def on_recovery(self, tell: Callable[[str], None], verify: Callable[[Scorer], object] | None) -> None:
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
        self._let_go()

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

    @contextmanager
    def _between_batches(self) -> Iterator[None]:
        """A block in which nothing is sampled. Calls that are sampled are finished first, and no more join them."""
        with self._lock:
            self._others += 1
        try:
            with self._model_lock:
                yield
        finally:
            with self._lock:
                self._others -= 1
                self._lock.notify_all()

    def _start_worker(self) -> None:
        self._closed = False
        if self._worker is None or not self._worker.is_alive():
            self._worker = threading.Thread(target=self._serve, name="in-process-engine", daemon=True)
            self._worker.start()

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: (self._pending and not self._others) or self._closed)
                waiting = self._gather()
            if self._closed:
                self._refuse(waiting)
                return
            with self._model_lock:
                self._sample(waiting)

    def _wake(self) -> None:
        """Wake the worker if it has something to do. Waking it for every call would cost more than the calls."""
        if len(self._pending) == 1 or self._missing() <= self._away:
            self._lock.notify_all()

    def _missing(self) -> int:
        """Callers in flight that neither wait nor are sampled."""
        return self._callers - self._sampled - len(self._pending)

    def _gather(self) -> list[Pending]:
        """Take the calls that wait, sorted, when every caller in flight has made one, or none came for ``linger_s``.

        Rows that are sampled do not stand still a second time for callers that were waited for in vain.
        """
        seen, away = -1, self._away if self._sampled else 0
        while seen < len(self._pending) and self._missing() > away and not self._closed:
            seen, self._moved_at = len(self._pending), time.monotonic()
            self._lock.wait_for(lambda: self._closed or self._missing() <= away, timeout=self.settings.linger_s)
        self._away = max(self._missing(), 0)
        calls, self._pending = self._pending, []
        return sorted(calls, key=lambda call: ("" if self._mixes else call.adapter or "", call.order))

    def _sample(self, waiting: list[Pending]) -> None:
        """Sample replies to these calls, and to those that join them."""
        batch = SideBySide(self._decoder, self._eos())
        while waiting or batch.calls:
            if not batch.calls and (self._closed or self._others):
                with self._lock:
                    self._pending = [*waiting, *self._pending]
                return
            count = self._room(batch, waiting)
            joining, waiting = waiting[:count], waiting[count:]
            self._answer(batch, joining, waiting)
            if batch.calls and not waiting:
                with self._lock:
                    waiting = self._gather()

    def _answer(self, batch: SideBySide, joining: list[Pending], waiting: list[Pending]) -> None:
        """Sample until more calls may join, and hand out the replies that end."""
        calls = [*batch.calls, *joining]
        self._begin(joining, len(calls))
        try:
            with self._using_those_of(calls):
                batch.admit(joining)
                while calls and not self._may_join(batch, waiting):
                    for call, reply in batch.step():
                        reply.weights = self._version or ""
                        self._hand_out(call, reply)
                    self._give_up_late(batch)
                    calls = batch.calls
        except Exception as error:  # every caller waits for an answer, whatever went wrong
            batch.drop(calls)
            for call in calls:
                self._hand_out(call, EngineError(f"the in-process engine failed: {error!r}"))

    def _room(self, batch: SideBySide, waiting: list[Pending]) -> int:
        return batch.room_for(waiting, self.settings.max_batch_tokens, mixed=self._mixes)

    def _may_join(self, batch: SideBySide, waiting: list[Pending]) -> bool:
        """Whether the model has come to a token at which calls may join: with callers in flight time has no part in it.

        What waits for the model comes first, so that nothing joins then.
        """
        if not batch.steps or not self._decoder.joins or self._others or self._closed:
            return False
        if not waiting and not self._callers:
            return bool(self._pending)
        if self._decoder.device.type not in JOIN_ON:
            return False
        if 4 * batch.ended < len(batch.calls):
            return False
        return batch.steps >= JOIN_AFTER if not waiting else self._room(batch, waiting) > 0

    def _give_up_late(self, batch: SideBySide) -> None:
        """Drop the calls that have been sampled for longer than ``timeout_s``."""
        began_before = time.monotonic() - self.settings.timeout_s
        late = [call for call in batch.calls if call.began_at < began_before]
        if late:
            batch.drop(late)
        for call in late:
            self._hand_out(call, EngineError("the call was given up: it was sampled for longer than timeout_s"))

    def _hand_out(self, call: Pending, answer: Reply | EngineError) -> None:
        with self._lock:
            self._sampled -= 1
        if isinstance(answer, EngineError):
            call.reply.set_exception(answer)
        else:
            call.reply.set_result(answer)

    def _begin(self, calls: list[Pending], sampled: int) -> None:
        """Start the time limit of calls that join."""
        with self._lock:
            self._sampled = sampled
        self._moved_at = now = time.monotonic()
        for call in calls:
            call.began_at = now
            call.begun.set()

    def _refuse(self, calls: list[Pending]) -> None:
        for call in calls:
            call.reply.set_exception(EngineError("the in-process engine was closed"))

    def _eos(self) -> frozenset[int]:
        return frozenset() if self._reader is None else self._reader.stop_ids
