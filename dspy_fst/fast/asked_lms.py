"""The LMs that a fast optimizer asks besides the program: what their calls cost, whichever copies of an LM it makes."""

import threading
from collections import Counter

import dspy
from dspy.utils.callback import BaseCallback

from dspy_fst.fast.journal_protocol import SearchJournal, operation_key
from dspy_fst.fast.reflection_cost import CostMeter, counted_in

KIND = "spent"
"""Kind of the journal's entries of what was paid."""


class AskedLMs(BaseCallback):
    """DSPy's callback in an optimizer's context. It meets each LM before its first call there.

    What was paid is recorded after each batch of rollouts, so that it counts too if the process dies.
    """

    def __init__(self, journal: SearchJournal):
        self._journal, self._lock = journal, threading.Lock()
        self._meters: dict[int, tuple[object, CostMeter]] = {}
        self.counts: Counter[str] = Counter()
        """See `dspy_fst.fast.reflection_cost.COUNTS`."""
        self.dollars: float | None = None
        """As far as prices are known; None: no call had a known one."""
        earlier = journal.take_all(KIND)
        self._records = len(earlier)
        for spent in earlier.values():
            self.dollars = counted_in(self.counts, self.dollars, spent)

    def on_lm_start(self, call_id: str, instance: object, inputs: dict[str, object]) -> None:
        with self._lock:
            if id(instance) not in self._meters and isinstance(instance, dspy.BaseLM):
                self._meters[id(instance)] = (instance, CostMeter(instance))

    def record(self) -> None:
        """Count what was paid since the last time."""
        with self._lock:
            meters = [meter for _, meter in self._meters.values()]
        for spent in filter(None, (meter.take() for meter in meters)):
            self.dollars = counted_in(self.counts, self.dollars, spent)
            self._records += 1
            self._journal.record(KIND, operation_key(self._records), spent)
