#!/usr/bin/env bash
# Finding: What a Ray task returns sets class attributes of the caller's script back.
# Packages: ray==2.60.0
# Guess: An instance that a task returns is of the caller's own class, and the class stays as it is.
# Behaviour: It is of the caller's own class. But a class of the script itself travels as its definition and state, there
# and back, and what comes back is written onto the class that is there: a counter jumps to the worker's number, even
# backwards.
# Who meets it: Scripts and notebooks that keep counters, caches or settings on a class, for example a metric that counts
# its calls.
# Here: A class that the driver has is left alone when results come back (dspy_fst/cluster/shipping.py).
# Output seen (Python 3.11):
#   made here: 3
#   a task made one: the same class True, counter 4
#   made here, four more: 8
#   a task made one: the same class True, counter 5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import ray


class Reply:
    made = 0

    def __init__(self):
        type(self).made += 1


@ray.remote
def one():
    return Reply()


ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
for _ in range(3):
    Reply()
print("made here:", Reply.made)
reply = ray.get(one.remote(), timeout=120)
print(f"a task made one: the same class {type(reply) is Reply}, counter {Reply.made}")
for _ in range(4):
    Reply()
print("made here, four more:", Reply.made)
reply = ray.get(one.remote(), timeout=120)
print(f"a task made one: the same class {type(reply) is Reply}, counter {Reply.made}")
ray.shutdown()
PYTHON
env -i PATH="$PATH" HOME="$folder" RAY_TMPDIR="$folder" RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
