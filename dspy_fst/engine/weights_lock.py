"""Locks of an engine: many samplers or one loader at a time, so that every reply is sampled by one weight version."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dspy_fst.errors import EngineError


class WeightsLock:
    """Held by any number of samplers, or by one loader alone. A waiting loader goes before samplers that come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._samplers = 0
        self._checkers = 0
        self._loaders_waiting = 0
        self._loading = False

    @property
    def samplers(self) -> int:
        """How many callers wait for tokens now; 0 during a check of the weights, when no token is processed."""
        return 0 if self._checkers else self._samplers

    @contextmanager
    def sampling(self, timeout_s: float) -> Iterator[None]:
        """Keep the weights unchanged during this block.

        Raises:
            EngineError: weights were still being loaded after ``timeout_s`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not (self._loading or self._loaders_waiting), timeout_s):
                raise EngineError(f"a request waited {timeout_s:g} s for a load to finish (request_timeout_s)")
            self._samplers += 1
        try:
            yield
        finally:
            with self._changed:
                self._samplers -= 1
                self._changed.notify_all()

    @contextmanager
    def checking(self, timeout_s: float) -> Iterator[None]:
        """`sampling`, for a caller that inspects the weights and asks for no tokens."""
        with self.sampling(timeout_s):
            with self._changed:
                self._checkers += 1
            try:
                yield
            finally:
                with self._changed:
                    self._checkers -= 1

    @contextmanager
    def loading(self, timeout_s: float, who: str = "a load") -> Iterator[None]:
        """Change the weights in this block, after the requests in flight and before later ones.

        Args:
            timeout_s: Longest wait for them.
            who: Named in the error.

        Raises:
            EngineError: requests or another load were still under way after ``timeout_s`` seconds.
        """
        with self._changed:
            self._wait_for_turn(timeout_s, who)
            self._loading = True
        try:
            yield
        finally:
            with self._changed:
                self._loading = False
                self._changed.notify_all()

    def _wait_for_turn(self, timeout_s: float, who: str) -> None:
        began = time.monotonic()
        self._loaders_waiting += 1
        try:
            self._changed.wait_for(lambda: not (self._loading or self._samplers), timeout_s)
        finally:
            self._loaders_waiting -= 1
            self._changed.notify_all()
        if self._loading or self._samplers:
            holder = "another load" if self._loading else f"{self._samplers} requests in flight"
            raise EngineError(
                f"{who} waited {time.monotonic() - began:.0f} s for {holder} to finish (request_timeout_s)"
            )


class TimedLock:
    """A reentrant lock with a time limit, whose error tells who waited for what.

    Args:
        work: What a holder of the lock does, e.g. ``"load vLLM"``.
        limits: Setting that bounds a part of that work -> seconds. The limit of a wait is their sum.
    """

    def __init__(self, work: str, limits: Mapping[str, float]):
        self.lock = threading.RLock()
        self._work, self._limits = work, limits

    @contextmanager
    def held_by(self, who: str) -> Iterator[None]:
        """Hold the lock in this block.

        Args:
            who: Named in the error, e.g. ``"a request"``.

        Raises:
            EngineError: another thread held the lock for longer than the sum of the limits.
        """
        limit_s = sum(self._limits.values())
        if not self.lock.acquire(timeout=limit_s):
            names = " + ".join(self._limits)
            raise EngineError(f"{who} waited {limit_s:g} s for another thread to {self._work} ({names})")
        try:
            yield
        finally:
            self.lock.release()
