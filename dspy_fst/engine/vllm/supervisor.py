"""Keeps a vLLM server alive: restarts a failed server on the same weights, and repeats the requests that were lost.

The contract of this file:

- A reply that arrived is never requested again.
- A request that the server refuses is never retried.
- A failed server is restarted once, however many threads saw it fail. Nobody samples from the new one before it is
  loaded and verified.
- A swap after which other weights are in use is repaired by a restart on the new weights.
- After ``max_restarts`` every call fails at once.
- While the trainer has the card to itself (`asleep`), calls wait. Afterwards nobody samples before the weights are
  verified again, which the next load does, or else the first call.
- A server that somebody else launched is never restarted. If they have started it anew, it gets the weights again.
"""

import copy
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import TypeVar

from dspy.lm15 import Request
from tenacity import Retrying

from dspy_fst.engine.base import Checkpoint, Completion, Holding, Scorer
from dspy_fst.engine.machine import empty_gpu_cache, has_gpu
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.repeating import repeating
from dspy_fst.engine.vllm.server import VLLMServer, require_checkpoint
from dspy_fst.engine.vllm.server_settings import DROPS_WEIGHTS, VLLMSettings
from dspy_fst.engine.vllm.sleep_mode import UnverifiedWeightsError
from dspy_fst.engine.vllm.stalls import watch
from dspy_fst.engine.weights_lock import TimedLock
from dspy_fst.errors import EngineError, NoAnswerError, ServerDiedError, ServerReplacedError, SyncError
from dspy_fst.model_files.architectures import folder_restart_reason
from dspy_fst.types import WeightsVersion

logger = logging.getLogger(__name__)
T = TypeVar("T")
RELAUNCH_PAUSE_S = 5.0
"""Pause after a failed launch: the last server may not have released its memory and port yet."""
CLOSE_TIMEOUT_S = 60.0


