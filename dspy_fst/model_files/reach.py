"""Whether anybody answers at an address: asked once, for a second where a person looks, for longer in a run.

A library that meets silence asks again and again: huggingface_hub 1.33 asks six times for each file that it lacks and
waits 1, 2, 4, 8 and 8 s in between, before it says a word that a user can act on.
"""

import threading
from typing import TYPE_CHECKING

from dspy_fst.errors import briefly

if TYPE_CHECKING:
    import httpx

ANSWER_S = 1.0
"""How long somebody has to answer a look, of `dspy-fst check` or `doctor`: a person waits for it (ours)."""
IN_A_RUN_S = 10.0
"""How long before a run is refused for it: a proxy may look up names and certificates for seconds (ours)."""
NOBODY_BEHIND = (502, 503, 504)
"""Answers of a proxy that stands before a silent server, or of a server that is not up."""


def why_silent(address: str, client: "httpx.Client | None" = None, seconds: float = ANSWER_S) -> str | None:
    """Why nothing can be asked at an address, in a few words; None where something answers, whatever it says.

    Proxies that the environment names are used. The question is asked in a thread: a name server that says nothing
    holds its caller far longer than any time-out of the connection.

    Args:
        address: E.g. ``"https://huggingface.co"``.
        client: Whose proxies and certificates count; None makes one.
        seconds: To wait for the answer.
    """
    import httpx  # here, as the command line's help must come at once

    asking = client or httpx.Client()  # made before the clock starts: reading certificates takes a while
    said: list[str | None] = []
    thread = threading.Thread(target=lambda: said.append(_asked(asking, address, seconds)), name="reach", daemon=True)
    thread.start()
    thread.join(seconds)
    if client is None and not thread.is_alive():
        asking.close()
    return said[0] if said else f"no answer within {seconds:g} s"


def _asked(client: "httpx.Client", address: str, seconds: float) -> str | None:
    import httpx

    try:
        status = client.head(address, timeout=seconds, follow_redirects=False).status_code
    except httpx.TimeoutException:
        return f"no answer within {seconds:g} s"
    except Exception as error:  # a proxy's setting, a certificate, an unknown name, an address that is none
        return briefly(error)
    return f"it answers {status}" if status in NOBODY_BEHIND else None
