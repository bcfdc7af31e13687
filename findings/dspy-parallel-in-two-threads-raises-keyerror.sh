#!/usr/bin/env bash
# Finding: dspy.Parallel raises a KeyError now and then, where another thread calls it at the same time.
# Packages: dspy==3.4.1 tqdm==4.70.1
# Guess: Each call has threads and a progress bar of its own, so calls in several threads do not touch each other.
# Behaviour: A call begins by emptying tqdm's set of all bars in the process. A bar that another thread is just making
# is no longer found in it, and tqdm raises a KeyError that holds a weak reference. Hiding the bars changes nothing.
# Who meets it: Whoever evaluates or trains programs in threads whose forward uses dspy.Parallel.
# Here: The set is emptied under tqdm's lock, and a bar that is not in it is no error (dspy_fst/rollout/call_recorder.py).
# Output seen (Python 3.11):
#   5000 calls in one thread, a KeyError: False
#   5000 calls in eight threads, a KeyError: True
#   it names a weak reference: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import sys
from concurrent.futures import ThreadPoolExecutor

import dspy

CALLS = 5000
sys.setswitchinterval(1e-5)  # so that it shows in seconds


class Same(dspy.Module):
    def forward(self, text):
        return dspy.Prediction(text=text)


def call(number):
    pairs = [(Same(), dspy.Example(text=str(number)).with_inputs("text"))]
    try:
        dspy.Parallel(num_threads=1, disable_progress_bar=True)(pairs)
    except KeyError as error:
        return str(error)
    except RuntimeError:  # the same race, seen while tqdm counts the bars
        return None
    return None


for words, threads in (("one thread", 1), ("eight threads", 8)):
    with ThreadPoolExecutor(threads) as pool:
        raised = [fault for fault in pool.map(call, range(CALLS)) if fault]
    print(f"{CALLS} calls in {words}, a KeyError: {bool(raised)}")
print(f"it names a weak reference: {all('weakref' in fault for fault in raised)}")
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
