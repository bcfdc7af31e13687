#!/usr/bin/env bash
# Finding: An exception of a signal's handler leaves a waiting call of Ray as another one.
# Packages: ray==2.60.0
# Guess: What a handler raises comes out of ray.get or ray.wait as it does out of time.sleep.
# Behaviour: Any SystemExit becomes a plain SystemExit with the code 1, without its class, its code and its fields.
# Who meets it: Whoever ends a program in order on SIGTERM, and tells the end by a class or an exit code of its own.
# Here: A run on Ray remembers the signal and makes its own exception of it again (dspy_fst/run/interrupts.py).
# Output seen (Python 3.11):
#   out of time.sleep: Ended, code 143
#   out of ray.get: SystemExit, code 1
#   out of ray.wait: SystemExit, code 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os
import signal
import threading
import time

import ray


class Ended(SystemExit):
    pass


def end(number, frame):
    raise Ended(128 + number)


@ray.remote
def long():
    time.sleep(30)


ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
signal.signal(signal.SIGTERM, end)
tasks = [long.remote()]
waits = {
    "time.sleep": lambda: time.sleep(60),
    "ray.get": lambda: ray.get(tasks, timeout=60),
    "ray.wait": lambda: ray.wait(tasks, timeout=60),
}
for name, wait in waits.items():
    threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        wait()
    except SystemExit as error:
        print(f"out of {name}: {type(error).__name__}, code {error.code}")
signal.signal(signal.SIGTERM, signal.SIG_DFL)
ray.cancel(tasks[0], force=True)
ray.shutdown()
PYTHON
env -i PATH="$PATH" HOME="$folder" RAY_TMPDIR="$folder" RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
