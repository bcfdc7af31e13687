#!/usr/bin/env bash
# Finding: dspy.configure inside a dspy.context block does nothing in the block, and takes effect after it.
# Packages: dspy==3.4.1
# Guess: The newest setting counts, and the block takes it back at its end.
# Behaviour: It is the other way round. A block holds a copy of all settings, of those that it does not name as
# well, and reads the copy until it ends. What was configured in it takes effect after it and stays for the rest of
# the process.
# Who meets it: Whoever calls a function that configures DSPy (a notebook's set-up cell, a library) from within a
# context, or in a thread of dspy.Parallel.
# Here: Settings of a trained program are said of the program by name (reconfigured, load), and neither configure
# nor context changes them (DECISIONS.md, Rollouts).
# Output seen (Python 3.11):
#   in the block, which named the adapter: JSONAdapter
#   in the block, which did not name the LM: one
#   after the block: XMLAdapter
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import dspy
from dspy.utils import DummyLM

one, two = DummyLM([]), DummyLM([])
dspy.configure(lm=one, adapter=dspy.ChatAdapter())
with dspy.context(adapter=dspy.JSONAdapter()):
    dspy.configure(adapter=dspy.XMLAdapter(), lm=two)
    print("in the block, which named the adapter:", type(dspy.settings.adapter).__name__)
    print("in the block, which did not name the LM:", "two" if dspy.settings.lm is two else "one")
print("after the block:", type(dspy.settings.adapter).__name__)
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
