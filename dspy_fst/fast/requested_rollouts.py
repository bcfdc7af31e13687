"""Rollouts that a fast optimizer asks for one by one, by calling a program from any of its threads.

The optimizer runs in a thread of its own, and may start others. The search's own thread makes the rollouts that they
wait for, all of them together: a batch of the engine holds what is asked for at the same time. Bank, journal and
listeners are used by that thread alone, and Ctrl-C reaches it.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field

from dspy_fst.fast.rollout_bank import UnorderedBank, key_of
from dspy_fst.rollout.rollouter import Task
from dspy_fst.types import Candidate, Rollout

GATHER_S = 0.005
"""Seconds that a batch waits for one more request (ours): an evaluation's threads ask a moment apart."""
UNWIND_S = 60.0
"""Seconds that an optimizer has to return when its budget is spent (ours); its later calls are refused."""
LET_GO_S = 5.0
"""Seconds that are waited for its thread to end (ours)."""


class SearchOver(BaseException):
    """The budget is spent, or the run stops. No Exception: optimizers catch those, score 0 and go on."""


@dataclass
class _Request:
    task: Task
    answered: threading.Event = field(default_factory=threading.Event)
    rollout: Rollout | None = None


class _Returned:
    """The optimizer's thread has ended."""


class RequestedRollouts:
    """Makes the requested rollouts of one search, within its budget.

    Args:
        bank: Makes each rollout once.
        budget: Fresh rollouts that may be made.
        at_once: Requests that can wait at the same time.
    """

    def __init__(self, bank: UnorderedBank, budget: int, at_once: int):
        self._bank, self._budget, self._at_once = bank, budget, at_once
        self._before = len(bank.fresh)
        self._requests: queue.SimpleQueue[_Request | _Returned] = queue.SimpleQueue()
        self._over = threading.Event()
        self.seen: dict[str, Candidate] = {}
        """Digest -> every candidate that a rollout was made under, in order."""
        self.cut = False
        """Whether the budget ended the search."""

    @property
    def left(self) -> int:
        """Fresh rollouts that may still be made."""
        return self._budget - (len(self._bank.fresh) - self._before)

    def request(self, task: Task) -> Rollout:
        """One rollout; waits until it is made. Called in the optimizer's threads.

        Raises:
            SearchOver: no more rollouts are made.
        """
        if self._over.is_set():
            raise SearchOver
        request = _Request(task)
        self._requests.put(request)
        while not request.answered.wait(1.0):
            if self._over.is_set():  # it came while the last batch was taken
                raise SearchOver
        if request.rollout is None:
            raise SearchOver
        return request.rollout

    def serve(self, search: Callable[[], None], after: Callable[[], None] = lambda: None) -> BaseException | None:
        """Run the search in a thread, and make rollouts in this one until it ends.

        Args:
            after: Called after each batch of rollouts.

        Returns:
            What the search raised; None if it ended by itself or at its budget.

        Raises:
            MeasurementError: nothing is measured any more.
        """
        raised: list[BaseException] = []

        def run() -> None:
            try:
                search()
            except SearchOver:
                pass
            except BaseException as error:
                raised.append(error)
            finally:
                self._requests.put(_Returned())

        thread = threading.Thread(target=copy_context().run, args=(run,), name="fast optimizer", daemon=True)
        thread.start()
        try:
            while requests := self._gathered():
                self._make(requests)
                after()
        finally:
            self._over.set()
            thread.join(LET_GO_S)
        # An optimizer may turn the end into an error of its own, e.g. that too many calls failed.
        return raised[0] if raised and not self.cut else None

    def _gathered(self) -> list[_Request]:
        """The next batch; empty when the search has ended or has had its time to."""
        requests: list[_Request] = []
        while len(requests) < self._at_once:
            try:
                new = self._requests.get(timeout=GATHER_S if requests else UNWIND_S if self.cut else None)
            except queue.Empty:
                break
            if isinstance(new, _Returned):
                for request in requests:
                    request.answered.set()
                return []
            requests.append(new)
        return requests

    def _make(self, requests: Sequence[_Request]) -> None:
        """Answer requests, in an order that does not depend on time; without a rollout where the budget is spent."""
        in_order = sorted(requests, key=lambda request: key_of(request.task))
        beyond = {
            key_of(task) for task in self._bank.lacks([request.task for request in in_order])[max(0, self.left) :]
        }
        made = [request for request in in_order if key_of(request.task) not in beyond]
        for request, rollout in zip(made, self._bank.get([request.task for request in made]), strict=True):
            request.rollout = rollout
            self.seen.setdefault(rollout.candidate.digest, rollout.candidate)
        if len(made) < len(requests):
            self.cut = True
            self._over.set()
        for request in requests:
            request.answered.set()
