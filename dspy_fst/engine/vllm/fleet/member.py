"""One server of a fleet, which may be lost and come back while the others go on.

The contract of this file:

- A server is lost when a request to it fails for good, when it hangs, when it does not load new weights, or when who
  launched it has started it anew.
- A call that waits for a lost server fails with `LostError` at once, so that it can be asked elsewhere; a reply that
  arrives later is dropped.
- A lost server comes back by itself: one that was launched here is restarted, within `max_restarts`; one that somebody
  else launched is attached to again as soon as it answers. Either way it takes the weights that are due, verified,
  before it is asked again.
- A server whose restarts are used up, or that serves other weights than it was given, is gone for good.
"""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import Literal, TypeVar

from dspy_fst.engine.base import Checkpoint
from dspy_fst.engine.call_threads import Threads
from dspy_fst.engine.vllm.fleet.alike import require_kind
from dspy_fst.engine.vllm.fleet.roster import Due, Roster
from dspy_fst.engine.vllm.server import VLLMServer
from dspy_fst.engine.vllm.server_settings import VLLMSettings
from dspy_fst.engine.vllm.stalls import watch
from dspy_fst.engine.vllm.supervisor import CLOSE_TIMEOUT_S, Supervisor
from dspy_fst.errors import DiskError, EngineError, NoAnswerError, SyncError
from dspy_fst.run.settling import settle

T = TypeVar("T")
RETURN_PAUSE_S = 5.0
"""Between two attempts to attach to a lost server again."""
_WAITS = Threads("fleet-call")
"""In which calls wait for servers that run elsewhere: such a server cannot be killed to end its calls."""


class LostError(EngineError):
    """The server of this call is lost; another one may answer."""


