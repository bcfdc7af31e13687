#!/usr/bin/env bash
# Finding: A method of a Ray actor that is called after ray.shutdown() begins a cluster of its own.
# Packages: ray==2.60.0
# Guess: The call raises, because Ray was shut down, and nothing else happens.
# Behaviour: The call first starts Ray anew in this process, with every processor of the machine, and then raises that
# the actor is not there. The process stays connected to that cluster.
# Who meets it: Whoever has threads that still hold an actor when the program leaves Ray, for example late answers of
# a language model.
# Here: A call that ends after its run tells no actor any more (dspy_fst/cluster/policy_calls.py).
# Output seen (Python 3.11):
#   after ray.init: initialized True, processors 1
#   after ray.shutdown: initialized False
#   the call raised: True
#   after the call: initialized True, every processor True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import os

import ray

LOCAL = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}


@ray.remote
class Counter:
    def count(self):
        return 1


ray.init("local", num_cpus=1, **LOCAL)
counter = Counter.remote()
ray.get(counter.count.remote(), timeout=120)
print(f"after ray.init: initialized {ray.is_initialized()}, processors {int(ray.cluster_resources()['CPU'])}")
ray.shutdown()
print(f"after ray.shutdown: initialized {ray.is_initialized()}")
try:
    counter.count.remote()
except Exception:
    print("the call raised: True")
else:
    print("the call raised: False")
every = ray.cluster_resources()["CPU"] == len(os.sched_getaffinity(0))
print(f"after the call: initialized {ray.is_initialized()}, every processor {every}")
ray.shutdown()
PYTHON
env -i PATH="$PATH" HOME="$folder" RAY_TMPDIR="$folder" RAY_USAGE_STATS_ENABLED=0 "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
