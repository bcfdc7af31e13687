"""How a program is served: address, key, limits, and which candidates answer. All faults are reported at once."""

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dspy_fst.engine.machine import is_loopback
from dspy_fst.errors import ConfigurationError

if TYPE_CHECKING:  # the command line reads the defaults here, and its help must come at once
    import dspy

ChoiceName = Literal["best", "sampled", "vote"]
CHOICES = ("best", "sampled", "vote")
CHAT, MODELS = "/v1/chat/completions", "/v1/models"
HEALTH, READY, METRICS = "/health", "/ready", "/metrics"
DOCS, DOCS_FILES, SCHEMA = "/docs", "/docs-files", "/openapi.json"
RESERVED = (CHAT, MODELS, HEALTH, READY, METRICS, DOCS, SCHEMA)
SHORTEST_KEY = 16
"""Characters of the shortest key that is accepted: a shorter one can be guessed."""


@dataclass(frozen=True)
class ServeSettings:
    """How a compiled program is served.

    Raises:
        ConfigurationError: with every setting that cannot work.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port."""
    api_key: str | None = field(default=None, repr=False)
    """Callers send it as ``Authorization: Bearer KEY``. None creates a random key, which `serve` prints."""
    no_key: bool = False
    """Accept every caller on this machine. Only for a loopback address."""
    path: str = "/v1/program"
    """Path of the program; its event stream is at this path with ``/stream`` added."""
    signature: "str | type[dspy.Signature] | None" = None
    """Inputs and outputs of a program that does not declare them, e.g. ``"question: str -> answer: int"``."""
    choice: ChoiceName = "best"
    """Which candidates answer: the best one, one drawn at random, or all of them by majority."""
    vote_on: str | None = None
    """The output field that is voted on; None takes all fields, which works where none is free text."""
    model_name: str = "policy"
    """Name of the trained model at the chat endpoint. Several LoRA adapters have their own names there."""
    max_body_bytes: int = 1_000_000
    max_body_values: int = 20_000
    """Entries of all objects and arrays of a body together. They decide the cost of validation."""
    max_in_flight: int = 32
    """Requests at work at once. Each uses one thread, or one for each candidate that votes."""
    max_queue: int = 128
    """Requests that may wait for a slot; further ones are refused with 429."""
    timeout_s: float = 120.0
    """Longest time in seconds from a request's arrival to its reply."""
    drain_s: float = 30.0
    """Seconds that admitted requests may take after SIGTERM."""
    retry_after_s: int = 1
    """Value of ``Retry-After`` for refused callers, in seconds."""
    made_key: bool = field(default=False, init=False)
    """Whether the key was created here, so that `serve` must print it."""

    def __post_init__(self) -> None:
        if faults := _faults(self):
            raise ConfigurationError(faults)
        if self.api_key is None and not self.no_key:
            object.__setattr__(self, "api_key", secrets.token_urlsafe(32))
            object.__setattr__(self, "made_key", True)

    @property
    def stream_path(self) -> str:
        return f"{self.path}/stream"


def _faults(settings: ServeSettings) -> list[str]:
    faults = []
    for name in ("max_body_bytes", "max_body_values", "max_in_flight", "timeout_s", "drain_s", "retry_after_s"):
        if not (value := getattr(settings, name)) > 0:
            faults.append(f"{name} is {value!r}: it must be more than 0")
    if settings.max_queue < 0:
        faults.append(f"max_queue is {settings.max_queue!r}: it must be 0 or more")
    if not 0 <= settings.port < 65_536:
        faults.append(f"port is {settings.port!r}: it must be 0 (a free one) to 65535")
    if settings.choice not in CHOICES:
        faults.append(f"choice is {settings.choice!r}: use one of {', '.join(CHOICES)}")
    if settings.vote_on is not None and settings.choice != "vote":
        faults.append(f"vote_on is {settings.vote_on!r}, but choice is {settings.choice!r}: set choice='vote'")
    if {settings.path, settings.stream_path} & set(RESERVED) or not _is_plain_path(settings.path):
        faults.append(f"path is {settings.path!r}: name a plain path of your own, such as /v1/program")
    return faults + _key_faults(settings)


def _is_plain_path(path: str) -> bool:
    words = path.split("/")[1:]
    return path.startswith("/") and all(word.replace("-", "").replace("_", "").isalnum() for word in words)


def _key_faults(settings: ServeSettings) -> list[str]:
    faults = []
    if settings.no_key and settings.api_key is not None:
        faults.append("no_key is set, but there is an api_key: remove one of them")
    if settings.no_key and not is_loopback(settings.host):
        faults.append(f"host is {settings.host!r}: other machines can reach it, so a key is needed; remove no_key")
    if settings.api_key is not None and len(settings.api_key) < SHORTEST_KEY:
        faults.append(f"api_key has {len(settings.api_key)} characters: it must have {SHORTEST_KEY} or more")
    if settings.api_key is not None and not (settings.api_key.isascii() and settings.api_key.isprintable()):
        faults.append("api_key has characters that a header cannot carry: use letters, digits and signs")
    return faults
