"""Keeps a vLLM server alive: one that failed is started again on the same weights, lost requests are asked again.

The contract of this file: a reply that arrived is never asked for again; a request that the server refuses is
never retried; a server is restarted once, however many threads saw it fail, and nobody samples from it before it
is loaded and verified; a swap that leaves other weights in use is mended by a restart on the new ones; after
``max_restarts`` every call fails at once. A server that somebody else launched is never restarted, only asked again.
"""

import copy
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TypeVar

from dspy.lm15 import Request
from tenacity import Retrying, retry_if_exception, sleep_using_event, stop_after_attempt, wait_exponential, wait_random

from dspy_fst.engine.base import Checkpoint, Completion, Holding, Scorer
from dspy_fst.engine.devices import has_gpu
from dspy_fst.engine.vllm.client import Address, NoAnswerError
from dspy_fst.engine.vllm.server import ServerDiedError, VLLMServer, require_checkpoint
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.engine.vllm.watchdog import watch
from dspy_fst.engine.weights_lock import TimedLock
from dspy_fst.errors import EngineError, SyncError
from dspy_fst.model_files.architectures import folder_restart_reason
from dspy_fst.types import WeightsVersion

logger = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 5
"""How often one request is put to a server that lives before that server counts as failed."""
FIRST_WAIT_S, LONGEST_WAIT_S, JITTER_S = 0.5, 8.0, 0.5
"""Between attempts: 0.5 s, 1 s, 2 s ... and a random part, so that not all threads ask at once."""
RELAUNCH_PAUSE_S = 5.0
"""After a launch that failed: what the last server held (memory, a port) may still be on its way back."""
CLOSE_TIMEOUT_S = 60.0


