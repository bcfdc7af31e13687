r"""math_verify in a process of its own, which is killed when it takes too long.

math_verify limits its time by signals, which work in a main thread only; metrics run in worker threads. Without
them a reply such as \boxed{9^{9^{9^9}}} computes for ever, and holds the interpreter's lock meanwhile: no other
thread would run again. So the child does without signals, and its parent watches the clock.
"""

import json
import math
import select
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

START_TIMEOUT_S = 120.0
"""For importing math_verify, seconds on a busy machine."""
MEMORY_BYTES = 4 << 30
LONGEST = 2000
"""Characters of an answer that are looked at."""


class Verifier:
    """Says whether two mathematical expressions are equal; may be called from any thread, one at a time is served."""

    def __init__(self, timeout_s: float = 5.0):
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None

    def same(self, want: str, got: str) -> bool | None:
        """Whether `got` equals `want`, both LaTeX or plain; None when that could not be found out in time.

        Raises:
            RuntimeError: the child process does not start.
        """
        if len(got) > LONGEST:
            return False
        with self._lock:
            child = self._child = self._alive() or self._start()
            answer = _ask(child, json.dumps([want, got]), self.timeout_s)
            if answer is None:
                self._child = None
                _end(child)
            return None if answer is None else answer == "true"

    def _alive(self) -> "subprocess.Popen[str] | None":
        return self._child if self._child and self._child.poll() is None else None

    def _start(self) -> "subprocess.Popen[str]":
        child = subprocess.Popen(
            [sys.executable, "-I", __file__, str(math.ceil(2 * self.timeout_s))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child
        )
        weakref.finalize(self, _end, child)
        if _ask(child, json.dumps(["1", "1"]), START_TIMEOUT_S) != "true":
            _end(child)
            raise RuntimeError(f"math_verify did not answer within {START_TIMEOUT_S:g} s of its start")
        return child


def _ask(child: "subprocess.Popen[str]", line: str, timeout_s: float) -> str | None:
    """The child's answer to one line; None when it is late or dead."""
    assert child.stdin
    assert child.stdout
    try:
        child.stdin.write(line + "\n")
    except BrokenPipeError:
        return None
    ready, _, _ = select.select([child.stdout], [], [], timeout_s)
    return (child.stdout.readline().strip() or None) if ready else None


def _end(child: "subprocess.Popen[str]") -> None:
    child.kill()
    child.wait(timeout=10)
    for pipe in (child.stdin, child.stdout):
        if pipe:
            with suppress(BrokenPipeError):  # a line that the child did not read any more
                pipe.close()


def _equal(want: str, got: str) -> bool:
    from math_verify import parse, verify  # type: ignore[import-untyped]

    expected, found = (parse(_boxed(text), parsing_timeout=None) for text in (want, got))
    return bool(verify(expected, found, timeout_seconds=None))


def _boxed(text: str) -> str:
    return text if r"\boxed" in text else rf"\boxed{{{text}}}"


def _serve() -> None:
    import logging
    import resource
    import signal

    import math_verify  # noqa: F401  (before the clock runs)

    logging.disable()  # a warning about the signals, and one for each odd answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        signal.alarm(int(sys.argv[1]))  # without a handler it ends this process, should the parent have died meanwhile
        try:
            answer = _equal(*json.loads(line))
        except Exception:  # sympy raises of everything; what it cannot compare is not equal
            answer = False
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
