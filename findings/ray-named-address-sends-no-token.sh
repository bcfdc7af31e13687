#!/usr/bin/env bash
# Finding: Once a program has started Ray on a machine, a cluster that `ray start` begins there refuses its own address.
# Packages: ray==2.60.0
# Guess: A cluster that "auto" finds can also be joined by the address that `ray start` printed, whatever was run before.
# Behaviour: ray.init("local") writes a token into the home folder. From then on `ray start` asks for it. "auto" sends
# it, and a named address does not, unless RAY_AUTH_MODE=token is set.
# Who meets it: Whoever tries a program on a cluster of this machine first, and then names the address of a larger one.
# Here: The error of a run that cannot connect names the variable and the token's file, and docs/ray.md does.
# Output seen (Python 3.11):
#   before: auto connected, named connected
#   ray.init("local") wrote a token: True
#   after: auto connected, named refused (InvalidAuthToken)
#   after, RAY_AUTH_MODE=token: named connected
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

JOIN = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False)"
LOCAL = "import ray; ray.init('local', num_cpus=1, include_dashboard=False, logging_level='ERROR')"
RAY = str(Path(sys.executable).with_name("ray"))


@contextmanager
def cluster():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
    log = Path(os.environ["HOME"]) / f"start-{port}"
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def joined(address, **variables):
    words = [sys.executable, "-c", JOIN, address]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, env={**os.environ, **variables})
    if done.returncode == 0:
        return "connected"
    return "refused (InvalidAuthToken)" if "InvalidAuthToken" in done.stderr else f"another error: {done.stderr[-500:]}"


with cluster() as address:
    print(f"before: auto {joined('auto')}, named {joined(address)}")
subprocess.run([sys.executable, "-c", LOCAL], check=True, capture_output=True, timeout=180)
print(f'ray.init("local") wrote a token: {(Path.home() / ".ray" / "auth_token").is_file()}')
with cluster() as address:
    print(f"after: auto {joined('auto')}, named {joined(address)}")
    print(f"after, RAY_AUTH_MODE=token: named {joined(address, RAY_AUTH_MODE='token')}")
PYTHON
env -i PATH="$PATH" HOME="$folder" RAY_TMPDIR="$folder" RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
