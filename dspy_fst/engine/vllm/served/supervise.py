"""Runs a server and ends it with its owner: ``python -I supervise.py OWNER_PID COMMAND...``.

Started as the leader of a process group that the command and all its children share. When the owner is gone,
even by SIGKILL, the whole group is ended. The owner is recognised by its process id rather than by
PR_SET_PDEATHSIG, which fires when the *thread* that started the child ends, or by a pipe, which a forked
sibling would hold open.
"""

import contextlib
import os
import signal
import subprocess
import sys

OWNER_CHECK_S = 0.5
GRACE_S = 5.0
"""Seconds between SIGTERM and SIGKILL once the owner is gone."""


def main(owner: int, command: list[str]) -> int:
    """Wait for the command and pass on its exit status; take the group along when the owner disappears."""
    # The owner signals the group; this process has to outlive the server to clear up behind it. A handler and
    # not SIG_IGN, which the command would inherit.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    server = subprocess.Popen(command)
    while os.getppid() == owner:
        try:
            status = server.wait(OWNER_CHECK_S)
        except subprocess.TimeoutExpired:
            continue
        os.killpg(0, signal.SIGTERM)  # children of a server that was itself killed
        return status if status >= 0 else 128 - status
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(GRACE_S)
    os.killpg(0, signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
