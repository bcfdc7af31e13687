"""One engine over several vLLM servers, of which any may fail at any time.

The contract of this file:

- A call goes to the server that has read most of its prompt, or to the one with least to do (`affinity`).
- A call whose server is lost is asked elsewhere with the same seed. A reply that arrived is never asked for again.
- A publish waits for the calls in flight. Later calls wait until every server serves the new weights, verified.
- The first publish needs all servers. A later one leaves behind a server that does not answer, which comes back when it
  serves what is due then (`member`). Wrong weights on any server stop the publish.
- If no server is left that could come back, every call fails at once.
"""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TypeVar

from dspy.lm15 import Request

from dspy_fst.engine.base import Checkpoint, Completion, Holding, Scorer
from dspy_fst.engine.vllm.address import Address
from dspy_fst.engine.vllm.fleet.affinity import Routes, beginnings
from dspy_fst.engine.vllm.fleet.alike import require_alike
from dspy_fst.engine.vllm.fleet.each import members_of
from dspy_fst.engine.vllm.fleet.member import FleetServer, LostError
from dspy_fst.engine.vllm.fleet.roster import Due, Roster
from dspy_fst.engine.vllm.lora_versions import UNLOADED
from dspy_fst.engine.vllm.server import VLLMServer, require_checkpoint
from dspy_fst.engine.vllm.server_settings import VLLMSettings, vllm_faults
from dspy_fst.engine.vllm.supervisor import Supervisor
from dspy_fst.engine.weights_lock import WeightsLock
from dspy_fst.errors import EngineError, SyncError
from dspy_fst.run.settling import settle_in_thread
from dspy_fst.types import WeightsVersion

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Fleet:
    """Engine over several vLLM servers; see the contract above. Thread-safe.

    Args:
        settings: Of all of them: ``servers``, or several addresses in ``attach_url``.
        make: Makes a server that has not been started.
    """

    def __init__(self, settings: VLLMSettings, make: Callable[[VLLMSettings], VLLMServer] = VLLMServer):
        self.settings = settings
        self._roster = Roster()
        self._changed = self._roster.changed
        each = members_of(settings)
        names = [_name(number, len(each), one) for number, one in enumerate(each, 1)]
        self.members = [FleetServer(one, make, name, self._roster) for one, name in zip(each, names, strict=True)]
        self._routes: Routes[FleetServer] = Routes()
        self._gate = WeightsLock()
        """Held by each call, and by a publish alone."""
        self._wanted: Checkpoint | None = None
        self._verify: Callable[[Scorer], object] | None = None
        self._counts: Counter[str] = Counter()

    @property
    def weights(self) -> WeightsVersion | None:
        """The version that is served, or will be after the current load; see `Supervisor.weights`."""
        wanted = self._wanted
        return wanted.version if wanted else None

    @property
    def address(self) -> Address | None:
        """Where the next call would go, for other clients; None if no server is up. Each call of it takes a turn."""
        with self._changed:
            up = self._up()
            return self._routes.choose((), up).address if up else None

    def load(self, checkpoint: Checkpoint) -> None:
        """Serve these weights on every server; see ``Engine.load``.

        Raises:
            EngineError: at the first load some server cannot start; later, none is left.
            SyncError, DiskError: some server serves other weights than these.
        """
        require_checkpoint(checkpoint)
        with self._gate.loading(self.settings.request_timeout_s, "a publish"):
            due = Due(checkpoint, self._verify)
            first, self._wanted = self._wanted is None, checkpoint
            try:
                if first and not any(member.address for member in self.members):
                    self._begin(due)
                else:
                    self._publish(due)
            except BaseException:
                self._wanted = None
                raise

    def complete(
        self, request: Request, seed: int, prompt_ids: tuple[int, ...] | None = None, adapter: str | None = None
    ) -> Completion:
        """Sample one reply, even if its server fails meanwhile; see ``Engine.complete``."""
        prompt = beginnings(request, adapter)
        return self._ask(prompt, lambda member: member.complete(request, seed, prompt_ids, adapter))

    def stream(self, request: Request, seed: int, adapter: str | None = None) -> Generator[str, None, Completion]:
        """`complete`, with the text yielded in pieces. After the first piece the request is not repeated."""
        prompt = beginnings(request, adapter)
        with self._serving():
            while True:
                with self._turn(prompt) as member, closing(member.stream(request, seed, adapter)) as pieces:
                    try:
                        first = next(pieces)
                    except StopIteration as end:
                        return end.value
                    except LostError:
                        self._count_moved()
                        continue
                    yield first
                    return (yield from pieces)

    def score(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        """Log-probability of every token but the first of each sequence, at temperature 1, by one of the servers."""
        return self._ask((), lambda member: member.score(sequences, adapter))

    def held(self, checkpoint: Checkpoint) -> Holding | None:
        """Compare the weights in use with the folder's on every server that is up; see ``Scorer.held``.

        Returns:
            A server's whose weights are wrong or were read as something else, if there is one; else the first one's.
        """
        with self._serving():
            found = [member.held(checkpoint) for member in self._require_up()]
        known = [holding for holding in found if holding is not None]
        if len(known) < len(found):
            return None
        return next((one for one in known if one.wrong or one.digests != known[0].digests), known[0])

    def expect(self, callers: int) -> None:
        """Nothing to do: vLLM batches whatever is in flight."""

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """The servers' GPU memory is free in this block; see `Supervisor.asleep`."""
        with ExitStack() as stack:
            for member in self.members:
                if member.state != "gone":
                    stack.enter_context(member.asleep())
            yield

    def on_recovery(self, tell: Callable[[str], None], verify: Callable[[Scorer], object] | None) -> None:
        """Call ``tell`` whenever a server is lost, restarted or back, and ``verify`` before anybody samples from it.

        Servers are verified side by side, each in a thread of its own.
        """
        self._roster.tell, self._verify = tell, verify
        if verify is None:
            with self._changed:
                if (due := self._roster.due) is not None:
                    self._roster.due = Due(due.checkpoint, None)
            for member in self.members:
                member.on_recovery(member.on_event, None)

    def take_counts(self) -> Counter[str]:
        """Counts of events since the last call: each `Supervisor`'s, ``"asked elsewhere"`` and ``"servers lost"``."""
        with self._changed:
            counts, self._counts = self._counts, Counter()
        return sum((member.take_counts() for member in self.members), counts)

    def close(self) -> None:
        """End the servers that were launched here, side by side. May be called twice."""
        with self._changed:
            self._roster.closed, self._roster.due, self._wanted = True, None, None
            self._changed.notify_all()
        _together({member: member.close for member in self.members})

    # ---- asking ----------------------------------------------------------------------------------

    def _ask(self, prompt: Sequence[int], ask: Callable[[Supervisor], T]) -> T:
        with self._serving():
            while True:
                with self._turn(prompt) as member:
                    try:
                        return member.ask(ask)
                    except EngineError as error:  # one of a server that is lost may fail in any way
                        if member.state == "up" and not isinstance(error, LostError):
                            raise
                self._count_moved()

    @contextmanager
    def _serving(self) -> Iterator[None]:
        with self._gate.sampling(self.settings.request_timeout_s):
            if self._wanted is None:
                raise EngineError(UNLOADED)
            yield

    @contextmanager
    def _turn(self, prompt: Sequence[int]) -> Iterator[FleetServer]:
        """A server for one call, which is counted as in flight there."""
        with self._changed:
            member = self._routes.choose(prompt, self._require_up())
            member.in_flight += 1
        try:
            yield member
        finally:
            with self._changed:
                member.in_flight -= 1

    def _require_up(self) -> list[FleetServer]:
        """The servers that can be asked; waits for one to come back where that is to be hoped."""
        limit_s = self.settings.startup_timeout_s + self.settings.load_timeout_s
        with self._changed:
            self._changed.wait_for(lambda: self._up() or not self._any_comes_back(), limit_s)
            if up := self._up():
                return up
            reasons = "; ".join(f"{member.name}: {member.why or 'closed'}" for member in self.members)
            waited = f" and none came back within {limit_s:g} s" if self._any_comes_back() else ""
            raise EngineError(f"all servers are lost{waited}: {reasons}")

    def _up(self) -> list[FleetServer]:
        return [] if self._roster.closed else [member for member in self.members if member.state == "up"]

    def _any_comes_back(self) -> bool:
        return not self._roster.closed and any(member.state == "lost" for member in self.members)

    def _count_moved(self) -> None:
        with self._changed:
            self._counts["asked elsewhere"] += 1

    # ---- publishing ------------------------------------------------------------------------------

    def _begin(self, due: Due) -> None:
        """Start all servers. One that does not start is a fault of the settings, which fewer servers would hide."""
        if faults := vllm_faults(self.settings):
            raise EngineError("cannot start vLLM: " + "; ".join(faults))
        kind = require_alike(self.settings)
        with self._changed:
            self._roster.closed, self._roster.kind = False, kind
            for member in self.members:
                member.state = "up"
        failed = _together({member: partial(member.take, due) for member in self.members})
        for error in failed.values():
            self.close()
            raise error
        self._settle(due)

    def _publish(self, due: Due) -> None:
        with self._changed:
            self._require_up()  # a publish that reached no server would leave nobody to ask
            self._roster.publishing, up = True, self._up()
        published: Due | None = None
        try:
            failed = _together({member: partial(member.take, due) for member in up})
            for error in failed.values():
                if len(failed) == len(up) or isinstance(error, SyncError) or not isinstance(error, EngineError):
                    raise error
            published = due
        finally:
            self._settle(published)
        for member, error in failed.items():
            member.lose(member.server, error)

    def _settle(self, due: Due | None) -> None:
        with self._changed:
            self._roster.due, self._roster.publishing = due, False
            self._routes.forget_all()
            self._changed.notify_all()


def _name(number: int, of: int, settings: VLLMSettings) -> str:
    cards = f"cards {', '.join(map(str, settings.cards))}" if settings.cards else None
    where = settings.attach_url or ("on Ray" if settings.on_ray else cards)
    return f"server {number} of {of}" + (f" ({where})" if where else "")


def _together(jobs: Mapping[FleetServer, Callable[[], object]]) -> dict[FleetServer, BaseException]:
    """Run jobs side by side, each in a thread; what failed. A signal ends the wait, as it does for a single server."""
    futures: dict[FleetServer, Future[object]] = {}
    for member, job in jobs.items():
        futures[member] = future = Future[object]()
        settle_in_thread(future, job, f"fleet {member.name}")
    wait(futures.values())
    return {member: error for member, future in futures.items() if (error := future.exception()) is not None}