class FleetServer(Supervisor):
    """A supervisor whose calls do not wait for a restart; see the contract above. Thread-safe.

    Args:
        settings: Of this server alone.
        make: Makes a server that has not been started.
        name: In messages, e.g. ``"server 2 of 3"``.
        roster: The fleet's.
    """

    def __init__(self, settings: VLLMSettings, make: Callable[[VLLMSettings], VLLMServer], name: str, roster: Roster):
        super().__init__(settings, make)
        self.name, self._roster = name, roster
        self.in_flight = 0
        """Calls that the fleet has given it."""
        self.state: Literal["up", "lost", "gone"] = "up"
        self.why = ""
        """Why it is lost or gone."""
        self._taken: Due | None = None
        """What it loaded last."""
        self._waiting: set[Callable[[BaseException], None]] = set()
        """What fails each call that waits in `ask`."""
        self._mender: threading.Thread | None = None

    @property
    def attached(self) -> bool:
        """Whether somebody else launched it."""
        return self.settings.attach_url is not None

    def take(self, due: Due) -> None:
        """Serve these weights, verified; see `Supervisor.load`."""
        self._taken = None
        self.on_recovery(self._tell, due.check)
        self.load(due.checkpoint)
        self._taken = due

    def ask(self, ask: Callable[[Supervisor], T]) -> T:
        """What the server answers.

        Raises:
            LostError: it is lost.
        """
        if not self.settings.elsewhere:
            return ask(self)
        answer: Future[T] = Future()
        with self._roster.changed:
            self._refuse_lost()
            self._waiting.add(answer.set_exception)
        _WAITS.start(partial(contextvars.copy_context().run, settle, answer, partial(ask, self)))
        try:
            return answer.result()  # `ask` has time limits of its own
        finally:
            with self._roster.changed:
                self._waiting.discard(answer.set_exception)

    def lose(self, failed: VLLMServer, cause: BaseException) -> None:
        """Give its calls back and have it come back in a thread of its own; does nothing if that is under way.

        Args:
            failed: The server that failed, which may have been replaced since.
        """
        with self._roster.changed:
            if self.state != "up" or failed is not self.server or self._roster.closed:
                return
            self.state, self.why = "lost", _first_line(cause)
            waiting, self._waiting = self._waiting, set()
            self._mender = threading.Thread(
                target=self._mend, args=(failed, cause), name=f"mends {self.name}", daemon=True
            )
            self._roster.changed.notify_all()
        self._count("servers lost")
        for fail in waiting:
            with suppress(InvalidStateError):  # it arrived just now
                fail(LostError(f"{self.name} is lost: {self.why}"))
        self._tell(f"it is lost, and its calls are asked elsewhere: {self.why}")
        self._mender.start()

    def close(self) -> None:
        """End it, and whatever brings it back. May be called twice."""
        mender = self._mender
        super().close()
        if mender is not None and mender.is_alive() and mender is not threading.current_thread():
            mender.join(CLOSE_TIMEOUT_S)
            super().close()  # it may have been about to start another server

    # ---- what the supervisor leaves to a fleet ---------------------------------------------------

    def _restart(self, failed: VLLMServer, cause: EngineError) -> None:
        """Instead of a restart in the thread of the call that failed."""
        self.lose(failed, cause)
        raise LostError(f"{self.name} is lost: {_first_line(cause)}") from cause

    def _relaunch(self, checkpoint: Checkpoint, cause: EngineError) -> None:
        """One that somebody else launched comes back by `_attach_again`, however often they start it anew."""
        if self.attached:
            raise cause
        super()._relaunch(checkpoint, cause)

    def _launch(self, checkpoint: Checkpoint) -> None:
        """A lost server starts on the weights that are due by now: the folder of what it served may be removed."""
        if self.state == "lost" and (due := self._roster.due) is not None:
            checkpoint, self._wanted, self._check = due.checkpoint, due.checkpoint, due.check
        super()._launch(checkpoint)
        if self.settings.elsewhere:
            watch(self.server, self.settings.stall_timeout_s, self._stalls)

    def _stalls(self, server: VLLMServer, reason: str) -> None:
        self.lose(server, NoAnswerError(reason))

    # ---- coming back, in a thread of its own -----------------------------------------------------

    def _mend(self, failed: VLLMServer, cause: BaseException) -> None:
        try:
            if self.attached:
                self._attach_again()
            else:
                if failed is self.server and self._taken is not None:
                    super()._restart(failed, EngineError(str(cause)))
                self._catch_up()
        except Exception as error:
            self._leave(error)

    def _attach_again(self) -> None:
        """Try again and again, until the server serves what is due or the fleet is closed."""
        self._let_go()
        while not self._closing.wait(RETURN_PAUSE_S) and not self._roster.closed:
            try:
                if (kind := self._roster.kind) is not None:
                    require_kind(self.settings, kind)
                self._catch_up()
                return
            except (SyncError, DiskError):
                raise
            except EngineError as error:  # it does not answer yet, or was started anew once more
                why, self.why = self.why, _first_line(error)
                if self.why != why and not isinstance(error, NoAnswerError):
                    self._tell(f"it does not come back yet: {self.why}")
                self._let_go()

    def _let_go(self) -> None:
        with self._lock.held_by("a lost server"):
            self._taken = None
            self._replace_server()

    def _catch_up(self) -> None:
        """Take what is due, until nothing else became due meanwhile."""
        roster = self._roster
        while True:
            with roster.changed:
                due = roster.settled()
            if due is None:
                return
            if due is not self._taken:
                self.take(due)
            with roster.changed:
                if roster.due is due and not roster.publishing:
                    self.state, self.why = "up", ""
                    roster.changed.notify_all()
                    break
        self._tell(f"it is back, and serves weights {due.checkpoint.version}, verified")

    def _leave(self, error: Exception) -> None:
        with self._roster.changed:
            self.state, self.why = "gone", _first_line(error)
            self._roster.changed.notify_all()
        if not self._roster.closed:
            self._tell(f"it does not come back: {error}")

    def _refuse_lost(self) -> None:
        if self.state != "up":
            raise LostError(f"{self.name} is lost: {self.why}")

    def _tell(self, sentence: str) -> None:
        self._roster.tell(f"{self.name}: {sentence}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(":")
