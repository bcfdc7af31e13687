"""The journal of a search: the result of every batch of rollouts and every reflection, in order, on disk.

A search is a function of its seed and of the results of its rollouts and reflections. Given the same results it does
the same again, so a killed search is replayed from its journal, at no cost, up to the first operation that is not in
it. GEPA's own state is not kept: it would have to be pickled, and another release might read it back.
"""

import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from dspy_fst.errors import RunDirectoryError
from dspy_fst.run.files import writing


class Journal:
    """The entries of one search. Lines are appended with a checksum; an incomplete last line is dropped.

    Args:
        head: Identifies the search; the journal of another search is replaced.
        clean: Removes secrets from an entry.
        conditions: What the entries depend on besides; a journal under others is replaced too, and its entries counted.

    Raises:
        RunDirectoryError: a line other than the last is damaged.
    """

    def __init__(
        self,
        path: Path,
        head: Mapping[str, object],
        clean: Callable[[object], object] = lambda value: value,
        conditions: Mapping[str, object] | None = None,
    ):
        self._path, self._clean = path, clean
        records, whole = _read(path)
        first, wanted = (records[0] if records else {}), {"head": {**head, **(conditions or {})}}
        self.replaced = 0
        """Entries of this very search that were made under other conditions, and will be made again."""
        self._ahead: deque[dict[str, object]] = deque()
        if first == wanted:
            self._ahead.extend(records[1:])
            os.truncate(path, whole)
        else:
            self.replaced = len(records) - 1 if _names(first.get("head"), head) else 0
            path.unlink(missing_ok=True)
            self._write(wanted)
        self.replayed = len(self._ahead)

    def ahead(self, kind: str, key: str) -> list[Any]:
        """Results of this operation among the next entries, as far as all of those are of its kind."""
        of_kind = takewhile(lambda record: record["kind"] == kind, self._ahead)
        return [record["gave"] for record in of_kind if record["key"] == key]

    def recall(self, kind: str, key: str) -> object:
        """The recorded result of the next operation; None when the journal ends before it.

        Raises:
            RunDirectoryError: the next entry is of another operation, so this is another search.
        """
        if not self._ahead:
            return None
        record = self._ahead.popleft()
        if (record["kind"], record["key"]) != (kind, key):
            raise RunDirectoryError(
                f"{self._path} is of another search (it holds {record['kind']} {record['key']} where {kind} {key} "
                "comes now): the metric, the proposer or a library changed since. Remove the file to search this cycle "
                "anew"
            )
        return record["gave"]

    def take_all(self, kind: str) -> dict[str, Any]:
        """All recorded results of this kind by key, whatever their order; they are no longer ahead."""
        taken = {str(record["key"]): record["gave"] for record in self._ahead if record["kind"] == kind}
        self._ahead = deque(record for record in self._ahead if record["kind"] != kind)
        return taken

    def record(self, kind: str, key: str, gave: object) -> Any:
        """Keep the result of an operation, and return it as it is kept: without secrets."""
        gave = self._clean(gave)
        self._write({"kind": kind, "key": key, "gave": gave})
        return gave

    def remove(self) -> None:
        """Remove the journal: the search was committed, or it failed as a whole."""
        self._ahead.clear()
        self._path.unlink(missing_ok=True)

    def _write(self, record: Mapping[str, object]) -> None:
        body = json.dumps(self._clean(record))
        with writing(self._path.parent), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{zlib.crc32(body.encode()):08x} {body}\n")
            file.flush()
            os.fsync(file.fileno())


def _names(found: object, head: Mapping[str, object]) -> bool:
    return isinstance(found, Mapping) and all(found.get(key) == value for key, value in head.items())


def _read(path: Path) -> tuple[list[dict[str, object]], int]:
    """The entries, and how many bytes the complete ones take."""
    if not path.exists():
        return [], 0
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        checksum, _, body = line.partition(b" ")
        if checksum != f"{zlib.crc32(body):08x}".encode():
            raise RunDirectoryError(f"{path}, line {number}, is damaged; remove the file to search this cycle anew")
        records.append(json.loads(body))
    return records, sum(len(line) + 1 for line in lines)