class Supervisor:
    """Engine over a vLLM server that may fail at any time; see the contract above. Thread-safe.

    Args:
        settings: Settings of the server; ``max_restarts`` and ``stall_timeout_s`` are used here.
        make: Makes a server that has not been started.
    """

    def __init__(self, settings: VLLMSettings | None = None, make: Callable[[VLLMSettings], VLLMServer] = VLLMServer):
        self.settings = settings or VLLMSettings()
        self.verify: Callable[[Scorer], object] | None = None
        """Called with a server before anybody samples from it; raises an error if the server's weights are wrong.
        It applies to weights that are loaded after it was set, and runs in the thread that loads or restarts."""
        self.on_event: Callable[[str], None] = logger.warning
        """Called with one sentence per restart, which includes the reason, in the thread that restarts."""
        self.counts: Counter[str] = Counter()
        """Events since the last ``take_counts``: ``"restarts"``, ``"asked again"``, ``"swaps failed"``, and ``"swaps
        refused"`` (other weights were in use afterwards). No failures: ``"restarts for experts"`` (their new weights
        cannot be swapped), ``"restarts for another base"`` (it was started for another one, or other LoRA adapters)."""
        self.server = make(self.settings)
        """The current server. A restart replaces the object, so its identity tells whether a restart has happened."""
        self._make = make
        self._wanted: Checkpoint | None = None
        self._check: Callable[[Scorer], object] | None = None
        self._restarts = 0
        self._unswappable: tuple[str | None] | None = None
        self._refusal: EngineError | None = None
        self._slept = False
        """Whether the server slept since its weights were last verified."""
        self._broken: EngineError | None = None
        """Why it did not fall asleep or wake; it was ended, and the next load or call starts another one."""
        limits = ("startup_timeout_s", "load_timeout_s", "request_timeout_s")
        self._lock = TimedLock("load, restart or wake vLLM", {name: getattr(self.settings, name) for name in limits})
        self._closing = threading.Event()
        self._counting = threading.Lock()

    @property
    def weights(self) -> WeightsVersion | None:
        """The version that is served, or will be after the current load or restart; does not wait for it.

        None before the first load, after a failed load, and after ``close``. Not None during a restart, because a
        caller that sees None loads weights itself (EngineHandle.ready).
        """
        wanted = self._wanted
        return wanted.version if wanted else None

    @property
    def address(self) -> Address | None:
        """Where the current server listens, and its key."""
        return self.server.address

    def load(self, checkpoint: Checkpoint) -> None:
        """Serve these weights. If they cannot be swapped into the running server, it is restarted on them.

        Raises:
            EngineError: the folder or the first launch is at fault, or the restarts are used up. Unless the folder was
                refused, nothing is sampled until a load succeeds.
        """
        require_checkpoint(checkpoint)
        with self._lock.held_by("a load"), self._settling():
            self._raise_refusal()
            self._closing.clear()
            self._wanted, self._check = checkpoint, self.verify
            try:
                if self._broken is not None:
                    self._relaunch(checkpoint, self._broken)
                elif self.server.address is None:
                    self._begin(checkpoint)
                else:
                    self._swap(checkpoint)
            except BaseException:
                self._wanted = None
                raise
            self._restarts = 0

    def complete(
        self, request: Request, seed: int, prompt_ids: tuple[int, ...] | None = None, adapter: str | None = None
    ) -> Completion:
        """Sample one reply, even if the server fails meanwhile; see ``Engine.complete``."""
        return self._ask(lambda server: server.complete(request, seed, prompt_ids, adapter))

    def stream(self, request: Request, seed: int, adapter: str | None = None) -> Generator[str, None, Completion]:
        """`complete`, with the text yielded in pieces. After the first piece the request is not repeated, because the
        caller would get a part of the text twice."""
        with closing(self._serving().stream(request, seed, adapter)) as pieces:
            try:
                first = next(pieces)
            except StopIteration as end:
                return end.value
            except EngineError:  # requested whole instead, with a restart if necessary
                return self.complete(request, seed, adapter=adapter)
            yield first
            return (yield from pieces)

    def score(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1."""
        return self._ask(lambda server: server.score(sequences, adapter))

    def held(self, checkpoint: Checkpoint) -> Holding | None:
        """Compare the weights in use with the folder's; see ``Scorer.held``."""
        return self._ask(lambda server: server.held(checkpoint))

    def expect(self, callers: int) -> None:
        """Nothing to do: vLLM batches whatever is in flight."""

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """The server's GPU memory is free in this block, if it is told to sleep (``sleep_level``).

        Calls in flight are waited for, and later ones wait until the block ends, however it ends. A server that does
        not fall asleep or wake in time is ended; the next load or call starts another one.

        Raises:
            EngineError: another thread loaded or restarted for longer than the limits of that.
        """
        if (level := self.settings.sleep_level) is None or self._wanted is None:
            yield
            return
        with self._lock.held_by("an update"):
            try:
                self._end_unless(lambda: self.server.sleep(level))
                yield
            finally:
                self._slept = True
                try:
                    empty_gpu_cache()  # the server needs the memory that the update leaves unused
                finally:
                    self._end_unless(self.server.wake)

    def on_recovery(self, tell: Callable[[str], None], verify: Callable[[Scorer], object] | None) -> None:
        """Call ``tell`` at each restart, and ``verify`` before anybody samples from a server; None: no check."""
        self.on_event, self.verify = tell, verify
        if verify is None:
            self._check = None

    def take_counts(self) -> Counter[str]:
        """Counts of events since the last call; see `counts`."""
        with self._counting:
            counts, self.counts = self.counts, Counter()
            return counts

    def close(self) -> None:
        """End the server, even one that another thread is starting. May be called twice."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while True:
            self._closing.set()
            self.server.close()  # another thread that uses it now fails, and releases the lock
            if self._lock.lock.acquire(timeout=0.2):
                break
            if time.monotonic() > deadline:
                logger.error("close() ended vLLM, but not the restart in another thread, for %g s", CLOSE_TIMEOUT_S)
                return
        try:
            self._replace_server()
            self._wanted, self._refusal, self._restarts = None, None, 0
            self._slept, self._broken = False, None
        finally:
            self._lock.lock.release()

    # ---- asking ----------------------------------------------------------------------------------

    def _ask(self, ask: Callable[[VLLMServer], T]) -> T:
        while True:
            server = self._serving()
            try:
                return self._retrying(server)(ask, server)
            except UnverifiedWeightsError:
                continue  # it slept since `_serving`, which now waits until they are verified, or does that
            except EngineError as error:
                # If the server was replaced during a request, the request may fail with any error.
                if server is self.server and not isinstance(error, NoAnswerError):
                    raise
                self._restart(server, error)
            self._count("asked again")

    def _serving(self) -> VLLMServer:
        """The current server, with verified weights; waits for a load, restart or update in another thread."""
        with self._lock.held_by("a request"):
            self._raise_refusal()
            if self._wanted is None:
                raise EngineError("no weights are served: call load(checkpoint), again if the last one failed")
            if self._slept:
                self._verify_again(self._wanted)
            return self.server

    def _retrying(self, server: VLLMServer, within_s: float = math.inf) -> Retrying:
        """Repeats a request to a live server, unless it took longer than ``within_s``."""
        lost, died = NoAnswerError, ServerDiedError

        def passes(error: BaseException) -> bool:
            return isinstance(error, lost) and not isinstance(error, died) and server is self.server

        return repeating(passes, self._closing, lambda: self._count("asked again"), within_s)

    # ---- after a sleep ---------------------------------------------------------------------------

    def _end_unless(self, acts: Callable[[], None]) -> None:
        """End a server that does not fall asleep or wake, so that its memory is free in any case."""
        if self._broken is not None or self._closing.is_set():
            return
        try:
            acts()
        except EngineError as error:
            self._broken = error
            self._replace_server()

    def _verify_again(self, wanted: Checkpoint) -> None:
        """Have a server that slept, and was not loaded since, serve these weights for certain."""
        with self._settling():
            if self._broken is not None:
                self._relaunch(wanted, self._broken)
            elif self.settings.sleep_level == DROPS_WEIGHTS:
                self._swap(wanted)
            else:
                try:
                    self._verify()
                except EngineError as error:
                    self._relaunch(wanted, error)

    @contextmanager
    def _settling(self) -> Iterator[None]:
        """Let this thread alone use a server that slept, and all threads once the block ends without an error."""
        with self.server.doubt.settling() if self._slept else nullcontext():
            yield
        self._slept, self._broken = False, None

    # ---- starting again --------------------------------------------------------------------------

    def _begin(self, checkpoint: Checkpoint) -> None:
        self._launch(checkpoint)
        try:
            self._verify()
        except NoAnswerError as error:  # the server died during the check, so its weights are still unknown
            self._relaunch(checkpoint, error)

    def _swap(self, checkpoint: Checkpoint) -> None:
        """Swap the weights in place. If that fails, or other weights are served afterwards, restart on these."""
        if self.settings.attach_url is None and (why := self._restart_reason(checkpoint)):
            what, reason = why
            self._count(f"restarts for {what}")
            logger.info("vLLM is started again on weights %s: %s", checkpoint.version, reason)
            self._replace_server(keep_log=False)
            self._begin(checkpoint)
            return
        cause: EngineError
        try:
            if self.settings.attach_url is None:
                self._take(checkpoint)
            else:  # it cannot be restarted, and the same publish may be made twice
                self._retrying(self.server, self.settings.load_timeout_s)(self._take, checkpoint)
            return
        except ServerReplacedError as error:
            cause = error
        except SyncError as error:
            self._count("swaps refused")
            cause = error
        except EngineError as error:
            self._count("swaps failed")
            cause = EngineError(f"the weights could not be swapped: {error}")
        self._relaunch(checkpoint, cause)

    def _take(self, checkpoint: Checkpoint) -> None:
        self.server.load(checkpoint)
        self._verify()

    def _verify(self) -> None:
        if self._check is not None:
            self._check(self.server)

    def _restart_reason(self, checkpoint: Checkpoint) -> tuple[str, str] | None:
        """What needs a restart instead of a swap, and why; None if nothing does."""
        if reason := self.server.restart_reason(checkpoint):
            return "another base", reason
        if checkpoint.adapters:  # their base stays as it is
            return None
        if self._unswappable is None:  # computed at the first swap only, because all versions are of one model
            self._unswappable = (folder_restart_reason(checkpoint.path, on_gpu=has_gpu()),)
        experts = self._unswappable[0]
        return ("experts", experts) if experts else None

    def _restart(self, failed: VLLMServer, cause: EngineError) -> None:
        """Replace a failed server, unless another thread has already done so."""
        with self._lock.held_by("a request"):
            self._raise_refusal()
            if failed is self.server and self._wanted is not None:
                self._relaunch(self._wanted, cause)

    def _relaunch(self, checkpoint: Checkpoint, cause: EngineError) -> None:
        """Start servers until one serves these weights.

        Raises:
            EngineError: the restarts are used up; or the server is somebody else's, and they have not started it anew.
        """
        if self.settings.attach_url is not None and not isinstance(cause, ServerReplacedError):
            raise cause
        while True:
            self._spend_restart(checkpoint.version, cause)
            self._replace_server()
            try:
                self._launch(checkpoint)
                self._refuse_unsound()
                return
            except EngineError as error:
                if self._refusal is not None:
                    raise
                cause = error
            self._closing.wait(RELAUNCH_PAUSE_S)

    def _replace_server(self, *, keep_log: bool = True) -> None:
        """End the server. Its successor takes its place first, so that failing requests see that it was replaced."""
        failed, self.server = self.server, self._make(self.settings)
        failed.close(keep_log=keep_log)

    def _launch(self, checkpoint: Checkpoint) -> None:
        self.server.load(checkpoint)
        if not self.settings.elsewhere:
            watch(self.server, self.settings.stall_timeout_s)

    def _refuse_unsound(self) -> None:
        try:
            self._verify()
        except NoAnswerError:
            raise  # the server failed again, so its weights are still unknown
        except BaseException as error:
            broke = EngineError(f"the check of the weights failed: {error!r}")
            self._refusal = error if isinstance(error, EngineError) else broke
            self._replace_server()
            raise

    def _spend_restart(self, version: WeightsVersion, cause: EngineError) -> None:
        limit, reason = self.settings.max_restarts, str(cause).partition("\n")[0].rstrip(":")
        if self._closing.is_set():
            raise EngineError(f"the engine was closed by another thread; before that, {reason}") from cause
        if self._restarts >= limit:
            self._refusal = EngineError(
                f"vLLM failed again after {limit} restarts on weights {version} (max_restarts). Last: {cause}"
            )
            self._replace_server()
            self._raise_refusal()
        self._restarts += 1
        self._count("restarts")
        does = f"given weights {version} again" if self.settings.attach_url else f"started again on weights {version}"
        self.on_event(f"vLLM is {does} (restart {self._restarts} of {limit}): {reason}")

    def _raise_refusal(self) -> None:
        """Raise the final error, if there is one."""
        if self._refusal is not None:
            raise copy.copy(self._refusal)  # a copy, because threads would extend each other's traceback

    def _count(self, what: str) -> None:
        with self._counting:
            self.counts[what] += 1
