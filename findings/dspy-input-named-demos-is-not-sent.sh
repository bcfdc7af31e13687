#!/usr/bin/env bash
# Finding: An input field named demos never reaches the prompt in DSPy.
# Packages: dspy==3.4.1
# Guess: Any name of a Python variable may be a field, or the signature refuses it.
# Behaviour: dspy.Predict takes demos out of the call's inputs for its own few-shot examples. The call warns that
# the field is missing, goes on, and the model answers without it.
# Who meets it: Whoever has a data set with a column of that name, such as tasks that hold their own demonstrations.
# Here: An input field named demos, config or lm is refused before a run (dspy_fst/preflight).
# Output seen (Python 3.11):
#   demonstrations: the value is in the prompt: True
#   demos: the value is in the prompt: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq $(sed -n 's/^# Packages: //p' "$0")
cat > "$folder/shown.py" <<'PYTHON'
import dspy
from dspy.utils import DummyLM

for name in ("demonstrations", "demos"):
    lm = DummyLM([{"answer": "yes"}])
    with dspy.context(lm=lm):
        dspy.Predict(f"{name}, question -> answer")(**{name: "two and two is four", "question": "?"})
    print(f"{name}: the value is in the prompt:", "two and two is four" in str(lm.history[-1]["messages"]))
PYTHON
env -i PATH="$PATH" HOME="$folder" "$folder/venv/bin/python" "$folder/shown.py" > "$folder/output" 2> "$folder/log" || {
  tail -n 30 "$folder/log"
  exit 1
}
sed -n 's/^#   //p' "$0" | diff - "$folder/output"
echo "as stated"
