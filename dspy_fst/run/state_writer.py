"""Writes a run's states, one at a time, in the background where the run need not wait.

While a state is written the run may sample: that changes nothing which the state holds. It waits before whatever would,
and before it relies on the state. A kill in between loses the state alone, so the run goes on from the one before, and
makes the same again.
"""

import threading
from pathlib import Path

from dspy_fst.errors import DiskError
from dspy_fst.run.files import writing
from dspy_fst.run.state import Documents, RunState, Save, StateFields, commit_state
from dspy_fst.run.storage import Storage

STATE_S = 3600.0
"""Longest wait for a state to be written, in seconds: a hundred gigabytes at 30 MB/s (ours)."""


class StateWriter:
    """The newest state of a run, and the writing of the next.

    Args:
        path: The run's directory.
        newest: The state that it goes on from; None at its start.
        keep: How many states stay.
        storage: Where each state is copied to when it is written. The copy is a part of the writing: who waits for
            the state waits for it, and is told when it fails.
    """

    def __init__(self, path: Path, newest: RunState | None, keep: int, storage: Storage | None = None):
        self._path, self._newest, self._keep, self._storage = path, newest, keep, storage
        self._written = threading.Event()
        self._written.set()
        self._error: BaseException | None = None

    @property
    def newest(self) -> RunState | None:
        """The newest state that is on the disk, after a write in progress; None before the first.

        Raises:
            DiskError: that write failed, or does not end. It is told once, and the state before it stays the newest.
        """
        if not self._written.wait(STATE_S):
            raise DiskError(
                f"{self._path}: the state is not written after {STATE_S:g} s; look at the disk, then go on with the "
                "same run_dir. What was committed is whole"
            )
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._newest

    def write(self, fields: StateFields, save_trainer: Save | None, documents: Documents | None) -> threading.Event:
        """Begin to write the next state, after the one in progress; see `commit_state`.

        Returns:
            Is set when the write has ended, well or not; what ``save_trainer`` reads must not change before.

        Raises:
            DiskError: the write before failed; this one does not begin.
        """
        last, written, begins = self.newest, threading.Event(), threading.Lock()
        arguments = (fields, save_trainer, last, documents, written, begins)
        thread = threading.Thread(target=self._write, args=arguments, name="state", daemon=True)
        try:
            self._written = written
            thread.start()
        except BaseException:  # of a signal, anywhere in start(); nobody may wait for a thread that never ran
            if begins.acquire(blocking=False):
                written.set()
            raise
        return written

    def _write(
        self,
        fields: StateFields,
        save_trainer: Save | None,
        last: RunState | None,
        documents: Documents | None,
        written: threading.Event,
        begins: threading.Lock,
    ) -> None:
        if not begins.acquire(blocking=False):
            return  # it was given up before it began
        try:
            with writing(self._path):
                states = self._path / "states"
                self._newest = commit_state(states, fields, save_trainer, last, documents, keep=self._keep)
            if self._storage is not None:
                self._storage.push(self._path, self._newest)
        except BaseException as error:
            self._error = error
        finally:
            written.set()
