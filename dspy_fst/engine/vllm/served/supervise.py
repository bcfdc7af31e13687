"""Runs a server and ends it with its owner: ``python -I supervise.py OWNER_PID COMMAND...``.

This process leads a process group that the command and all its children belong to. When the owner ends, even by
SIGKILL, the whole group is ended. The owner is recognised by its process id. PR_SET_PDEATHSIG would fire when the
*thread* that started this process ends, and a pipe could be held open by a forked sibling.
"""

import contextlib
import os
import signal
import subprocess
import sys

OWNER_CHECK_S = 0.5
GRACE_S = 5.0
"""Seconds between SIGTERM and SIGKILL after the owner has ended."""


def main(owner: int, command: list[str]) -> int:
    """Wait for the command and return its exit status; end the group if the owner disappears."""
    # The owner signals the group, and this process must outlive the server to clean up after it. A handler and not
    # SIG_IGN, which the command would inherit.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    server = subprocess.Popen(command)
    while os.getppid() == owner:
        try:
            status = server.wait(OWNER_CHECK_S)
        except subprocess.TimeoutExpired:
            continue
        os.killpg(0, signal.SIGTERM)  # for children of a server that was itself killed
        return status if status >= 0 else 128 - status
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE_S)
    os.killpg(0, signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
