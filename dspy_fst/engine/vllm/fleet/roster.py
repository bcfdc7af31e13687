"""What the servers of a fleet know of each other: which weights are due, and whether a publish is under way."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from dspy_fst.engine.base import Checkpoint, Scorer
from dspy_fst.engine.vllm.fleet.alike import Kind


@dataclass(frozen=True, eq=False)
class Due:
    """The weights of one publish. Equal to itself alone: the same version may be published twice."""

    checkpoint: Checkpoint
    check: Callable[[Scorer], object] | None
    """Raises an error if a server's weights are wrong; None: nothing is checked."""


class Roster:
    """Shared by a fleet and its servers, which read and write it with `changed` held."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Also guards the state of each server; notified whenever one is lost or comes back."""
        self.due: Due | None = None
        """Of the last publish that succeeded; None before the first one, and after one that failed."""
        self.publishing = False
        self.closed = False
        self.kind: Kind | None = None
        """Of all servers, if somebody else launched them."""
        self.tell: Callable[[str], None] = lambda sentence: None
        """Called with a sentence for each server that is lost, restarted or back."""

    def settled(self) -> Due | None:
        """The weights that are due, once no publish is under way; None if the fleet is closed. `changed` is held."""
        self.changed.wait_for(lambda: self.closed or (self.due is not None and not self.publishing))
        return None if self.closed else self.due
