"""The record of a search's paid operations, as the fast phase needs it (on disk: `dspy_fst.run.search_journal`)."""

import hashlib
import json
from typing import Any, Protocol


class SearchJournal(Protocol):
    """Records the result of each paid operation of a search, so that a repeated search does not pay for it again.

    An operation is named by its kind (``"rollouts"``, ``"reflection"``) and a key (see `operation_key`).
    """

    def ahead(self, kind: str, key: str) -> list[Any]:
        """Results of this operation among the next ones on record, as far as all of those are of its kind."""

    def recall(self, kind: str, key: str) -> Any:
        """The recorded result of the next operation; None when there is none."""

    def take_all(self, kind: str) -> dict[str, Any]:
        """Take all recorded results of this kind off the record, by key, for a search whose operations have no fixed
        order. Where a key was recorded twice, the last result counts."""

    def record(self, kind: str, key: str, gave: Any) -> Any:
        """Record an operation's result, and return it as it is recorded."""

    def remove(self) -> None:
        """Delete the whole record."""


class NoJournal:
    """Records nothing."""

    def ahead(self, kind: str, key: str) -> list[Any]:
        return []

    def recall(self, kind: str, key: str) -> Any:
        return None

    def take_all(self, kind: str) -> dict[str, Any]:
        return {}

    def record(self, kind: str, key: str, gave: Any) -> Any:
        return gave

    def remove(self) -> None:
        pass


def operation_key(operation: object) -> str:
    """Twelve hex digits that name an operation by its JSON, so that no record is taken for another operation's."""
    return hashlib.sha256(json.dumps(operation).encode()).hexdigest()[:12]