class Supervisor:
    """Engine over a vLLM server that may fail at any time; see the contract above. Thread-safe.

    Args:
        settings: Of the server; ``max_restarts`` and ``stall_timeout_s`` are read here.
        make: Makes a server that is not started yet.
    """

    def __init__(self, settings: VLLMSettings | None = None, make: Callable[[VLLMSettings], VLLMServer] = VLLMServer):
        self.settings = settings or VLLMSettings()
        self.verify: Callable[[Scorer], None] | None = None
        """Checks a server (which it is given) before anybody samples, and raises when it is unsound.

        It belongs to the weights that are loaded after it was set. It runs in the thread that loads or restarts."""
        self.on_event: Callable[[str], None] = logger.warning
        """Told one sentence per restart, with the reason, in the thread that restarts."""
        self.counts: Counter[str] = Counter()
        """Since the last ``take_counts``: ``"restarts"``, ``"asked again"``, ``"swaps failed"``, ``"swaps refused"``
        (they left other weights in use than they should), ``"restarts for experts"`` (no failure: their new weights are
        not swapped)."""
        self.server = make(self.settings)
        """The server of the moment. A restart puts another in its place: its identity tells restarts apart."""
        self._make = make
        self._wanted: Checkpoint | None = None
        self._check: Callable[[Scorer], None] | None = None
        self._restarts = 0
        self._unswappable: tuple[str | None] | None = None
        self._refusal: EngineError | None = None
        limits = ("startup_timeout_s", "load_timeout_s", "request_timeout_s")
        self._turn = TimedLock("load or restart vLLM", {name: getattr(self.settings, name) for name in limits})
        self._closing = threading.Event()
        self._counting = threading.Lock()

    @property
    def weights(self) -> WeightsVersion | None:
        """The version that is served, or will be when the load or restart under way is through; does not wait.

        None before the first load, after one that failed, and after ``close``. Not None during a restart: who
        sees None loads weights of its own (EngineHandle.ready).
        """
        wanted = self._wanted
        return wanted.version if wanted else None

    @property
    def address(self) -> Address | None:
        """Where the server of the moment listens, and its key."""
        return self.server.address

    def load(self, checkpoint: Checkpoint) -> None:
        """Serve these weights; a server whose weights cannot be swapped is started afresh on them.

        Raises:
            EngineError: the folder or the first launch is at fault, or the restarts are used up. Unless the folder
                was refused, nothing is sampled until a load succeeds.
        """
        require_checkpoint(checkpoint)
        with self._turn.held_by("a load"):
            self._raise_refusal()
            self._closing.clear()
            self._wanted, self._check = checkpoint, self.verify
            try:
                change = self._begin if self.server.address is None else self._swap
                change(checkpoint)
            except BaseException:
                self._wanted = None
                raise
            self._restarts = 0

    def complete(self, request: Request, seed: int, prompt_ids: tuple[int, ...] | None = None) -> Completion:
        """Sample one reply, however the server fails meanwhile; see ``Engine.complete``."""
        rendered = () if prompt_ids is None else (prompt_ids,)
        return self._persist(lambda server: server.complete(request, seed, *rendered))

    def stream(self, request: Request, seed: int) -> Generator[str, None, Completion]:
        """`complete`, its text told in pieces; once one was told nothing is asked again: it would be heard twice."""
        with closing(self._serving().stream(request, seed)) as pieces:
            try:
                first = next(pieces)
            except StopIteration as end:
                return end.value
            except EngineError:  # asked whole, which starts a server again where there is need
                return self.complete(request, seed)
            yield first
            return (yield from pieces)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1."""
        return self._persist(lambda server: server.score(sequences))

    def held(self, checkpoint: Checkpoint) -> Holding | None:
        """Compare the weights in use with the folder's; see ``Scorer.held``."""
        return self._persist(lambda server: server.held(checkpoint))

    def expect(self, callers: int) -> None:
        """Nothing to do: vLLM batches whatever is in flight."""

    def on_recovery(self, tell: Callable[[str], None], verify: Callable[[Scorer], None] | None) -> None:
        """Tell each restart, and verify the restarted server before anybody samples from it; None: not any more."""
        self.on_event, self.verify = tell, verify
        if verify is None:
            self._check = None

    def take_counts(self) -> Counter[str]:
        """What happened since the last call."""
        with self._counting:
            counts, self.counts = self.counts, Counter()
            return counts

    def close(self) -> None:
        """End the server, also one that another thread is starting. May be called twice."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while True:
            self._closing.set()
            self.server.close()  # whatever another thread does with it fails now, so that the thread lets go
            if self._turn.lock.acquire(timeout=0.2):
                break
            if time.monotonic() > deadline:
                logger.error("close() ended vLLM, but not the restart in another thread, for %g s", CLOSE_TIMEOUT_S)
                return
        try:
            self._replace_server()
            self._wanted, self._refusal, self._restarts = None, None, 0
        finally:
            self._turn.lock.release()

    # ---- asking ----------------------------------------------------------------------------------

    def _persist(self, ask: Callable[[VLLMServer], T]) -> T:
        while True:
            server = self._serving()
            try:
                return self._retrying(server)(ask, server)
            except EngineError as error:
                # A server that is replaced under a request may fail it with any error.
                if server is self.server and not isinstance(error, NoAnswerError):
                    raise
                self._restart(server, error)
            self._count("asked again")

    def _serving(self) -> VLLMServer:
        """The server to ask, once nobody loads or restarts it."""
        with self._turn.held_by("a request"):
            self._raise_refusal()
            if self._wanted is None:
                raise EngineError("no weights are served: call load(checkpoint), again if the last one failed")
            return self.server

    def _retrying(self, server: VLLMServer) -> Retrying:
        """Puts a request several times to a server that lives."""

        def may_pass(error: BaseException) -> bool:
            gone = isinstance(error, ServerDiedError) or server is not self.server
            return isinstance(error, NoAnswerError) and not gone

        return Retrying(
            retry=retry_if_exception(may_pass),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(FIRST_WAIT_S, max=LONGEST_WAIT_S) + wait_random(0, JITTER_S),
            sleep=sleep_using_event(self._closing),
            before_sleep=lambda _: self._count("asked again"),
            reraise=True,
        )

    # ---- starting again --------------------------------------------------------------------------

    def _begin(self, checkpoint: Checkpoint) -> None:
        self._launch(checkpoint)
        try:
            if self._check is not None:
                self._check(self.server)
        except NoAnswerError as error:  # it died of the check, which says nothing of its weights
            if self.settings.attach_url is not None:
                raise
            self._relaunch(checkpoint, error)

    def _swap(self, checkpoint: Checkpoint) -> None:
        """Swap the weights in place; where that fails, or other weights are served then, start afresh on these."""
        if self.settings.attach_url is None and (reason := self._restart_reason(checkpoint)):
            self._count("restarts for experts")
            logger.info("vLLM is started again on weights %s: %s", checkpoint.version, reason)
            self._replace_server(keep_log=False)
            self._begin(checkpoint)
            return
        cause: EngineError
        try:
            self.server.load(checkpoint)
            if self._check is not None:
                self._check(self.server)
            return
        except SyncError as error:
            self._count("swaps refused")
            cause = error
        except EngineError as error:
            self._count("swaps failed")
            cause = EngineError(f"the weights could not be swapped: {error}")
        if self.settings.attach_url is not None:
            raise cause
        self._relaunch(checkpoint, cause)

    def _restart_reason(self, checkpoint: Checkpoint) -> str | None:
        """`folder_restart_reason`, read at the first swap: an engine serves versions of one model."""
        if self._unswappable is None:
            self._unswappable = (folder_restart_reason(checkpoint.path, on_gpu=has_gpu()),)
        return self._unswappable[0]

    def _restart(self, failed: VLLMServer, cause: EngineError) -> None:
        """Replace a server that failed, unless another thread has done so."""
        if self.settings.attach_url is not None:
            raise cause
        with self._turn.held_by("a request"):
            self._raise_refusal()
            if failed is self.server and self._wanted is not None:
                self._relaunch(self._wanted, cause)

    def _relaunch(self, checkpoint: Checkpoint, cause: EngineError) -> None:
        """Start servers until one stands on these weights; raises EngineError when none may be started any more."""
        while True:
            self._spend_restart(checkpoint.version, cause)
            self._replace_server()
            try:
                self._launch(checkpoint)
                if self._check is not None:
                    self._refuse_unsound(self._check)
                return
            except EngineError as error:
                if self._refusal is not None:
                    raise
                cause = error
            self._closing.wait(RELAUNCH_PAUSE_S)

    def _replace_server(self, *, keep_log: bool = True) -> None:
        """End the server; put the next in its place first, so that requests that still fail see that it is gone."""
        failed, self.server = self.server, self._make(self.settings)
        failed.close(keep_log=keep_log)

    def _launch(self, checkpoint: Checkpoint) -> None:
        self.server.load(checkpoint)
        if self.settings.attach_url is None:
            watch(self.server, self.settings.stall_timeout_s)

    def _refuse_unsound(self, check: Callable[[Scorer], None]) -> None:
        try:
            check(self.server)
        except NoAnswerError:
            raise  # it failed again, which says nothing of its weights
        except BaseException as error:
            self._refusal = (
                error if isinstance(error, EngineError) else EngineError(f"the check of the weights failed: {error!r}")
            )
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
        self.on_event(f"vLLM is started again on weights {version} (restart {self._restarts} of {limit}): {reason}")

    def _raise_refusal(self) -> None:
        """Fail at once when nothing more is tried. A copy: threads would write in each other's traceback."""
        if self._refusal is not None:
            raise copy.copy(self._refusal)

    def _count(self, what: str) -> None:
        with self._counting:
            self.counts[what] += 1
