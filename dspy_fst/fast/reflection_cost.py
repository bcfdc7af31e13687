"""What the reflection LM's calls cost: tokens, and dollars where the price is known, from DSPy's history of the LM.

Through LiteLLM (``dspy.LM(..., engine="litellm")``, or where DSPy chooses it) the price is LiteLLM's, to which
``litellm.register_model`` adds. DSPy's own engine looks into its copy of the same list. A price that nobody knows is
unknown, and never 0.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import dspy

CALLS, UNPRICED, UNMEASURED = "reflection_calls", "reflection_calls_unpriced", "reflection_calls_without_usage"
READ, WRITTEN = "reflection_input_tokens", "reflection_output_tokens"
DOLLARS = "dollars"
COUNTS = (CALLS, UNPRICED, UNMEASURED, READ, WRITTEN)
"""What a search counts of the reflection LM's calls: all, those without a known price, those whose tokens the provider
did not report, and the tokens of the others."""
TOKENS = {READ: ("prompt_tokens", "input_tokens"), WRITTEN: ("completion_tokens", "output_tokens")}
"""Count -> its names in a call's usage: of chat completions, and of responses."""


class CostMeter:
    """Adds up what one LM's calls cost, whichever thread makes them.

    Replies from DSPy's cache cost nothing. Calls that DSPy never recorded (``disable_history``), or has dropped from
    the LM's history meanwhile (``max_history_size``), are not seen.
    """

    def __init__(self, lm: dspy.BaseLM | None):
        self._lm = lm
        self._seen: set[object] = set()
        self.take()

    def take(self) -> dict[str, float]:
        """What the calls since the last `take` cost: `COUNTS` that are not 0, and `DOLLARS` where a call had a known
        price, which may be 0."""
        entries = self._history()
        new = [entry for entry in entries if entry.get("uuid") not in self._seen]
        self._seen = {entry.get("uuid") for entry in entries}
        spent: Counter[str] = Counter()
        for entry in new:
            if not _from_cache(entry):
                spent.update(_of_call(entry))
        priced = spent[CALLS] > spent[UNPRICED]
        return {name: amount for name, amount in spent.items() if amount or (name == DOLLARS and priced)}

    def _history(self) -> Sequence[Mapping[str, object]]:
        return list(getattr(self._lm, "history", None) or ())


def counted_in(counts: Counter[str], dollars: float | None, spent: Mapping[str, float]) -> float | None:
    """Add what was spent to the counts.

    Returns:
        The dollars so far, None as long as no call had a known price.
    """
    counts.update({name: int(amount) for name, amount in spent.items() if name in COUNTS})
    return (dollars or 0.0) + spent[DOLLARS] if DOLLARS in spent else dollars


def _of_call(entry: Mapping[str, object]) -> dict[str, float]:
    usage, cost = entry.get("usage"), entry.get("cost")
    priced = isinstance(cost, int | float)
    tokens = {name: _reported(usage, of) for name, of in TOKENS.items()}
    return {
        CALLS: 1,
        UNPRICED: int(not priced),
        UNMEASURED: int(None in tokens.values()),
        DOLLARS: float(cost) if isinstance(cost, int | float) else 0.0,
        **{name: amount or 0 for name, amount in tokens.items()},
    }


def _reported(usage: object, names: Sequence[str]) -> int | None:
    if not isinstance(usage, Mapping):
        return None
    return next((int(usage[name]) for name in names if isinstance(usage.get(name), int | float)), None)


def _from_cache(entry: Mapping[str, object]) -> bool:
    """Whether DSPy's cache gave the reply. Its entry has the cost of the first time, and no usage."""
    answered = entry.get("response")
    replies = answered if isinstance(answered, list | tuple) else (answered,)
    return any(
        getattr(reply, "cache_hit", False) or (not entry.get("usage") and getattr(reply, "usage", None))
        for reply in replies
    )
