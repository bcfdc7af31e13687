"""What the stand-in proposers say of feedback that they cannot read."""

import warnings
from typing import Any

SHOWN = 160
"""Characters of the feedback that is shown."""
UNPARSED = "Your output failed to parse"
"""How DSPy begins the feedback on a reply that did not parse; the run tells of those itself."""


def tell_unread(who: str, feedback: Any, reads: str) -> bool:
    """Warn of feedback that says nothing to a proposer; that on a reply which did not parse is passed over.

    Args:
        who: The proposer.
        feedback: What it could not read.
        reads: What it can read.

    Returns:
        Whether it was told.
    """
    text = " ".join(str(feedback).split())
    if text and not text.startswith(UNPARSED):
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
        warnings.warn(
            f"{who} could not read the feedback {shown!r}. It reads {reads}; of other feedback it learns nothing and "
            "guesses. Let the metric speak so, or name a reflection LM",
            stacklevel=3,
        )
        return True
    return False
