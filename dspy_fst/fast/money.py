"""What an LM's calls cost, as DSPy keeps it: the price that litellm knows for the model, in dollars."""

import dspy


class Meter:
    """Adds up the calls of one LM from now on.

    Answers of DSPy's cache cost nothing. Calls that DSPy does not keep any more (``max_history_size``), or was told not
    to keep, are not known.
    """

    def __init__(self, lm: dspy.LM | None):
        self._lm = lm
        self._before = {entry.get("uuid") for entry in self._history()}

    @property
    def dollars(self) -> float | None:
        """None when no call had a price."""
        made = [entry for entry in self._history() if entry.get("uuid") not in self._before]
        paid = [entry["cost"] for entry in made if not getattr(entry.get("response"), "cache_hit", False)]
        known = [float(cost) for cost in paid if isinstance(cost, int | float)]
        return sum(known) if known else None

    def _history(self) -> list[dict]:
        return list(getattr(self._lm, "history", None) or ())
