"""Whether an address answers. It is asked once: for a second where a person waits, for longer in a run.

Libraries retry for long when nothing answers. huggingface_hub 1.33 asks seven times for each missing file, and waits 1,
2, 4, 8 and 8 s in between, before it raises an error that a user can act on.
"""

import threading
from typing import TYPE_CHECKING

from dspy_fst.errors import briefly

if TYPE_CHECKING:
    import httpx

ANSWER_S = 1.0
"""Limit in `dspy-fst check` and `doctor`, where a person waits for the answer (ours)."""
IN_A_RUN_S = 10.0
"""Limit before a run is refused: a proxy may need seconds to look up names and certificates (ours)."""
NOBODY_BEHIND = (502, 503, 504)
"""Answers of a proxy whose server is silent, or of a server that is not up."""


def why_silent(address: str, client: "httpx.Client | None" = None, seconds: float = ANSWER_S) -> str | None:
    """Why an address cannot be reached, in a few words; None if anything answers there, whatever the status.

    The environment's proxies are used. The request runs in a thread, because a silent name server blocks its caller far
    longer than any time-out of the connection.

    Args:
        address: E.g. ``"https://huggingface.co"``.
        client: Its proxies and certificates are used; None makes a client.
        seconds: Limit of the wait.
    """
    import httpx  # imported here, so that the command line's help appears at once

    http = client or httpx.Client()  # made before the clock starts: reading certificates takes a while
    answer: list[str | None] = []
    thread = threading.Thread(target=lambda: answer.append(_silence(http, address, seconds)), name="reach", daemon=True)
    thread.start()
    thread.join(seconds)
    if client is None and not thread.is_alive():
        http.close()
    return answer[0] if answer else f"no answer within {seconds:g} s"


def _silence(client: "httpx.Client", address: str, seconds: float) -> str | None:
    import httpx

    try:
        status = client.head(address, timeout=seconds, follow_redirects=False).status_code
    except httpx.TimeoutException:
        return f"no answer within {seconds:g} s"
    except Exception as error:  # a wrong proxy setting, certificate or name, or no valid address
        return briefly(error)
    return f"it answers {status}" if status in NOBODY_BEHIND else None
