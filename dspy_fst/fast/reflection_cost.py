"""What the reflection LM's calls cost, in dollars: the price that litellm knows for the model, as DSPy records it."""

from collections.abc import Mapping, Sequence

import dspy


class CostMeter:
    """Adds up the cost of one LM's calls, beginning when the meter is made.

    Replies from DSPy's cache cost nothing. Calls that DSPy has dropped from the LM's history (``max_history_size``), or
    never recorded, are not counted.
    """

    def __init__(self, lm: dspy.LM | None):
        self._lm = lm
        self._before = {entry.get("uuid") for entry in self._history()}

    @property
    def dollars(self) -> float | None:
        """The sum so far; None when no call had a known price."""
        new = [entry for entry in self._history() if entry.get("uuid") not in self._before]
        paid = [entry["cost"] for entry in new if not getattr(entry.get("response"), "cache_hit", False)]
        known = [float(cost) for cost in paid if isinstance(cost, int | float)]
        return sum(known) if known else None

    def _history(self) -> Sequence[Mapping[str, object]]:
        return list(getattr(self._lm, "history", None) or ())
