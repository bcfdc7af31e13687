"""Where a vLLM server listens."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Address:
    """Where a server listens, and its key."""

    url: str
    """Without ``/v1``, e.g. ``"http://127.0.0.1:8000"``."""
    api_key: str | None = field(repr=False)
    through_proxy: bool
    """Whether the environment's HTTP proxy is used; False for a server that was launched here."""
